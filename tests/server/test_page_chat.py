"""The chat page: asking, stopping, asking again, editing, deleting, settings, formats, errors, keys."""

from __future__ import annotations

import pytest
from pagefake import PageServer, Reply
from pageuser import PageUser
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.page]


def said(server: PageServer, place: int = -1) -> list[tuple[str, str | None]]:
    return [(message["role"], message.get("content")) for message in server.bodies[place]["messages"]]


def test_a_question_is_answered_with_its_numbers(user: PageUser, page_server: PageServer) -> None:
    assert not user.id("send").is_enabled()
    user.ask("When does breakfast start?")
    assert user.answers == ["Breakfast is from 07:00 to 10:30."]
    [numbers] = user.texts(".numbers")
    for part in ("11 tokens", "tokens/s", "first after", "prompt 21 tokens, 16 of them cached", "seed 123456"):
        assert part in numbers
    assert numbers.endswith("finish stop")
    assert user.id("title").text == "When does breakfast start?"
    user.ask("And until when?")
    expected = [
        ("user", "When does breakfast start?"),
        ("assistant", "Breakfast is from 07:00 to 10:30."),
        ("user", "And until when?"),
    ]
    assert said(page_server) == expected
    body = page_server.bodies[0]
    assert body["stream_options"] == {"include_usage": True}
    assert body["temperature"] == 0.2
    assert "top_p" not in body  # what is empty is left to the server


def test_text_appears_while_it_is_written_and_stop_ends_it(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("**one** two three " * 50, waits_at=10), Reply("Again.")]
    user.type("Count", Keys.ENTER)
    user.wait(lambda: user.answers and "three" in user.answers[0])
    assert user.status == "Answering …"
    assert user.one(".streaming").get_attribute("aria-busy") == "true"
    assert user.one(".markdown strong").text == "one"
    user.id("stop").click()
    user.wait_idle()
    assert user.status == "Stopped"
    assert "stopped by you" in user.one(".numbers").text
    assert 0 < len(user.answers[0]) < 100
    user.wait(lambda: page_server.left == 1)
    user.ask("More")
    assert user.answers[1:] == ["Again."]
    assert said(page_server)[1][1].startswith("**one** two")


def test_escape_stops_and_a_stopped_answer_can_go_on(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("alpha beta gamma", waits_at=2), Reply(" and omega")]
    user.type("Letters", Keys.ENTER)
    user.wait(lambda: user.answers and "alpha" in user.answers[0])
    user.type(Keys.ESCAPE)
    user.wait_idle()
    begun = user.answers[0]
    user.click("Continue")
    user.wait(lambda: len(page_server.bodies) == 2)
    user.wait_idle()
    assert page_server.bodies[1]["messages"][-1] == {"role": "assistant", "content": begun, "prefix": True}
    assert user.answers == [f"{begun} and omega"]


def test_only_a_text_goes_on_and_as_text(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply('{"a": 1', finish="length"), Reply("Once upon", finish="length"), Reply(" a time.")]
    user.open_settings("Answer format")
    user.choose("format", "Any JSON object")
    user.ask("As JSON")
    assert "length" in user.one(".numbers").text
    assert "Continue" not in user.texts(".actions button")
    user.open_settings("Answer format")
    user.choose("format", "Free text")
    user.ask("As text")
    user.open_settings("Answer format", "Functions")
    user.choose("format", "Any JSON object")
    user.click("Add an example")
    user.press(Keys.ESCAPE)
    user.click("Continue")
    user.wait(lambda: len(page_server.bodies) == 3)
    user.wait_idle()
    assert user.answers[-1] == "Once upon a time."
    body = page_server.bodies[2]
    assert body["messages"][-1]["prefix"] is True
    assert not {"response_format", "tools", "tool_choice"} & set(body)
    user.ask("And now")
    assert {"response_format", "tools", "tool_choice"} <= set(page_server.bodies[3])


def test_a_schema_that_is_none_does_not_keep_a_text_from_going_on(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("Once upon", finish="length"), Reply(" a time.")]
    user.ask("A tale")
    user.open_settings("Answer format")
    user.choose("format", "JSON that fits a schema")
    user.press(Keys.ESCAPE)
    user.click("Continue")
    user.wait(lambda: user.answers == ["Once upon a time."])
    user.wait_idle()
    user.type("Data", Keys.ENTER)
    assert user.status.startswith("Answer format:")
    assert len(page_server.bodies) == 2


def test_regenerate_edit_delete_and_undo(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("First."), Reply("Second."), Reply("Third."), Reply("Fourth.")]
    user.ask("One")
    user.click("Regenerate")
    user.wait(lambda: user.answers == ["Second."])
    user.wait_idle()
    assert said(page_server) == [("user", "One")]
    user.id("undo").click()
    assert user.answers == ["First."]
    user.ask("Two")
    user.all(".message.user .actions button")[1].click()
    assert user.focused.get_attribute("value") == "One"
    user.press(" more", Keys.ENTER)
    user.wait(lambda: user.answers == ["Fourth."])
    user.wait_idle()
    assert user.questions == ["One more"]
    assert said(page_server) == [("user", "One more")]
    user.id("undo").click()
    assert (user.questions, user.answers) == (["One", "Two"], ["First.", "Third."])
    user.click("Delete", ".message.user:nth-child(1)")
    assert (user.questions, user.answers) == (["Two"], ["Third."])
    user.click("Delete", ".message.assistant")
    assert (user.questions, user.answers) == (["Two"], [])
    user.id("try-again").click()
    user.wait(lambda: user.answers == ["Fourth."])


def test_an_edit_can_be_given_up_and_the_last_question_is_edited_by_a_key(user: PageUser) -> None:
    user.ask("One")
    user.type(Keys.ARROW_UP)
    assert user.focused.get_attribute("value") == "One"
    user.focused.send_keys("X", Keys.SHIFT, Keys.ENTER, Keys.NULL, "Y")
    assert user.focused.get_attribute("value") == "OneX\nY"
    user.press(Keys.ESCAPE)
    assert (user.questions, len(user.answers)) == (["One"], 1)
    assert user.focused.text == "Edit"


def test_settings_are_sent_and_kept_for_the_next_chat(user: PageUser, page_server: PageServer) -> None:
    user.open_settings()
    user.set("system", "Answer in one word.")
    values = {
        "temperature": "0",
        "top_p": "0.9",
        "top_k": "40",
        "min_p": "0.05",
        "max_tokens": "3",
        "seed": "-7",
        "presence_penalty": "0.5",
        "frequency_penalty": "-0.5",
        "repetition_penalty": "1.1",
    }
    for name, value in values.items():
        user.set(name, value)
    user.set("stop-words", "END" + Keys.ENTER + "a\\nb")
    user.ask("Hello")
    body = page_server.bodies[0]
    assert {name: body[name] for name in values} == {name: float(value) for name, value in values.items()}
    assert body["stop"] == ["END", "a\nb"]
    assert said(page_server)[0] == ("system", "Answer in one word.")
    assert "cut at the longest allowed length" in user.one(".numbers").text
    assert "seed -7" in user.one(".numbers").text
    user.load()
    assert user.id("top_k").get_attribute("value") == "40"
    user.ask("Again")
    assert page_server.bodies[1]["top_k"] == 40


@pytest.mark.parametrize(("name", "value"), [("temperature", "3"), ("max_tokens", "99999"), ("top_k", "1.5")])
def test_a_wrong_number_is_shown_also_when_the_settings_are_closed(
    user: PageUser, page_server: PageServer, name: str, value: str
) -> None:
    user.open_settings()
    user.set(name, value)
    assert "Expected" in user.one(f"#{name} + .problem").text
    user.id("settings-close").click()
    user.type("Hello", Keys.ENTER)
    assert user.id("settings").is_displayed()
    assert user.focused == user.id(name)
    assert user.id("prompt").get_attribute("value") == "Hello"
    assert page_server.bodies == []


FORMATS = {
    "Any JSON object": (None, "", {"type": "json_object"}),
    "JSON that fits a schema": (
        "schema",
        '{"type": "object"}',
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
    ),
    "Text that fits a regular expression": ("regex", "[0-9]+", {"type": "regex", "regex": "[0-9]+"}),
}


@pytest.mark.parametrize("label", FORMATS)
def test_answer_formats(user: PageUser, page_server: PageServer, label: str) -> None:
    field, text, expected = FORMATS[label]
    page_server.replies = [Reply('{"*a*": "**1**"}')]
    user.open_settings("Answer format")
    user.choose("format", label)
    if field is not None:
        user.set(field, text)
    user.ask("Data")
    assert page_server.bodies[0]["response_format"] == expected
    assert user.answers == ['{"*a*": "**1**"}']  # as it was written, not as Markdown


def test_a_schema_that_is_none_is_not_sent(user: PageUser, page_server: PageServer) -> None:
    user.open_settings("Answer format")
    user.choose("format", "JSON that fits a schema")
    user.set("schema", '{"type": "object",}')
    assert "line 1 column 19" in user.id("schema-problem").text
    user.type("Data", Keys.ENTER)
    assert user.focused == user.id("schema")
    assert user.status.startswith("Answer format: Not JSON")
    assert page_server.bodies == []


def test_source_and_copy(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("**bold** and\n\n```py\nx = 1\n```")]
    user.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    user.ask("Code")
    assert user.one(".markdown strong").text == "bold"
    user.click("Copy", "figure.code")
    assert user.run("return window.copied") == "x = 1"
    user.click("Copy", ".message.assistant > .actions")
    assert user.run("return window.copied") == "**bold** and\n\n```py\nx = 1\n```"
    user.click("Source")
    assert user.answers == ["**bold** and\n\n```py\nx = 1\n```"]
    assert user.focused.text == "Formatted"
    user.press(Keys.ENTER)
    assert user.one(".markdown strong").text == "bold"


def test_errors_are_shown_as_received_with_a_way_to_try_again(user: PageUser, page_server: PageServer) -> None:
    full = {"message": "the queue is full", "code": "server_overloaded", "param": None}
    page_server.replies = [Reply(status=503, error=full), Reply("Here it is.", fails_after=2), Reply("At last.")]
    user.ask("Hello")
    assert user.status == "Failed"
    shown = user.one(".error")
    assert shown.get_attribute("role") == "alert"
    for part in ("the queue is full", "code server_overloaded", "status 503", "retry after 7 s", "request req-1"):
        assert part in shown.text
    user.click("Try again")
    user.wait(lambda: "it broke" in user.one(".error").text)
    user.wait_idle()
    assert user.answers == ["Here it"]
    assert "internal_error" in user.one(".error").text
    user.click("Try again")
    user.wait(lambda: user.answers == ["At last."])
    assert user.all(".error") == []
    assert said(page_server) == [("user", "Hello")]


def test_a_lost_connection_is_an_error(user: PageUser) -> None:
    user.run("window.fetch = async () => { throw new TypeError('Failed to fetch'); }")
    user.ask("Hello")
    assert "The server does not answer" in user.one(".error").text
    assert "no_connection" in user.one(".error").text


def test_an_empty_answer_leaves_the_question(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(""), Reply("Now.")]
    user.ask("Hello")
    assert user.status == "The model gave an empty answer"
    assert (user.questions, user.answers) == (["Hello"], [])
    user.id("try-again").click()
    user.wait(lambda: user.answers == ["Now."])


def test_a_model_is_chosen(user: PageUser, page_server: PageServer) -> None:
    page_server.models.append({"id": "desk", "parent": "fake", "max_model_len": 512})
    user.load()
    assert user.id("context").text == "8,192 tokens"
    user.choose("model", "desk (adapter of fake)")
    assert user.id("context").text == "512 tokens"
    user.ask("Hello")
    user.load()
    user.ask("Again")
    assert [body["model"] for body in page_server.bodies] == ["desk", "desk"]


def test_a_key_is_asked_for_and_forgotten(user: PageUser, page_server: PageServer) -> None:
    page_server.key = "secret"
    user.load("This server asks for a key")
    assert user.focused == user.id("key")
    user.press("wrong", Keys.ENTER)
    user.wait_status("This server asks for a key")
    user.set("key", "secret" + Keys.ENTER)
    user.wait_status("Ready")
    user.ask("Hello")
    assert len(user.answers) == 1
    kept = user.run("return JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie")
    assert "Hello" in kept
    assert "secret" not in kept
    user.load("This server asks for a key")


def test_an_answer_goes_on_while_another_conversation_is_shown(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("alpha beta gamma", waits_at=2)]
    user.type("First", Keys.ENTER)
    user.wait(lambda: user.answers and "alpha" in user.answers[0])
    user.id("new-chat").click()
    assert user.answers == []
    assert user.status == "Answering in “First”"
    user.one("#conversations button").click()
    user.wait(lambda: "alpha" in user.answers[0])
    user.id("new-chat").click()
    page_server.go.set()
    user.wait_idle()
    user.one("#conversations button").click()
    assert user.answers == ["alpha beta gamma"]


def test_screen_readers_hear_whole_blocks_once(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("First part.\n\nSecond part,\nwith a line.\n\nThird.", delay_s=0.01)]
    user.ask("Hello")
    heard = user.run("return [...document.querySelectorAll('#announcer p')].map((each) => each.textContent)")
    assert heard == ["First part.", "Second part,with a line.", "Third."]
    assert user.id("announcer").get_attribute("aria-live") == "polite"


def test_an_example_is_one_click(user: PageUser, page_server: PageServer) -> None:
    example = user.all("#examples button")[1]
    question = example.text
    example.click()
    user.wait_idle()
    assert said(page_server) == [("user", question)]
    assert not user.id("welcome").is_displayed()
