"""The chat page in headless Chromium: real typing and clicking, against a real server over the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake import FakeEngine, listening
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = [pytest.mark.page]
ANSWER = "Breakfast is from 07:00 to 10:30.\n<b>bold</b> & ça va, ñandú, Straße."


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ANSWER)


@pytest.fixture
def page(browser: webdriver.Chrome, engine: FakeEngine) -> Iterator[webdriver.Chrome]:
    """The page, loaded from a server over ``engine``, ready for a question."""
    with listening(engine) as address:
        browser.get(address)
        wait_for_status(browser, "Ready")
        yield browser
        browser.get("about:blank")


def wait_for_status(browser: webdriver.Chrome, text: str) -> None:
    status = browser.find_element(By.ID, "status")
    WebDriverWait(browser, 10, poll_frequency=0.02).until(
        lambda _: status.text.startswith(text), f"status is {status.text!r}"
    )


def by_id(browser: webdriver.Chrome, name: str) -> WebElement:
    return browser.find_element(By.ID, name)


def answers(browser: webdriver.Chrome) -> list[str]:
    return [found.text for found in browser.find_elements(By.CSS_SELECTOR, ".message.assistant .text")]


def test_a_typed_question_is_answered(page: webdriver.Chrome, engine: FakeEngine) -> None:
    assert not by_id(page, "send").is_enabled()
    by_id(page, "prompt").send_keys("When does breakfast start?")
    by_id(page, "send").click()
    WebDriverWait(page, 10).until(lambda _: by_id(page, "send").is_displayed())
    assert answers(page) == [ANSWER]  # as text: the markup in it is no markup here
    assert "tokens/s" in page.find_element(By.CSS_SELECTOR, ".message.assistant .meta").text
    assert "first text after" in page.find_element(By.CSS_SELECTOR, ".message.assistant .meta").text
    assert not by_id(page, "welcome").is_displayed()
    by_id(page, "prompt").send_keys("And until when?", Keys.ENTER)
    WebDriverWait(page, 10).until(lambda _: len(answers(page)) == 2 and by_id(page, "send").is_displayed())
    text = engine.tokenizer.decode(engine.prompts[1])
    assert "When does breakfast start?" in text
    assert "And until when?" in text
    assert "10:30" in text  # the first answer is part of the conversation


def test_nothing_is_blocked_and_nothing_comes_from_elsewhere(page: webdriver.Chrome) -> None:
    by_id(page, "prompt").send_keys("Hello", Keys.ENTER)
    WebDriverWait(page, 10).until(lambda _: answers(page) == [ANSWER] and by_id(page, "send").is_displayed())
    assert [entry for entry in page.get_log("browser") if entry["level"] in {"WARNING", "SEVERE"}] == []
    names = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names
    assert all(name.startswith(page.current_url) for name in names)


def test_text_appears_while_it_is_written_and_stop_ends_it(page: webdriver.Chrome, engine: FakeEngine) -> None:
    engine.reply, engine.delay_s = "one two three " * 120, 0.02
    by_id(page, "prompt").send_keys("Count", Keys.ENTER)
    text = page.find_element(By.CSS_SELECTOR, ".message.assistant .text")
    WebDriverWait(page, 10, poll_frequency=0.02).until(lambda _: text.text)
    first = text.text
    WebDriverWait(page, 10, poll_frequency=0.02).until(lambda _: len(text.text) > len(first))
    assert by_id(page, "status").text.startswith("Answering")
    by_id(page, "stop").click()
    wait_for_status(page, "Stopped")
    stopped = text.text
    assert len(stopped) < len("one two three " * 120)
    WebDriverWait(page, 10, poll_frequency=0.02).until(lambda _: engine.closed == 1)
    assert text.text == stopped
    assert "stopped" in page.find_element(By.CSS_SELECTOR, ".message.assistant .meta").text
    engine.reply, engine.delay_s = "Again.", 0.0
    by_id(page, "prompt").send_keys("More", Keys.ENTER)
    WebDriverWait(page, 10).until(lambda _: answers(page)[1:] == ["Again."])


def test_settings_reach_the_engine_and_a_new_chat_forgets(page: webdriver.Chrome, engine: FakeEngine) -> None:
    by_id(page, "settings-button").click()
    by_id(page, "system").send_keys("Answer in one word.")
    by_id(page, "temperature").send_keys(Keys.HOME)
    field = by_id(page, "max-tokens")
    field.clear()
    field.send_keys("7")
    by_id(page, "prompt").send_keys("First", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "line two", Keys.ENTER)
    wait_for_status(page, "The answer was cut")
    assert (engine.params[0].temperature, engine.params[0].max_tokens) == (0.0, 7)
    text = engine.tokenizer.decode(engine.prompts[0])
    assert "Answer in one word." in text
    assert "First\nline two" in text
    by_id(page, "new-chat").click()
    assert answers(page) == []
    assert by_id(page, "welcome").is_displayed()
    by_id(page, "prompt").send_keys("Second", Keys.ENTER)
    wait_for_status(page, "The answer was cut")
    assert "First" not in engine.tokenizer.decode(engine.prompts[1])


@pytest.mark.parametrize("value", ["99999", ""])
def test_a_wrong_setting_is_shown_also_when_the_settings_are_closed(
    page: webdriver.Chrome, engine: FakeEngine, value: str
) -> None:
    page.execute_script("arguments[0].value = arguments[1]", by_id(page, "max-tokens"), value)
    assert not by_id(page, "settings").is_displayed()
    by_id(page, "prompt").send_keys("Hello", Keys.ENTER)
    assert by_id(page, "settings").is_displayed()
    assert by_id(page, "settings-button").get_attribute("aria-expanded") == "true"
    assert page.switch_to.active_element == by_id(page, "max-tokens")
    assert by_id(page, "prompt").get_attribute("value") == "Hello"
    assert engine.prompts == []


def test_an_example_is_one_click(page: webdriver.Chrome, engine: FakeEngine) -> None:
    example = page.find_elements(By.CSS_SELECTOR, "#examples button")[1]
    question = example.text
    example.click()
    WebDriverWait(page, 10).until(lambda _: answers(page) == [ANSWER])
    assert page.find_element(By.CSS_SELECTOR, ".message.user").text == question
    assert question in engine.tokenizer.decode(engine.prompts[0])


def test_errors_are_shown_as_received(page: webdriver.Chrome, engine: FakeEngine) -> None:
    page.execute_script("arguments[0].value = 'word '.repeat(600)", by_id(page, "prompt"))
    by_id(page, "prompt").send_keys("!", Keys.ENTER)
    wait_for_status(page, "Failed")
    error = page.find_element(By.CSS_SELECTOR, ".message.error")
    assert "context_length_exceeded" in error.text
    assert by_id(page, "prompt").get_attribute("value").startswith("word word")  # nothing typed is lost
    by_id(page, "new-chat").click()
    by_id(page, "prompt").clear()
    engine.fails_after = 2
    by_id(page, "prompt").send_keys("Hello", Keys.ENTER)
    wait_for_status(page, "Failed")
    assert "internal_error" in page.find_element(By.CSS_SELECTOR, ".message.error").text
    assert answers(page) == ["Breakfast"]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_hangs_over_the_edge(page: webdriver.Chrome, width: int, engine: FakeEngine, tmp_path: Path) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        engine.reply = "x" * 100
        by_id(page, "settings-button").click()
        by_id(page, "prompt").send_keys("y" * 200, Keys.ENTER)
        WebDriverWait(page, 10).until(lambda _: answers(page) == ["x" * 100])
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script("return document.documentElement.scrollHeight") <= 740
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
