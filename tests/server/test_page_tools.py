"""Functions on the chat page: the editor with its checks, calls as they arrive, results, and what follows."""

from __future__ import annotations

import pytest
from pagefake import PageServer, Reply
from pageuser import PageUser
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.page, pytest.mark.slow]
CALLS = [("get_hours", '{"place": "Castle"}'), ("get_price", '{"item": "ticket"}')]


def offer_example(user: PageUser) -> None:
    user.open_settings("Functions")
    user.click("Add an example")


def test_a_function_is_offered_called_and_answered(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(calls=CALLS[:1]), Reply("From 9 to 17.")]
    offer_example(user)
    user.ask("When is the castle open?")
    [tool] = page_server.bodies[0]["tools"]
    assert tool["function"]["name"] == "get_hours"
    assert tool["function"]["parameters"]["required"] == ["place"]
    assert page_server.bodies[0]["tool_choice"] == "auto"
    assert user.one(".call .name").text == "get_hours"
    assert user.one(".call pre").text == '{\n  "place": "Castle"\n}'
    assert user.one(".numbers").text.endswith("finish tool_calls")
    assert user.focused.get_attribute("aria-label") == "Result of get_hours"
    user.press("9-17")
    user.click("Send results")
    user.wait(lambda: "From 9 to 17." in user.answers)
    user.wait_idle()
    called = {"id": "call00000", "type": "function", "function": {"name": "get_hours", "arguments": CALLS[0][1]}}
    assert page_server.bodies[1]["messages"][1:] == [
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call00000", "name": "get_hours", "content": "9-17"},
    ]
    assert user.one(".call .result pre").text == "9-17"
    user.load()
    user.one("#conversations button").click()
    assert user.one(".call .result pre").text == "9-17"
    assert user.answers[-1] == "From 9 to 17."


def test_every_call_needs_its_result(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(calls=CALLS), Reply("Done.")]
    offer_example(user)
    user.ask("Both")
    fields = user.all(".call textarea")
    assert len(fields) == 2
    user.type("Something else", Keys.ENTER)
    assert user.status == "The function calls above wait for their results"
    assert user.focused == fields[0]
    user.press("one")
    user.click("Send results")
    assert user.focused == fields[1]
    assert len(page_server.bodies) == 1
    fields[1].send_keys("two", Keys.CONTROL, Keys.ENTER)
    user.wait(lambda: "Done." in user.answers)
    results = [message["content"] for message in page_server.bodies[1]["messages"] if message["role"] == "tool"]
    assert results == ["one", "two"]
    assert user.id("prompt").get_attribute("value") == "Something else"


def test_a_call_that_was_cut_gets_no_result(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(calls=CALLS[:1], finish="length"), Reply("Text.")]
    user.ask("When?")
    assert user.all(".call textarea") == []
    assert "The call is not whole" in user.one(".calls").text
    user.ask("Again")
    roles = [message["role"] for message in page_server.bodies[1]["messages"]]
    assert roles == ["user", "user"]  # half a call is no part of the conversation


def test_the_editor_says_what_is_wrong(user: PageUser, page_server: PageServer) -> None:
    offer_example(user)
    user.set("tool-0-name", "no spaces")
    assert "1 to 64 letters" in user.one("#tool-0-name + .problem").text
    assert user.id("tool-0-name").get_attribute("aria-invalid") == "true"
    user.set("tool-0-name", "fine_name")
    assert user.one("#tool-0-name + .problem").text == ""
    for text, problem in (
        ('{"type": "object"', "Not JSON"),
        ("[1]", "is an object"),
        ('{"type": "string"}', '"type" must be "object"'),
    ):
        user.set("tool-0-parameters", text)
        assert problem in user.one("#tool-0-parameters + .problem").text
    user.type("Hello", Keys.ENTER)
    assert user.focused == user.id("tool-0-parameters")
    assert user.status.startswith("Function 1: The arguments of a function")
    assert page_server.bodies == []
    user.one(".tool input[type=checkbox]").click()  # a function that is not offered may be wrong
    user.ask("")
    assert len(page_server.bodies) == 1
    assert "tools" not in page_server.bodies[0]


def test_names_are_unique_and_functions_can_be_removed(user: PageUser) -> None:
    offer_example(user)
    user.click("Add an example")
    assert "Another function has this name" in user.one("#tool-1-name + .problem").text
    user.click("Remove")
    assert len(user.all(".tool")) == 1
    assert user.one("#tool-0-name + .problem").text == ""
    assert user.focused.text == "Add a function"


CHOICES = {
    "No": "none",
    "It must": "required",
    "It must call get_hours": {"type": "function", "function": {"name": "get_hours"}},
}


@pytest.mark.parametrize("label", CHOICES)
def test_tool_choice(user: PageUser, page_server: PageServer, label: str) -> None:
    offer_example(user)
    user.choose("tool-choice", label)
    user.ask("Hello")
    assert page_server.bodies[0]["tool_choice"] == CHOICES[label]
    assert len(page_server.bodies[0]["tools"]) == 1


def test_a_choice_goes_with_its_function(user: PageUser, page_server: PageServer) -> None:
    offer_example(user)
    user.choose("tool-choice", "It must call get_hours")
    user.set("tool-0-name", "other")
    user.ask("Hello")
    assert page_server.bodies[0]["tool_choice"] == "auto"
