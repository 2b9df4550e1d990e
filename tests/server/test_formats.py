"""Constrained output: what the engine is told for each response_format and tool_choice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from checks import check_error
from fake import MESSAGES, FakeEngine, FakeGrammar, listening, wait_until

from mixtral.errors import MixtralError
from mixtral.server.errors import ApiError
from mixtral.server.formats import Form, constraint
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint

Chat = Callable[..., httpx.Response]
TOOL = {"type": "function", "function": {"name": "get_hours", "parameters": {"type": "object"}, "strict": True}}
OTHER = {"type": "function", "function": {"name": "other"}}
NAMED = {"type": "function", "function": {"name": "other"}}
FORMATS: list[dict[str, Any]] = [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}},
    {"type": "regex", "regex": "a+"},
    {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /a/"}},
    {"type": "choice", "choice": ["yes", "no"]},
]
TRIGGER = 5


def calls(*names: str, name: str | None = None, parallel: bool = True) -> str:
    return json.dumps({"names": list(names), "name": name, "parallel": parallel})


# fields -> the constraint
CASES: list[tuple[dict[str, Any], Constraint]] = [
    ({}, Constraint(trigger=TRIGGER)),
    ({"response_format": {"type": "text"}}, Constraint(trigger=TRIGGER)),
    ({"tools": [TOOL], "tool_choice": "none"}, Constraint(trigger=TRIGGER)),
    ({"tools": [TOOL]}, Constraint(trigger=TRIGGER, calls=calls("get_hours"))),
    ({"tools": [TOOL], "tool_choice": "auto"}, Constraint(trigger=TRIGGER, calls=calls("get_hours"))),
    *(
        ({"tools": [TOOL, OTHER], "tool_choice": choice}, Constraint(trigger=TRIGGER, calls=both, forced=True))
        for choice in ("required", "any")
        for both in (calls("get_hours", "other"),)
    ),
    (
        {"tools": [TOOL, OTHER], "tool_choice": NAMED},
        Constraint(trigger=TRIGGER, calls=calls("get_hours", "other", name="other"), forced=True),
    ),
    (
        {"tools": [TOOL], "parallel_tool_calls": False},
        Constraint(trigger=TRIGGER, calls=calls("get_hours", parallel=False)),
    ),
    *(({"response_format": each}, Constraint(trigger=TRIGGER, text=json.dumps(each))) for each in FORMATS),
    (
        {"response_format": FORMATS[0], "tools": [TOOL]},
        Constraint(trigger=TRIGGER, text=json.dumps(FORMATS[0]), calls=calls("get_hours")),
    ),
]


@pytest.mark.parametrize(("fields", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_the_engine_is_told(
    chat: Chat, engine: FakeEngine, grammar: FakeGrammar, fields: dict[str, Any], expected: Constraint
) -> None:
    assert chat(**fields).status_code == 200
    assert engine.submits[-1].constraint == expected
    assert grammar.tried == [text for text in (expected.text, expected.calls) if text is not None]


@pytest.mark.parametrize("each", FORMATS, ids=lambda value: value["type"])
def test_completions_have_formats_too(complete: Chat, engine: FakeEngine, each: dict[str, Any]) -> None:
    assert complete(response_format=each).status_code == 200
    assert engine.submits[-1].constraint == Constraint(trigger=TRIGGER, text=json.dumps(each), continues=True)
    assert complete().status_code == 200
    assert engine.submits[-1].constraint is None  # raw text may hold any token


def test_the_tools_stay_in_the_prompt_whatever_is_chosen(chat: Chat, engine: FakeEngine) -> None:
    for choice in ("none", "auto", "required"):
        chat(tools=[TOOL], tool_choice=choice)
    assert engine.prompts[0] == engine.prompts[1] == engine.prompts[2]
    chat()
    assert len(engine.prompts[3]) < len(engine.prompts[0])


def test_v1_has_formats_but_no_calls(chat: Chat, engine: FakeEngine) -> None:
    engine.tokenizer = Tokenizer.from_version("v1")
    engine.vocab_size = engine.tokenizer.vocab_size
    assert chat(response_format=FORMATS[0]).status_code == 200
    assert engine.submits[-1].constraint == Constraint(text=json.dumps(FORMATS[0]))
    assert chat().status_code == 200
    assert engine.submits[-1].constraint is None
    for choice in ("auto", "none", "required"):
        check_error(chat(tools=[TOOL], tool_choice=choice), 400, "tools_not_supported", "tools")


def test_a_continued_message_does_not_become_a_call(chat: Chat, engine: FakeEngine) -> None:
    prefix = [*MESSAGES, {"role": "assistant", "content": "At", "prefix": True}]
    assert chat(tools=[TOOL], messages=prefix).status_code == 200
    assert engine.submits[-1].constraint == Constraint(trigger=TRIGGER, continues=True)


@pytest.mark.parametrize("each", FORMATS, ids=lambda value: value["type"])
def test_a_continued_message_has_no_format(chat: Chat, engine: FakeEngine, each: dict[str, Any]) -> None:
    """The format would be that of what is added, and the message would be of none."""
    prefix = [*MESSAGES, {"role": "assistant", "content": "{", "prefix": True}]
    response = chat(messages=prefix, response_format=each)
    check_error(response, 400, "unsupported_combination", "response_format")
    assert engine.opened == 0
    assert chat(messages=prefix, response_format={"type": "text"}).status_code == 200


@pytest.mark.parametrize(
    "code", ["schema_invalid", "schema_unsupported", "regex_invalid", "grammar_invalid", "grammar_too_complex"]
)
@pytest.mark.parametrize("method", ["text_constraint", "calls_constraint", "check"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_grammar_refuses_is_a_400(
    chat: Chat, engine: FakeEngine, grammar: FakeGrammar, code: str, method: str, stream: bool
) -> None:
    grammar.fails, grammar.error = method, MixtralError("keyword 'x' is not known", param="tools[0].x", code=code)
    response = chat(tools=[TOOL], response_format=FORMATS[1], stream=stream)
    check_error(response, 400, code, "tools[0].x")
    assert "keyword 'x'" in response.text
    assert engine.opened == 0


def test_other_errors_of_the_grammar_stay_inside(chat: Chat, grammar: FakeGrammar) -> None:
    grammar.fails, grammar.error = "check", RuntimeError("secret")
    response = chat(response_format=FORMATS[0])
    check_error(response, 500, "internal_error", None)
    assert "secret" not in response.text


def test_a_grammar_that_has_no_time_is_a_503(chat: Chat, grammar: FakeGrammar) -> None:
    grammar.fails, grammar.error = "check", MixtralError("busy", code="server_overloaded")
    check_error(chat(response_format=FORMATS[0]), 503, "server_overloaded", None)


def test_slow_trials_hold_up_nobody_else(engine: FakeEngine, grammar: FakeGrammar) -> None:
    grammar.hold = threading.Event()
    body = {"model": "fake", "messages": MESSAGES}
    with listening(engine, grammar=grammar) as address, ThreadPoolExecutor(max_workers=12) as pool:
        slow = [
            pool.submit(
                httpx.post, f"{address}/v1/chat/completions", json={**body, "response_format": FORMATS[0]}, timeout=60
            )
            for _ in range(12)
        ]
        wait_until(lambda: len(grammar.tried) >= 8)
        try:
            assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30).status_code == 200
            assert not any(each.done() for each in slow)
        finally:
            grammar.hold.set()
        assert [each.result().status_code for each in slow] == [200] * 12


def test_without_a_grammar_nothing_is_promised() -> None:
    tokenizer = Tokenizer.from_version("v3")
    for form, param in (
        (Form(text=FORMATS[0]), "response_format"),
        (Form(tools=[TOOL], choice="required"), "tool_choice"),
        (Form(tools=[TOOL], choice="named", name="get_hours"), "tool_choice"),
        (Form(tools=[TOOL], choice="auto", parallel=False), "parallel_tool_calls"),
    ):
        with pytest.raises(ApiError, match="without constrained output") as caught:
            constraint(form, tokenizer, None, continues=False)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    assert constraint(Form(tools=[TOOL], choice="auto"), tokenizer, None, continues=False) == (None, [])
