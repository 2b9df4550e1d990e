"""Every field has an effect or is a 400 that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from checks import check_error
from fake import CONTEXT, MESSAGES, FakeEngine

from mixtral.limits import CHAT, COMPLETIONS, REFUSED, Limit
from mixtral.wire import SamplingParams

Chat = Callable[..., httpx.Response]
TOOL = {"type": "function", "function": {"name": "get_hours", "parameters": {"type": "object"}}}
TWICE = [TOOL, TOOL]
NAMED = {"type": "function", "function": {"name": "get_hours"}}
NAMED_OTHER = {"type": "function", "function": {"name": "other"}}
LONG_DESCRIPTION = {"type": "function", "function": {"name": "a", "description": "d" * 8193}}
STRICT = "tools[0].function.strict"
JSON = {"type": "json_object"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "a", "arguments": "{}"}}
MANY_CALLS = {"role": "assistant", "tool_calls": [{**CALL, "id": f"{n:09}"} for n in range(129)]}
PREFIX = [*MESSAGES, {"role": "assistant", "content": "At", "prefix": True}]
BAD_NAME = {"type": "function", "function": {"name": "a b"}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]


def messages(**changes: Any) -> list[dict[str, Any]]:
    return [{**MESSAGES[0], **changes}]


def schema(**changes: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, **changes}}


def lark(**changes: Any) -> dict[str, Any]:
    return {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /a/", **changes}}


# fields, status, code, param
BAD_CHATS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": None}, "missing_required_parameter", "model"),
    ({"model": 7}, "invalid_type", "model"),
    ({"messages": None}, "missing_required_parameter", "messages"),
    ({"messages": "hello"}, "invalid_type", "messages"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [7]}, "invalid_messages", "messages[0]"),
    ({"messages": MESSAGES * 4097}, "invalid_value", "messages"),
    ({"messages": messages(role="robot")}, "invalid_messages", "messages[0].role"),
    ({"messages": messages(role=None)}, "invalid_messages", "messages[0].role"),
    ({"messages": messages(content=None)}, "invalid_messages", "messages[0].content"),
    ({"messages": messages(content=5)}, "invalid_messages", "messages[0].content"),
    ({"messages": messages(name="Ann")}, "invalid_messages", "messages[0].name"),
    ({"messages": messages(weight=0)}, "unknown_parameter", "messages[0].weight"),
    ({"messages": messages(content=[{"type": "text", "text": "a"}] * 257)}, "invalid_messages", "messages[0].content"),
    ({"messages": [*MESSAGES, MANY_CALLS]}, "invalid_messages", "messages[1].tool_calls"),
    ({"messages": IMAGE}, "invalid_messages", "messages[0].content[0].type"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, "invalid_messages", "messages[1].role"),
    (
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]},
        "invalid_messages",
        "messages[0].tool_call_id",
    ),
    ({"messages": messages(content="a " * CONTEXT)}, "context_length_exceeded", "messages"),
    ({"max_tokens": CONTEXT}, "context_length_exceeded", "messages"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": -3}, "invalid_value", "max_tokens"),
    ({"max_tokens": 10**30}, "invalid_value", "max_tokens"),
    ({"max_tokens": 1.0}, "invalid_type", "max_tokens"),
    ({"max_tokens": True}, "invalid_type", "max_tokens"),
    ({"max_completion_tokens": "5"}, "invalid_type", "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "unsupported_combination", "max_completion_tokens"),
    ({"temperature": 2.5}, "invalid_value", "temperature"),
    ({"temperature": -0.1}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"temperature": True}, "invalid_type", "temperature"),
    ({"top_p": 1.01}, "invalid_value", "top_p"),
    ({"min_p": -1}, "invalid_value", "min_p"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"top_k": 2.0}, "invalid_type", "top_k"),
    ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": 5}, "invalid_type", "stop"),
    ({"stop": ["a", None]}, "invalid_type", "stop[1]"),
    ({"stop": ["a", "é" * 513]}, "invalid_value", "stop[1]"),
    ({"stop": ["a"] * 17}, "invalid_value", "stop"),
    ({"logprobs": 1}, "invalid_type", "logprobs"),
    ({"top_logprobs": 3}, "unsupported_combination", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "unsupported_combination", "stream_options"),
    ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "unknown_parameter", "stream_options.usage"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "unsupported_parameter",
        "stream_options.include_obfuscation",
    ),
    ({"user": 5}, "invalid_type", "user"),
    ({"user": ""}, "invalid_value", "user"),
    ({"user": "u" * 129}, "invalid_value", "user"),
    ({"tools": {}}, "invalid_type", "tools"),
    ({"tools": TWICE}, "invalid_messages", "tools[1].function.name"),
    ({"tools": [BAD_NAME]}, "invalid_messages", "tools[0].function.name"),
    ({"tools": [BAD_NAME], "tool_choice": "none"}, "invalid_messages", "tools[0].function.name"),
    ({"tools": [TOOL] * 129}, "invalid_value", "tools"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "invalid_value", "tool_choice"),
    ({"store": True}, "unsupported_parameter", "store"),
    ({"metadata": {"a": "b"}}, "unsupported_parameter", "metadata"),
    ({"functions": [{}]}, "unsupported_parameter", "functions"),
    ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "missing_required_parameter", "tool_choice.function"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "invalid_value", "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": NAMED_OTHER}, "unsupported_combination", "tool_choice.function.name"),
    ({"tools": [TOOL], "tool_choice": {**NAMED, "x": 1}}, "unknown_parameter", "tool_choice.x"),
    ({"tool_choice": "required"}, "unsupported_combination", "tool_choice"),
    ({"tool_choice": NAMED}, "unsupported_combination", "tool_choice.function.name"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": JSON}, "unsupported_combination", "tool_choice"),
    ({"tools": [TOOL], "messages": PREFIX, "tool_choice": "any"}, "unsupported_combination", "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}, "invalid_messages", STRICT),
    ({"tools": [LONG_DESCRIPTION]}, "invalid_value", "tools[0].function.description"),
    ({"parallel_tool_calls": 0}, "invalid_type", "parallel_tool_calls"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 65}, "invalid_value", "n"),
    ({"n": True}, "invalid_type", "n"),
    ({"n": 1.0}, "invalid_type", "n"),
    ({"priority": "high"}, "invalid_type", "priority"),
    ({"priority": 2**31}, "invalid_value", "priority"),
    ({"min_tokens": -1}, "invalid_value", "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "unsupported_combination", "min_tokens"),
    ({"min_tokens": 9, "tools": [TOOL]}, "unsupported_combination", "min_tokens"),
    ({"ignore_eos": True, "response_format": JSON}, "unsupported_combination", "ignore_eos"),
    ({"ignore_eos": "yes"}, "invalid_type", "ignore_eos"),
    ({"stop": "a", "response_format": JSON}, "unsupported_combination", "stop"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"05": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"٥": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"32768": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
    ({"logit_bias": {"5": True}}, "invalid_type", "logit_bias.5"),
    ({"logit_bias": {str(id): 1 for id in range(1025)}}, "invalid_value", "logit_bias"),
    ({"logit_bias": []}, "invalid_type", "logit_bias"),
    ({"response_format": {}}, "missing_required_parameter", "response_format.type"),
    ({"response_format": "json"}, "invalid_type", "response_format"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "unknown_parameter", "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
    ({"response_format": schema(name="a b")}, "invalid_value", "response_format.json_schema.name"),
    ({"response_format": schema(schema=None)}, "missing_required_parameter", "response_format.json_schema.schema"),
    ({"response_format": schema(schema=[])}, "invalid_type", "response_format.json_schema.schema"),
    ({"response_format": schema(strict=1)}, "invalid_type", "response_format.json_schema.strict"),
    ({"response_format": schema(more=1)}, "unknown_parameter", "response_format.json_schema.more"),
    ({"response_format": {"type": "regex", "regex": ""}}, "invalid_value", "response_format.regex"),
    ({"response_format": {"type": "regex", "regex": "a" * 4097}}, "invalid_value", "response_format.regex"),
    ({"response_format": {"type": "choice", "choice": []}}, "invalid_value", "response_format.choice"),
    ({"response_format": {"type": "choice", "choice": ["a", 5]}}, "invalid_type", "response_format.choice[1]"),
    ({"response_format": lark(syntax="gbnf")}, "invalid_value", "response_format.grammar.syntax"),
    ({"response_format": lark(definition="")}, "invalid_value", "response_format.grammar.definition"),
    ({"guided_json": {"type": "object"}}, "unsupported_parameter", "guided_json"),
    ({"structured_outputs": {"json": {}}}, "unsupported_parameter", "structured_outputs"),
    ({"mixtral": 5}, "invalid_type", "mixtral"),
    ({"mixtral": {"routing": "all"}}, "invalid_value", "mixtral.routing"),
    ({"mixtral": {"route": "all"}}, "unknown_parameter", "mixtral.route"),
    ({"mixtral": {"layers": [4]}}, "invalid_value", "mixtral.layers[0]"),
    ({"mixtral": {"layers": [1, 1]}}, "invalid_value", "mixtral.layers[1]"),
    ({"mixtral": {"layers": 1}}, "invalid_type", "mixtral.layers"),
    ({"mixtral": {"prompt": 1}}, "invalid_type", "mixtral.prompt"),
    ({"mixtral": {"routing": "experts"}, "n": 64}, "invalid_value", "mixtral.routing"),
    ({"prompt_cache_key": ""}, "invalid_value", "prompt_cache_key"),
    ({"safety_identifier": 5}, "invalid_type", "safety_identifier"),
    ({"echo": True}, "unknown_parameter", "echo"),
    ({"prompt": "x"}, "unknown_parameter", "prompt"),
    ({"max_token": 1}, "unknown_parameter", "max_token"),
    ({"__class__": 1}, "unknown_parameter", "__class__"),
    ({"": None}, "unknown_parameter", ""),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "missing_required_parameter", "prompt"),
    ({"prompt": 5}, "invalid_type", "prompt"),
    ({"prompt": {}}, "invalid_type", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
    ({"prompt": ["a", 5]}, "invalid_type", "prompt"),
    ({"prompt": [5, "a"]}, "invalid_type", "prompt[1]"),
    ({"prompt": [5, True]}, "invalid_type", "prompt[1]"),
    ({"prompt": [5, 32768]}, "invalid_value", "prompt[1]"),
    ({"prompt": [[5], [-1]]}, "invalid_value", "prompt[1][0]"),
    ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
    ({"prompt": [5] * CONTEXT}, "context_length_exceeded", "prompt"),
    ({"logprobs": 6}, "invalid_value", "logprobs"),
    ({"logprobs": True}, "invalid_type", "logprobs"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    ({"best_of": 2}, "unsupported_combination", "best_of"),
    ({"echo": True, "stream": True}, "unsupported_combination", "echo"),
    ({"echo": 1}, "invalid_type", "echo"),
    ({"max_tokens": 0}, "unsupported_combination", "max_tokens"),
    ({"prompt": ["a"] * 65, "n": 2}, "unsupported_combination", "n"),
    ({"tools": [TOOL]}, "unknown_parameter", "tools"),
    ({"messages": MESSAGES}, "unknown_parameter", "messages"),
    ({"max_completion_tokens": 5}, "unknown_parameter", "max_completion_tokens"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_a_bad_chat_is_a_400_that_names_the_field(
    chat: Chat, engine: FakeEngine, fields: dict[str, Any], code: str, param: str
) -> None:
    check_error(chat(**fields), 400, code, param)
    assert engine.opened == 0


@pytest.mark.parametrize(("fields", "code", "param"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_a_bad_completion_is_a_400_that_names_the_field(
    complete: Chat, engine: FakeEngine, fields: dict[str, Any], code: str, param: str
) -> None:
    check_error(complete(**fields), 400, code, param)
    assert engine.opened == 0


def test_the_context_error_has_both_numbers(chat: Chat) -> None:
    message = chat(max_tokens=500, messages=messages(content="a " * 100)).json()["error"]["message"]
    assert "max_tokens 500" in message
    assert f"context of this model is {CONTEXT} tokens" in message


def test_an_unknown_field_comes_with_a_suggestion(chat: Chat) -> None:
    assert "did you mean 'max_tokens'?" in chat(max_token=1).json()["error"]["message"]


def test_long_and_odd_values_are_cut_and_escaped(chat: Chat) -> None:
    error = chat(user=["\x1b[31m" + "x" * 100_000]).json()["error"]
    assert len(error["message"]) < 200
    assert "\x1b" not in error["message"]
    check_error(chat(**{"k" * 100_000: 1}), 400, "unknown_parameter", "k" * 256)


def test_an_unknown_model_is_a_404(chat: Chat, complete: Chat, engine: FakeEngine) -> None:
    for response in (chat(model="gpt-9"), complete(model="../fake")):
        check_error(response, 404, "model_not_found", "model")
    assert engine.opened == 0


@pytest.mark.parametrize("name", [*REFUSED, *CHAT, *COMPLETIONS])
def test_null_and_values_that_ask_for_nothing_change_nothing(
    chat: Chat, complete: Chat, engine: FakeEngine, name: str
) -> None:
    for call, fields in ((chat, CHAT), (complete, COMPLETIONS)):
        if name in fields and fields[name].required:
            continue
        if name in REFUSED and name not in fields:
            values = [None, {}, [], *REFUSED[name].no_ops]
        else:
            values = [None] if name in fields else []
        for value in values:
            assert call(**{"seed": 7, name: value}).status_code == 200, (name, value)
    default = SamplingParams()
    for params in engine.params:
        for field in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logprobs"):
            assert getattr(params, field) == getattr(default, field)


@pytest.mark.parametrize("name", REFUSED)
def test_what_other_servers_have_is_refused_with_a_hint(chat: Chat, complete: Chat, name: str) -> None:
    for call, fields in ((chat, CHAT), (complete, COMPLETIONS)):
        if name not in fields:
            for value in ("x", 7.5, [7]):
                response = call(**{name: value})
                check_error(response, 400, "unsupported_parameter", name)
                assert REFUSED[name].hint in response.json()["error"]["message"]


# field -> (value, what the engine then has)
EFFECTS = {
    "max_tokens": (3, {"max_tokens": 3}),
    "temperature": (0, {"temperature": 0.0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (-1, {"top_k": 0}),
    "min_p": (0.25, {"min_p": 0.25}),
    "presence_penalty": (1.5, {"presence_penalty": 1.5}),
    "frequency_penalty": (-1.5, {"frequency_penalty": -1.5}),
    "repetition_penalty": (1.25, {"repetition_penalty": 1.25}),
    "seed": (-(2**63), {"seed": -(2**63)}),
    "min_tokens": (2, {"min_tokens": 2}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "logit_bias": ({"0": -100, "32767": 1.5}, {"logit_bias": {0: -100.0, 32767: 1.5}}),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_sampling_fields_reach_the_engine(chat: Chat, complete: Chat, engine: FakeEngine, name: str) -> None:
    value, expected = EFFECTS[name]
    for call in (chat, complete):
        assert call(**{name: value}).status_code == 200
        assert {field: getattr(engine.params[-1], field) for field in expected} == expected


# Fields whose effect another test shows.
ELSEWHERE = {
    *("model", "messages", "prompt", "tools", "tool_choice", "parallel_tool_calls", "response_format", "stop"),
    *("logprobs", "top_logprobs", "stream", "stream_options", "user", "safety_identifier", "max_completion_tokens"),
    *("n", "priority", "prompt_cache_key", "mixtral", "echo", "best_of"),
}


def test_every_accepted_field_is_tested_for_its_effect() -> None:
    assert {*CHAT, *COMPLETIONS} - set(EFFECTS) == ELSEWHERE


EDGES = [
    (route, name, limit)
    for route, fields in (("chat", CHAT), ("complete", COMPLETIONS))
    for name, limit in fields.items()
    if limit.kind in ("integer", "number") and name not in ("top_logprobs", "best_of")
]


@pytest.mark.parametrize(("route", "name", "limit"), EDGES, ids=lambda value: value if isinstance(value, str) else "")
def test_numbers_are_held_to_the_table(chat: Chat, complete: Chat, route: str, name: str, limit: Limit) -> None:
    call = chat if route == "chat" else complete
    step = 1 if limit.kind == "integer" else 1e-6
    for bound, beyond in ((limit.low, -step), (limit.high, step)):
        response = call(**{name: bound})
        if response.status_code != 200:  # other rules may forbid it, but not its range
            assert response.json()["error"]["code"] not in ("invalid_value", "invalid_type"), response.text
        check_error(call(**{name: (bound or 0) + beyond}), 400, "invalid_value", name)
    for wrong in (True, "1", [1], {"a": 1}, *([1.5, 1.0, -0.0] if limit.kind == "integer" else [])):
        check_error(call(**{name: wrong}), 400, "invalid_type", name)
    for literal in ("NaN", "Infinity", "-Infinity", "1e400", "-1e400"):
        response = call(**{name: "MARK"}, mark=literal)
        check_error(response, 400, "invalid_json", None)


@pytest.mark.parametrize(
    ("route", "name", "kind"),
    [
        (route, name, limit.kind)
        for route, fields in (("chat", CHAT), ("complete", COMPLETIONS))
        for name, limit in fields.items()
    ],
)
def test_other_types_are_refused(chat: Chat, complete: Chat, route: str, name: str, kind: str) -> None:
    values = {"integer": 5, "number": 0.5, "boolean": True, "string": "x", "list": [[None]], "object": {"zzz": 1}}
    limit = (CHAT if route == "chat" else COMPLETIONS)[name]
    for other, value in values.items():
        if other not in (kind, *limit.also) and not (kind == "number" and other == "integer"):
            check_error((chat if route == "chat" else complete)(**{name: value}), 400, "invalid_type", name)


def test_top_k_is_handed_on(chat: Chat, engine: FakeEngine) -> None:
    assert chat(top_k=40).status_code == 200
    assert engine.params[0].top_k == 40


def test_max_completion_tokens_is_max_tokens(chat: Chat, engine: FakeEngine) -> None:
    assert chat(max_completion_tokens=4).json()["usage"]["completion_tokens"] == 4
    assert chat(max_completion_tokens=4, max_tokens=4).status_code == 200
    assert [params.max_tokens for params in engine.params] == [4, 4]


def test_without_max_tokens_there_is_a_default(chat: Chat, complete: Chat, engine: FakeEngine) -> None:
    chat()
    complete()
    assert engine.params[0].max_tokens == CONTEXT - len(engine.prompts[0])
    assert engine.params[1].max_tokens == 16
    engine.context = 8192
    chat()
    assert engine.params[2].max_tokens == 4096


def test_the_seed_is_drawn_and_told(chat: Chat, engine: FakeEngine) -> None:
    first, second, fixed = chat(), chat(), chat(seed=-5)
    seeds = [str(params.seed) for params in engine.params]
    assert [response.headers["x-mixtral-seed"] for response in (first, second, fixed)] == seeds
    assert seeds[0] != seeds[1]
    assert seeds[2] == "-5"


def test_the_user_is_logged_as_a_hash(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mixtral.server"):
        response = chat(user="ann@post.example")
    lines = [line for line in caplog.messages if response.headers["x-request-id"] in line]
    assert any(": user " in line for line in lines)
    assert "ann@post.example" not in caplog.text


def test_tools_need_a_vocabulary_with_calls(chat: Chat, engine: FakeEngine) -> None:
    engine.tokenizer = FakeEngine(version="v1").tokenizer
    check_error(chat(tools=[TOOL]), 400, "tools_not_supported", "tools")
    assert chat().status_code == 200


def test_history_with_calls_is_encoded(chat: Chat, engine: FakeEngine) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_hours", "arguments": "{}"}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"open": "07:00"})},
    ]
    assert chat(messages=history, tools=[TOOL]).status_code == 200
    for name in ("[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"):
        assert engine.tokenizer.control_id(name) in engine.prompts[0]


def test_an_answer_can_be_continued(chat: Chat, engine: FakeEngine) -> None:
    prefix = [*MESSAGES, {"role": "assistant", "content": "At", "prefix": True}]
    assert chat(messages=prefix).json()["choices"][0]["message"]["content"].startswith(" Breakfast")
    assert engine.prompts[0][-1] == engine.tokenizer.encode("At")[-1]
    assert chat().json()["choices"][0]["message"]["content"].startswith("Breakfast")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Once", [[1, 7450]]),
        ("", [[1]]),
        ([5, 6], [[5, 6]]),
        (["Once", ""], [[1, 7450], [1]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts_are_texts_or_ids(complete: Chat, engine: FakeEngine, prompt: Any, expected: list[list[int]]) -> None:
    encode = engine.tokenizer.encode
    wanted = [encode("Once", bos=True) if ids == [1, 7450] else ids for ids in expected]
    body = complete(prompt=prompt, max_tokens=2).json()
    assert engine.prompts == wanted
    assert [choice["index"] for choice in body["choices"]] == list(range(len(wanted)))
    assert body["usage"] == {
        "prompt_tokens": sum(map(len, wanted)),
        "completion_tokens": 2 * len(wanted),
        "total_tokens": sum(map(len, wanted)) + 2 * len(wanted),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
