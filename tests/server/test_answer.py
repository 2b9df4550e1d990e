"""Pieces of an answer: streamed or whole, the same text, tokens and calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from checks import check_error, events
from fake import CALL, MESSAGES, FakeEngine, calling
from threaded import ThreadEngine

from mixtral.server import ServerConfig
from mixtral.server.answer import Answer, Piece, joined
from mixtral.server.errors import ApiError
from mixtral.server.replies import ChatReply
from mixtral.tokenizer import Tokenizer
from mixtral.wire import TokenEvent

Chat = Callable[..., httpx.Response]
TOOL = {"type": "function", "function": {"name": "get_hours", "parameters": {"type": "object"}}}
TEXTS = [
    "Breakfast is from 07:00 to 10:30.",
    "  two spaces first, a\u2028line separator and a NUL \x00",
    "Das Frühstück gibt es ab 7 Uhr. 早餐七点开始 🥐🇮🇹",
    "[TOOL_CALLS] [INST] </s> are words here",
    "",
]


def push(answer: Answer, ids: Sequence[int], *, last: str = "stop", logprob: float | None = -0.5) -> list[Piece]:
    """The pieces of all ids; the last one carries the finish reason."""
    return [
        answer.push(
            TokenEvent(sequence=0, id=id, logprob=logprob, finish_reason=last if place == len(ids) - 1 else None)
        )
        for place, id in enumerate(ids)
    ]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("fields", [{}, {"stop": ["Uhr", "and a", "are "]}, {"logprobs": True, "top_logprobs": 2}])
def test_streamed_deltas_equal_the_whole_answer(
    chat: Chat, engine: FakeEngine, version: str, text: str, fields: dict[str, Any]
) -> None:
    engine.tokenizer = Tokenizer.from_version(version)
    engine.vocab_size = engine.tokenizer.vocab_size
    engine.reply = text
    whole = chat(seed=1, **fields).json()
    stream = events(chat(seed=1, stream=True, stream_options={"include_usage": True}, **fields))
    assert stream.pop() == "[DONE]"
    last = stream.pop()
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in stream)
    assert {(event["id"], event["created"], event["model"]) for event in [*stream, last]} == {
        (last["id"], last["created"], "fake")
    }
    choices = [event["choices"][0] for event in stream]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert (
        "".join(choice["delta"].get("content", "") for choice in choices) == whole["choices"][0]["message"]["content"]
    )
    assert [choice["finish_reason"] for choice in choices][:-1] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"] == "stop"
    listed = [token for choice in choices for token in (choice["logprobs"] or {"content": []})["content"]]
    assert listed == (whole["choices"][0]["logprobs"] or {"content": []})["content"]
    expected = text
    for word in fields.get("stop", []):
        expected = expected.split(word)[0]
    assert whole["choices"][0]["message"]["content"] == expected
    if "logprobs" in fields:
        assert b"".join(bytes(token["bytes"]) for token in listed) == (f" {text}" if text else "").encode()


def test_stop_strings_cut_text_tokens_and_count() -> None:
    tokenizer = Tokenizer.from_version("v3")
    ids = tokenizer.encode("one two three four five", eos=True)
    answer = Answer(tokenizer, stop=["four", "two thr"])
    pieces = push(answer, ids)
    assert "".join(piece.text for piece in pieces) == "one "
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert (
        b"".join(token.surface for piece in pieces for token in piece.tokens) == b" one two"
    )  # "two" lost its end only
    assert answer.completion_tokens == 3
    assert answer.finished


def test_an_earlier_part_of_a_stop_string_is_given_out_when_it_turns_out_not_to_be_one() -> None:
    tokenizer = Tokenizer.from_version("v3")
    pieces = push(Answer(tokenizer, stop=["two four"]), tokenizer.encode("one two three", eos=True))
    assert "".join(piece.text for piece in pieces) == "one two three"
    pieces = push(Answer(tokenizer, stop=["two four"]), tokenizer.encode("one two"), last="length")
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == ("one two", "length")
    assert b"".join(token.surface for piece in pieces for token in piece.tokens) == b" one two"


def test_offsets_count_characters(complete: Chat, engine: FakeEngine) -> None:
    engine.reply = "né à Été 🥐."
    choice = complete(logprobs=0, max_tokens=40).json()["choices"][0]
    listed = choice["logprobs"]
    assert choice["text"] == " né à Été 🥐."
    assert all(place <= len(choice["text"]) for place in listed["text_offset"])
    assert listed["tokens"][-1] == "</s>"  # every sampled token is listed
    for token, offset in zip(listed["tokens"][:-1], listed["text_offset"], strict=False):
        if "\ufffd" not in token:
            assert choice["text"][offset:].startswith(token)
    assert listed["token_logprobs"] == [-0.5] * len(listed["tokens"])
    assert listed["top_logprobs"] == [{token: -0.5} for token in listed["tokens"]]


def test_streamed_completions_of_several_prompts(complete: Chat, engine: FakeEngine) -> None:
    engine.reply = lambda prompt: f"prompt of {len(prompt)} ids"
    fields = {"prompt": ["Once", "", "upon a time there was"], "max_tokens": 30, "logprobs": 1}
    whole = complete(**fields).json()
    stream = events(complete(**fields, stream=True))
    assert stream.pop() == "[DONE]"
    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in stream if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "stop"
    assert len({choice["text"] for choice in whole["choices"]}) == 3


def test_a_finished_answer_ignores_later_tokens(complete: Chat, engine: FakeEngine) -> None:
    engine.reply = lambda prompt: "one two three" if prompt[-1] == 5 else "four five six seven"
    body = complete(prompt=[[5], [6]], stop="two", max_tokens=30).json()
    assert [choice["text"] for choice in body["choices"]] == [" one ", " four five six seven"]
    assert body["usage"]["completion_tokens"] < 2 * 5


def test_infinite_logprobs_are_a_number() -> None:
    engine = ThreadEngine(FakeEngine(), ServerConfig())
    ids = engine.tokenizer.encode("a", eos=True)
    pieces = push(Answer(engine.tokenizer, calls="refused"), ids, logprob=float("-inf"))
    body = ChatReply(engine, "fake", logprobs=True).choice(0, joined(pieces))
    assert [token["logprob"] for token in body["logprobs"]["content"]] == [-9999.0]


@pytest.mark.parametrize("arguments", ['{"place": "Castle"}', '{"a":  [1, 2e5, "é"]}', "{}"])
def test_calls_are_read_in_both_modes(chat: Chat, engine: FakeEngine, arguments: str) -> None:
    text = f'[{{"name": "get_hours", "arguments": {arguments}}}, {{"name": "other", "arguments": {{}}}}]'
    engine.reply = calling(engine.tokenizer, text)
    whole = chat(tools=[TOOL], stop=["name"]).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    calls = whole["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "get_hours", "arguments": arguments},
        {"name": "other", "arguments": "{}"},
    ]
    assert all(len(call["id"]) == 9 and call["type"] == "function" for call in calls)
    stream = events(chat(tools=[TOOL], stop=["name"], stream=True))
    assert stream.pop() == "[DONE]"
    built: dict[int, dict[str, Any]] = {}
    for event in stream:
        assert not event["choices"][0]["delta"].get("content")
        for delta in event["choices"][0]["delta"].get("tool_calls", []):
            entry = built.setdefault(delta["index"], {"function": {"name": "", "arguments": ""}})
            entry |= {key: delta[key] for key in ("id", "type") if key in delta}
            entry["function"]["name"] += delta["function"].get("name", "")
            entry["function"]["arguments"] += delta["function"]["arguments"]
    assert list(built.values()) == [
        {"function": call["function"], "id": call["id"], "type": call["type"]} for call in calls
    ]
    assert stream[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_call_ids_can_be_sent_back(chat: Chat, engine: FakeEngine) -> None:
    engine.reply = calling(engine.tokenizer)
    message = chat(tools=[TOOL]).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "09:00"}
    engine.reply = "At nine."
    body = chat(tools=[TOOL], messages=[*MESSAGES, message, result]).json()
    assert body["choices"][0]["message"]["content"] == "At nine."


@pytest.mark.parametrize("text", ["", "no list", CALL[:-5], "{}", "[]", '[{"arguments": {}}]', '[{"name": "a b"}]'])
def test_calls_that_cannot_be_read_are_an_error_and_never_text(chat: Chat, engine: FakeEngine, text: str) -> None:
    engine.reply = calling(engine.tokenizer, text)
    response = chat(tools=[TOOL])
    check_error(response, 500, "invalid_tool_calls", None)
    assert response.headers["x-should-retry"] == "false"
    stream = events(chat(tools=[TOOL], stream=True))
    assert stream[-1]["error"]["code"] == "invalid_tool_calls"
    assert not [event for event in stream[1:-1] if event["choices"][0]["delta"].get("content")]
    assert not [event for event in stream[1:-1] if event["choices"][0]["finish_reason"]]


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_calls_that_nobody_asked_for_are_an_error(chat: Chat, engine: FakeEngine, fields: dict[str, Any]) -> None:
    engine.reply = calling(engine.tokenizer)
    check_error(chat(**fields), 500, "unexpected_tool_calls", None)


def built(stream: list[Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The calls that a client puts together from deltas, and the finish reason."""
    calls: list[dict[str, Any]] = []
    finish = None
    for event in stream:
        (choice,) = event["choices"]
        finish = choice["finish_reason"]
        for delta in choice["delta"].get("tool_calls", []):
            if delta["index"] == len(calls):
                calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
                assert delta["function"]["arguments"] == ""
            else:
                assert delta.keys() == {"index", "function"}
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls, finish


TWO = (
    '[{"name": "get_hours", "arguments": {"place": "Café \\"🥐\\"", "at": [1, 2.50]}}, {"name": "b", "arguments": {}}]'
)


@pytest.mark.parametrize("max_tokens", range(1, 60))
def test_calls_cut_anywhere_are_the_same_in_both_modes(chat: Chat, engine: FakeEngine, max_tokens: int) -> None:
    engine.reply = calling(engine.tokenizer, TWO)
    fields = {"tools": [TOOL], "max_tokens": max_tokens, "seed": 1}
    whole = chat(**fields).json()["choices"][0]
    stream = events(chat(**fields, stream=True))
    assert stream.pop() == "[DONE]"
    calls, finish = built(stream)
    assert calls == whole["message"].get("tool_calls", [])
    assert finish == whole["finish_reason"] == ("length" if max_tokens < len(engine.reply) else "tool_calls")
    text = engine.tokenizer.decode(engine.reply[1:max_tokens])
    assert len(calls) == text.count('"name": "get_hours"') + text.count('"name": "b"')
    assert whole["message"]["content"] == (None if calls else "")
    if calls:
        assert TWO[TWO.index("{", 3) :].startswith(calls[0]["function"]["arguments"])


def test_arguments_stream_while_they_are_written(chat: Chat, engine: FakeEngine) -> None:
    engine.reply = calling(engine.tokenizer, TWO)
    stream = events(chat(tools=[TOOL], stream=True))[:-1]
    deltas = [call for event in stream for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert len([delta for delta in deltas if delta["index"] == 0]) > 8


def test_text_before_a_call_is_content() -> None:
    tokenizer = Tokenizer.from_version("v3")
    ids = [*tokenizer.encode("One moment"), *calling(tokenizer)]
    pieces = push(Answer(tokenizer, stop=["moments"], calls="offered"), ids)
    assert "".join(piece.text for piece in pieces) == "One moment"
    assert json.loads("".join(call.arguments for piece in pieces for call in piece.calls)) == {"place": "Castle"}
    with pytest.raises(ApiError, match="function call"):
        push(Answer(tokenizer, calls="refused"), ids)


def test_ids_depend_on_the_salt_alone() -> None:
    tokenizer = Tokenizer.from_version("v3")
    ids = [
        joined(push(Answer(tokenizer, calls="offered", salt=salt), calling(tokenizer))).calls[0].id
        for salt in ("a", "a", "b")
    ]
    assert ids[0] == ids[1] != ids[2]
