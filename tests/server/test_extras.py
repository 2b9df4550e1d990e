"""n answers, echoed prompts with scores, usage, routing telemetry, cache scopes, tokenize and detokenize."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from checks import check_error, events
from fake import CONTEXT, MESSAGES, FakeEngine

from mixtral.server import ServerConfig
from mixtral.server.keys import KeyRing
from mixtral.tokenizer import Tokenizer, encode_chat

Chat = Callable[..., httpx.Response]
Send = Callable[..., httpx.Response]


def several(engine: FakeEngine) -> None:
    """Answers that differ from call to call: the fake is asked once per sequence, in order."""
    texts = iter(["one", "two words", "and three words", "four", "five", "six"] * 4)
    engine.reply = lambda prompt: next(texts)


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_n_answers(chat: Chat, complete: Chat, engine: FakeEngine, route: str) -> None:
    several(engine)
    body = (chat if route == "chat" else complete)(n=3, max_tokens=20).json()
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    texts = [choice["message"]["content"] if route == "chat" else choice["text"].strip() for choice in choices]
    assert texts == ["one", "two words", "and three words"]
    assert engine.submits[-1].n == 3
    tokens = sum(len(engine.tokenizer.encode(text, eos=True)) for text in texts)
    assert body["usage"]["completion_tokens"] == tokens
    assert body["usage"]["prompt_tokens"] == len(engine.prompts[-1])


def test_n_answers_in_a_stream(chat: Chat, engine: FakeEngine) -> None:
    several(engine)
    stream = events(chat(n=3, stream=True))
    assert stream.pop() == "[DONE]"
    texts, ends = [""] * 3, [""] * 3
    for event in stream:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        assert not ends[choice["index"]]
        ends[choice["index"]] = choice["finish_reason"] or ""
    assert texts == ["one", "two words", "and three words"]
    assert ends == ["stop"] * 3
    assert [event["choices"][0]["delta"] for event in stream[:3]] == [{"role": "assistant", "content": ""}] * 3


def test_n_answers_to_several_prompts(complete: Chat, engine: FakeEngine) -> None:
    several(engine)
    body = complete(prompt=["a", "b"], n=2, best_of=2, max_tokens=20).json()
    assert [choice["text"] for choice in body["choices"]] == [" one", " two words", " and three words", " four"]


PROMPTS: list[tuple[Any, list[str]]] = [
    ("Was gibt es zum Frühstück? 🥐", ["Was gibt es zum Frühstück? 🥐"]),
    ("", [""]),
    (["  two spaces", "x\ny"], ["  two spaces", "x\ny"]),
    ([1, 415, 349], [Tokenizer.from_version("v3").decode([1, 415, 349])]),
]


@pytest.mark.parametrize(("prompt", "texts"), PROMPTS)
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 1, 30])
def test_echo(
    complete: Chat, engine: FakeEngine, prompt: Any, texts: list[str], logprobs: int | None, max_tokens: int
) -> None:
    engine.reply = "né, 🥐."
    choices = complete(prompt=prompt, echo=True, logprobs=logprobs, max_tokens=max_tokens).json()["choices"]
    assert engine.params[-1].prompt_logprobs == (logprobs if logprobs is not None or max_tokens else 0)
    answer = engine.tokenizer.encode("né, 🥐.", eos=True)[:max_tokens]
    for place, (choice, text) in enumerate(zip(choices, texts, strict=True)):
        assert choice["finish_reason"] == ("stop" if max_tokens == 30 else "length")
        assert choice["text"].startswith(text)
        if max_tokens == 30:
            assert choice["text"] == f"{text} né, 🥐."
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        listed = choice["logprobs"]
        count = len(engine.prompts[place])
        assert len(listed["tokens"]) == count + len(answer)
        assert listed["token_logprobs"] == [None] + [-1.5] * (count - 1) + [-0.5] * len(answer)
        assert listed["top_logprobs"][0] is None
        for token, top in list(zip(listed["tokens"], listed["top_logprobs"], strict=True))[1:]:
            assert token in top
            assert len(top) <= max(logprobs, 1) + 1
        for token, offset in zip(listed["tokens"], listed["text_offset"], strict=True):
            if "\ufffd" not in token and token not in ("<s>", "</s>") and offset:
                assert choice["text"][offset:].startswith(token), (token, offset)
        assert listed["text_offset"] == sorted(listed["text_offset"])


def test_echo_with_several_answers(complete: Chat, engine: FakeEngine) -> None:
    several(engine)
    choices = complete(prompt=["a", "b"], n=2, echo=True, max_tokens=9).json()["choices"]
    assert [choice["text"] for choice in choices] == ["a one", "a two words", "b and three words", "b four"]


def test_cached_tokens_are_told(chat: Chat, complete: Chat, engine: FakeEngine) -> None:
    engine.cached = 3
    assert chat().json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert complete(prompt=["aaa", "bbb"]).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
    stream = events(chat(stream=True, stream_options={"include_usage": True}))
    assert stream[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_fingerprint_and_priority(chat: Chat, complete: Chat, engine: FakeEngine) -> None:
    for call in (chat, complete):
        assert call(priority=-7).json()["system_fingerprint"] == "fp_fake"
        assert engine.submits[-1].priority == -7
        stream = events(call(stream=True))
        assert {event["system_fingerprint"] for event in stream[:-1]} == {"fp_fake"}
        assert engine.submits[-1].priority == 0


def test_prefixes_are_shared_within_a_key_and_cache_key_only(send: Send, engine: FakeEngine) -> None:
    config = ServerConfig(keys=KeyRing.of(["first-key", "second-key"]))
    for secret in ("first-key", "second-key"):
        for cache_key in (None, "a", "b", None):
            fields = {"model": "fake", "messages": MESSAGES, "prompt_cache_key": cache_key}
            headers = {"authorization": f"Bearer {secret}"}
            response = send("POST", "/v1/chat/completions", config=config, json=fields, headers=headers)
            assert response.status_code == 200
    scopes = [submit.scope for submit in engine.submits]
    assert len(set(scopes)) == 6
    assert scopes[0] == scopes[3]
    assert scopes[4] == scopes[7]
    assert len({submit.request for submit in engine.submits}) == 8


def routed(engine: FakeEngine, first: int, tokens: int, layers: list[int]) -> tuple[bytes, bytes]:
    """What the fake's formula gives for these tokens and layers, written down once more."""
    experts = bytes((first + t + layer + a) % 8 for t in range(tokens) for layer in layers for a in range(2))
    weights = b"".join(
        struct.pack("<ee", 0.5 + layer / 16, 0.5 - layer / 16) for _ in range(tokens) for layer in layers
    )
    return experts, weights


@pytest.mark.parametrize("layers", [None, [0, 1, 2, 3], [2], [3, 0], []])
@pytest.mark.parametrize("mode", ["experts", "weights"])
@pytest.mark.parametrize("prompt", [False, True])
def test_routing_of_tokens(chat: Chat, engine: FakeEngine, layers: list[int] | None, mode: str, prompt: bool) -> None:
    asked = {"routing": mode, "prompt": prompt} | ({} if layers is None else {"layers": layers})
    plain = chat(seed=1).json()
    whole = chat(seed=1, mixtral=asked).json()
    assert (whole["choices"], whole["usage"]) == (plain["choices"], plain["usage"])
    assert "mixtral" not in plain
    assert (engine.submits[-1].routing, engine.submits[-1].routing_prompt) == (True, prompt)
    (entry,) = whole["mixtral"]["routing"]
    used = [0, 1, 2, 3] if layers is None else layers
    first = 0 if prompt else len(engine.prompts[0])
    tokens = whole["usage"]["completion_tokens"] - 1 + (len(engine.prompts[0]) if prompt else 0)
    assert (entry["choice"], entry["first"], entry["layers"]) == (0, first, used)
    assert entry["shape"] == [tokens, len(used), 2]
    experts, weights = routed(engine, first, tokens, used)
    assert base64.b64decode(entry["experts"]) == experts
    assert ("weights" in entry) == (mode == "weights")
    if mode == "weights":
        assert base64.b64decode(entry["weights"]) == weights
    stream = events(chat(seed=1, mixtral=asked, stream=True))[:-1]
    parts = [each for event in stream for each in event.get("mixtral", {"routing": []})["routing"]]
    assert len(parts) > 3
    assert b"".join(base64.b64decode(part["experts"]) for part in parts) == experts
    position = first
    for part in parts:
        assert part["first"] == position
        position += part["shape"][0]
    assert not [event for event in stream if any("mixtral" in choice["delta"] for choice in event["choices"])]


def test_routing_counts(chat: Chat, engine: FakeEngine) -> None:
    asked = {"routing": "counts", "layers": [1, 3]}
    whole = chat(seed=1, n=2, mixtral=asked).json()
    first, tokens = len(engine.prompts[0]), whole["usage"]["completion_tokens"] // 2 - 1
    experts, _ = routed(engine, first, tokens, [1, 3])
    counts = [
        [sum(experts[place] == expert for place in range(len(experts)) if place // 2 % 2 == at) for expert in range(8)]
        for at in range(2)
    ]
    assert whole["mixtral"]["routing"] == [{"choice": at, "layers": [1, 3], "counts": counts} for at in range(2)]
    stream = events(chat(seed=1, n=2, mixtral=asked, stream=True))[:-1]
    told = [(event["choices"][0]["finish_reason"], event["mixtral"]) for event in stream if "mixtral" in event]
    assert [finish for finish, _ in told] == ["stop", "stop"]
    assert [each["routing"] for _, each in told] == [[entry] for entry in whole["mixtral"]["routing"]]


def test_routing_of_completions(complete: Chat, engine: FakeEngine) -> None:
    entries = complete(prompt=["a", "b c"], mixtral={"routing": "experts"}).json()["mixtral"]["routing"]
    assert [(each["choice"], each["first"]) for each in entries] == [(0, 2), (1, 3)]
    assert complete(mixtral={"routing": "none"}).json().keys() & {"mixtral"} == set()
    assert complete(mixtral={}).status_code == 200


def test_tokenize_and_back(send: Send, engine: FakeEngine) -> None:
    for text in ("", "Frühstück 🥐", "[INST] is text", "  two  spaces\n"):
        body = send("POST", "/tokenize", json={"prompt": text}).json()
        assert body == {
            "tokens": engine.tokenizer.encode(text, bos=True),
            "count": len(body["tokens"]),
            "max_model_len": CONTEXT,
        }
        bare = send("POST", "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
        assert [1, *bare] == body["tokens"]
        assert send("POST", "/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}


def test_who_tokenizes_here_is_told_the_ids_of_control_tokens(send: Send) -> None:
    body = send("GET", "/tokenizer_info").json()
    assert (body["version"], body["vocab_size"]) == ("v3", 32768)
    assert (body["bos_token_id"], body["eos_token_id"]) == (1, 2)
    # lm-eval takes the first id of the text that it is told. A text such as "<s>" is no control token here.
    assert {name: body[name] for name in ("bos_token", "eos_token", "chat_template")} == {
        "bos_token": None,
        "eos_token": None,
        "chat_template": None,
    }


def test_tokenize_a_conversation(send: Send, engine: FakeEngine) -> None:
    tool = {"type": "function", "function": {"name": "get_hours", "description": "", "parameters": {}}}
    fields = {"model": "fake", "messages": MESSAGES, "tools": [tool], "return_pieces": True}
    body = send("POST", "/tokenize", json=fields).json()
    assert body["tokens"] == encode_chat(engine.tokenizer, MESSAGES, [tool]).ids
    assert body["pieces"] == [engine.tokenizer.piece(id) for id in body["tokens"]]


@pytest.mark.parametrize(
    ("path", "fields", "status", "code", "param"),
    [
        ("/tokenize", {}, 400, "missing_required_parameter", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "unsupported_combination", "messages"),
        ("/tokenize", {"prompt": 5}, 400, "invalid_type", "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, 400, "unsupported_combination", "tools"),
        ("/tokenize", {"prompt": "a", "model": "b"}, 404, "model_not_found", "model"),
        ("/tokenize", {"prompt": "a", "text": "b"}, 400, "unknown_parameter", "text"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "unsupported_combination", None),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "invalid_messages", "messages[0].content"),
        ("/detokenize", {}, 400, "missing_required_parameter", "tokens"),
        ("/detokenize", {"tokens": [32768]}, 400, "invalid_value", "tokens[0]"),
        ("/detokenize", {"tokens": [5, -1]}, 400, "invalid_value", "tokens[1]"),
        ("/detokenize", {"tokens": [5, True]}, 400, "invalid_type", "tokens[1]"),
        ("/detokenize", {"tokens": [5] * 65_537}, 400, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [5], "model": "b"}, 404, "model_not_found", "model"),
    ],
)
def test_bad_tokenize(send: Send, path: str, fields: dict[str, Any], status: int, code: str, param: str | None) -> None:
    response = send("POST", path, json=fields)
    check_error(response, status, code, param or "add_special_tokens")


def test_numbers_of_an_answer_are_json(chat: Chat, engine: FakeEngine) -> None:
    body = chat(logprobs=True, top_logprobs=3).json()
    for token in body["choices"][0]["logprobs"]["content"]:
        assert all(math.isfinite(each["logprob"]) for each in (token, *token["top_logprobs"]))


def test_a_request_that_the_cache_cannot_hold(chat: Chat, complete: Chat, engine: FakeEngine) -> None:
    engine.cache_tokens = 60
    assert chat().status_code == 200
    assert engine.params[-1].max_tokens == 60 - len(engine.prompts[-1])
    check_error(chat(max_tokens=60), 400, "request_exceeds_cache", "messages")
    check_error(complete(prompt=[5] * 50), 400, "request_exceeds_cache", "prompt")
