"""Bodies: media type, size, encoding, strict JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from checks import check_error
from fake import MESSAGES, FakeEngine

from mixtral.server import ServerConfig
from mixtral.server.body import parse_json
from mixtral.server.errors import ApiError

Send = Callable[..., httpx.Response]
PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
GOOD = {"model": "fake", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"{}{}", "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b'{"a": 1,}', "invalid_json"),
        (b'{"a": 1, "a": 1}', "invalid_json"),
        (b'{"b": [{"a": 1, "a": 2}]}', "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"temperature": Infinity}', "invalid_json"),
        (b'{"temperature": -Infinity}', "invalid_json"),
        (b'{"temperature": 1e999}', "invalid_json"),
        (b'{"a": "\x01"}', "invalid_json"),
        (b'{"seed": ' + b"9" * 65 + b"}", "json_too_complex"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "json_too_complex"),
        (b"[" * 100_000, "json_too_complex"),
        (b'{"a": [' + b"1," * 200_000 + b"1]}", "json_too_complex"),
        (b'{"a": "\xff"}', "invalid_encoding"),
        (b'{"a": "\xc0\xaf"}', "invalid_encoding"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_encoding"),
        (b"\xef\xbb\xbf{}", "invalid_encoding"),
        ('{"a": 1}'.encode("utf-16"), "invalid_encoding"),
        (rb'{"model": "\ud800"}', "invalid_encoding"),
        (rb'{"\udc00": 1}', "invalid_encoding"),
        (rb'{"messages": [{"name": "\ud83d"}]}', "invalid_encoding"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_body_is_a_400(send: Send, engine: FakeEngine, body: bytes, code: str) -> None:
    response = send("POST", PATH, content=body, headers=JSON)
    assert response.status_code == 400
    check_error(response, 400, code, response.json()["error"]["param"])
    assert engine.opened == 0


def test_the_limits_are_allowed() -> None:
    deep = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse_json(deep)["a"]
    assert parse_json(b'{"a": "' + b"[{" * 1000 + b'"}')
    assert len(parse_json(b'{"a": [' + b"1," * 199_000 + b"1]}")["a"]) == 199_001
    assert parse_json(b'{"a": ' + b"9" * 64 + b"}")


def test_half_a_surrogate_pair_in_content_becomes_a_replacement_character(send: Send, engine: FakeEngine) -> None:
    body = rb'{"model": "fake", "messages": [{"role": "user", "content": "a\ud83d b \ud83e\udd50 \u0000"}]}'
    assert send("POST", PATH, content=body, headers=JSON).status_code == 200
    assert "a\ufffd b 🥐 \x00" in engine.tokenizer.decode(engine.prompts[0])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json, text/plain"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_only_plain_json_is_read(send: Send, headers: dict[str, str]) -> None:
    response = send("POST", PATH, content=json.dumps(GOOD), headers=headers)
    check_error(response, 415, "unsupported_media_type", None)


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_json_may_name_its_encoding(send: Send, kind: str) -> None:
    assert send("POST", PATH, content=json.dumps(GOOD), headers={"content-type": kind}).status_code == 200


def test_a_large_body_is_refused_while_it_arrives(send: Send) -> None:
    config = ServerConfig(body_limit_bytes=2048)
    body = json.dumps(GOOD).encode()
    fits = body + b" " * (2048 - len(body))
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 64

    assert send("POST", PATH, config=config, content=fits, headers=JSON).status_code == 200
    check_error(send("POST", PATH, config=config, content=fits + b" ", headers=JSON), 413, "body_too_large", None)
    check_error(send("POST", PATH, config=config, content=parts(), headers=JSON), 413, "body_too_large", None)
    assert sent < 40
    lying = {**JSON, "content-length": "99999999999999999999"}
    check_error(send("POST", PATH, config=config, content=body, headers=lying), 413, "body_too_large", None)


def test_a_body_that_does_not_come_is_a_408(send: Send) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    response = send("POST", PATH, config=ServerConfig(body_timeout_s=0.05), content=parts(), headers=JSON)
    check_error(response, 408, "request_read_timeout", None)


@pytest.mark.parametrize(
    "body", [b'"' + b"\\" * 3_000_001, b'"\\"' * 700_000, b"-" * 2_000_000, b'{"a":"' + b"x" * 3_000_000]
)
def test_nonsense_is_refused_in_linear_time(body: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(ApiError):
        parse_json(body)
    assert time.monotonic() - began < 20  # quadratic time would be minutes


def test_a_large_body_is_parsed_like_a_small_one(send: Send, engine: FakeEngine) -> None:
    fields: dict[str, Any] = {**GOOD, "stop": ["x" * 500] * 16, "tools": []}
    body = json.dumps(fields).encode() + b" " * 100_000
    assert send("POST", PATH, content=body, headers=JSON).status_code == 200
    assert engine.opened == 1
