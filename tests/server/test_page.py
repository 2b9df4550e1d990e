"""The chat page in headless Chromium against the real server over the fake engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake import FakeEngine, calling, listening
from pageuser import PageUser
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.page]
ANSWER = "Breakfast is from 07:00 to 10:30.\n<b>bold</b> & ça va, ñandú, Straße."


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ANSWER)


@pytest.fixture
def user(browser: webdriver.Chrome, engine: FakeEngine) -> Iterator[PageUser]:
    """Somebody at the page of a server over ``engine``."""
    with listening(engine) as address:
        user = PageUser(browser, address)
        yield user
        complaints = user.complaints()
        user.leave()
        assert complaints == []


def test_a_typed_question_is_answered(user: PageUser, engine: FakeEngine) -> None:
    user.type("When does breakfast start?")
    user.id("send").click()
    user.wait_idle()
    assert user.answers == [ANSWER]  # as text: the markup in it is no markup here
    assert "tokens/s" in user.one(".numbers").text
    user.ask("And until when?")
    text = engine.tokenizer.decode(engine.prompts[-1])
    for part in ("When does breakfast start?", "And until when?", "10:30"):
        assert part in text


def test_every_token_is_lined_up_with_its_experts(user: PageUser, engine: FakeEngine) -> None:
    user.ask("When does breakfast start?")
    user.click("Words")
    [prompt] = engine.prompts
    ids = engine.tokenizer.encode(ANSWER)
    words = user.run("return [...document.querySelectorAll('.cell .word')].map((each) => each.textContent)")
    assert len(words) == len(ids)
    assert "".join(words).replace("␣", " ").replace("↵", "\n").lstrip() == ANSWER
    shown = user.run("return [...document.querySelectorAll('.cell b')].map((each) => Number(each.textContent))")
    experts = engine.routing(len(prompt), len(ids)).experts
    assert shown == list(experts[:: 2 * engine.layers])  # the first expert of layer 0


def test_nothing_is_blocked_and_nothing_comes_from_elsewhere(user: PageUser) -> None:
    user.ask("Hello")
    assert user.answers == [ANSWER]
    assert user.all(".experts")
    assert [entry for entry in user.browser.get_log("browser") if entry["level"] in {"WARNING", "SEVERE"}] == []
    names = user.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {"app.js", "markdown.js", "base.css", "completions"} <= {name.rsplit("/", 1)[-1] for name in names}
    assert all(name.startswith(user.address) for name in names)


def test_stop_ends_the_work_of_the_engine(user: PageUser, engine: FakeEngine) -> None:
    engine.reply, engine.delay_s = "one two three " * 120, 0.02
    user.type("Count", Keys.ENTER)
    user.wait(lambda: user.answers and user.answers[0])
    user.id("stop").click()
    user.wait_status("Stopped")
    user.wait(lambda: engine.closed == engine.opened)
    assert len(user.answers[0]) < len(engine.reply)
    engine.reply, engine.delay_s = "Again.", 0.0
    user.ask("More")
    assert user.answers[1:] == ["Again."]


def test_settings_reach_the_engine(user: PageUser, engine: FakeEngine) -> None:
    user.open_settings()
    user.set("system", "Answer in one word.")
    for name, value in {"temperature": "0", "max_tokens": "7", "seed": "5", "top_k": "3"}.items():
        user.set(name, value)
    user.ask("First")
    params = engine.params[-1]
    assert (params.temperature, params.max_tokens, params.seed, params.top_k) == (0.0, 7, 5, 3)
    assert "Answer in one word." in engine.tokenizer.decode(engine.prompts[-1])
    assert "length" in user.one(".numbers").text


def test_a_call_and_its_result(user: PageUser, engine: FakeEngine) -> None:
    engine.reply = calling(engine.tokenizer)
    user.open_settings("Functions")
    user.click("Add an example")
    user.ask("When is the castle open?")
    assert user.one(".call .name").text == "get_hours"
    engine.reply = "From 9 to 17."
    user.focused.send_keys("9-17", Keys.CONTROL, Keys.ENTER)
    user.wait(lambda: "From 9 to 17." in user.answers)
    assert "9-17" in engine.tokenizer.decode(engine.prompts[-1])


def test_a_cut_answer_goes_on(user: PageUser, engine: FakeEngine) -> None:
    user.open_settings()
    user.set("max_tokens", "4")
    user.ask("Hello")
    begun = user.answers[0]
    engine.reply = " and more"
    user.click("Continue")
    user.wait(lambda: len(user.answers[0]) > len(begun))
    user.wait_idle()
    assert begun in engine.tokenizer.decode(engine.prompts[-1])


def test_errors_are_shown_as_received(user: PageUser, engine: FakeEngine) -> None:
    user.run("document.getElementById('prompt').value = 'word '.repeat(600)")
    user.ask("!")
    assert "context_length_exceeded" in user.one(".error").text
    user.id("new-chat").click()
    engine.fails_after = 2
    user.ask("Hello")
    assert "internal_error" in user.one(".error").text
    assert user.answers == ["Breakfast"]
