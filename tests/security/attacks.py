"""Requests that must be refused, each with the status, code and field of its refusal; made from the table of limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mixtral.limits import REFUSED, ROUTES, Limit

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "embedded", "messages": [{"role": "user", "content": "a"}]},
    COMPLETIONS: {"model": "embedded", "prompt": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
# As they stand in the body: what Python's own parser would take, or take for something else.
_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 70, "1e", "0x10", "01", "--1", "1_000")
_INTEGERS = ("1.0", "1.5", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "4294967296", "1e3")
_TYPES = ('"1"', "true", "[1]", '{"a": 1}')


@dataclass(frozen=True)
class Attack:
    """One request and its refusal. ``param`` None: the refusal names no field; "*": it may name any."""

    path: str
    body: bytes
    status: int = 400
    codes: frozenset[str] = frozenset()
    param: str | None = "*"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def all_attacks() -> Iterator[Attack]:
    """Every attack."""
    yield from numbers()
    yield from refused_fields()
    yield from bodies()
    yield from degenerate()
    yield from heads()


def with_field(path: str, name: str, text: str) -> bytes:
    """A good body in which this field has a value that is written so."""
    body = json.dumps(NEEDED[path] | {name: "MARK"})
    return body.replace('"MARK"', text).encode()


def numbers() -> Iterator[Attack]:
    """Edges of every number of every route."""
    for path, fields in ROUTES.items():
        for name, limit in fields.items():
            if limit.kind not in ("integer", "number"):
                continue
            for text in _NUMBERS:
                yield Attack(path, with_field(path, name, text))
            wrong = [*_TYPES, *(_INTEGERS if limit.kind == "integer" else ())]
            for text in wrong:
                if not _fits(limit, text):
                    yield Attack(path, with_field(path, name, text), param=name)
            for bound, step in ((limit.low, -1), (limit.high, 1)):
                if bound is not None:
                    value = int(bound) + step if limit.kind == "integer" else bound + step * 0.001
                    yield Attack(path, with_field(path, name, json.dumps(value)), param=name)


def _fits(limit: Limit, text: str) -> bool:
    """Whether an integer is within the limit after all."""
    if limit.kind != "integer" or not text.lstrip("-").isdigit():
        return False
    return (limit.low is None or int(text) >= limit.low) and (limit.high is None or int(text) <= limit.high)


def refused_fields() -> Iterator[Attack]:
    """Modalities, embeddings, templates and the rest of what other servers take."""
    unsupported = frozenset({"unsupported_parameter"})
    for path in (CHAT, COMPLETIONS):
        for name in REFUSED:
            if name in ROUTES[path]:
                continue
            for value in ("x", 7.5, [7], {"url": "http://127.0.0.1/"}):
                body = json.dumps(NEEDED[path] | {name: value}).encode()
                yield Attack(path, body, codes=unsupported, param=name)
        for name in (
            "pixel_values",
            "image",
            "__proto__",
            "temprature",
            "",
            "extra_body",
            "lora_path",
            "adapter",
            "a" * 60,
        ):
            body = json.dumps(NEEDED[path] | {name: "x"}).encode()
            yield Attack(path, body, codes=frozenset({"unknown_parameter"}), param=name)
    for kind in ("image_url", "input_image", "input_audio", "video_url", "file", "image_embeds", "refusal", "Text", ""):
        part = {"type": kind, kind or "a": {"url": "data:image/png;base64,AAAA"}}
        body = json.dumps(NEEDED[CHAT] | {"messages": [{"role": "user", "content": [part]}]}).encode()
        yield Attack(CHAT, body, codes=frozenset({"invalid_messages"}))


def bodies() -> Iterator[Attack]:
    """Bodies as a whole: no JSON, not UTF-8, too deep, too many values, twice the same name, other media types."""
    deep = "[" * 100 + "]" * 100
    for path, needed in NEEDED.items():
        good = json.dumps(needed).encode()
        for body in (
            *(b"", b"{", b"null", b"[]", b'"a"', b"1", b"NaN", b"{}{}", good + b"x", b"\xef\xbb\xbf" + good, b"\x00"),
            *(good.replace(b'"a"', b'"\xff"'), b'{"a": ' + b"[" * 100_000, b"[" * 100_000, good[:-1]),
            good[:-1] + b', "user": ' + deep.encode() + b"}",
            good[:-1] + b', "user": [' + b"0," * 250_000 + b"0]}",
            good[:-1] + b"," + good[1:],
        ):
            if body != good:
                yield Attack(path, body)
        for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
            headers = {"content-type": media}
            yield Attack(path, good, 415, frozenset({"unsupported_media_type"}), None, headers=headers)
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        yield Attack(path, good, 415, frozenset({"unsupported_media_type"}), None, headers=headers)
        yield Attack(path, b"x" * (4 * 2**20 + 1), 413, frozenset({"body_too_large"}), None)


def degenerate() -> Iterator[Attack]:
    """Nothing where something is needed, and everything where something is needed."""
    for messages in (
        *([], {}, "a", None, [None], [[]], [{}], [{"role": "user"}], [{"role": "root", "content": "a"}]),
        *([{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}] * 4097, [{"content": "a"}]),
        *([{"role": "system", "content": "a"}], [{"role": "user", "content": 1}], [{"role": "tool", "content": "a"}]),
    ):
        yield Attack(CHAT, json.dumps({"model": "embedded", "messages": messages}).encode())
    for prompt in (
        [],
        {},
        None,
        [[]],
        [[], [5]],
        [""] * 129,
        [5, "a"],
        [-1],
        [32768],
        [2**63],
        [True],
        [1.0],
        [[5], 5],
    ):
        yield Attack(COMPLETIONS, json.dumps({"model": "embedded", "prompt": prompt}).encode())
    yield Attack(COMPLETIONS, json.dumps({"model": "embedded", "prompt": [5] * 9000}).encode())
    yield Attack(CHAT, json.dumps(NEEDED[CHAT] | {"messages": [{"role": "user", "content": "a " * 20_000}]}).encode())
    yield Attack(COMPLETIONS, json.dumps(NEEDED[COMPLETIONS] | {"n": 64, "prompt": ["a"] * 3}).encode())
    for bias in ({"-1": 1}, {"32768": 1}, {"01": 1}, {"a": 1}, {"5": 101}, {"5": None}, {"\u0665": 1}, {"5": "1"}):
        yield Attack(CHAT, json.dumps(NEEDED[CHAT] | {"logit_bias": bias}).encode())
    for form in (
        {"type": "regex", "regex": "(" * 300},
        {"type": "regex", "regex": "(a)\\1"},
        {"type": "x"},
        {"type": []},
    ):
        yield Attack(CHAT, json.dumps(NEEDED[CHAT] | {"response_format": form}).encode())
    nested: dict[str, Any] = {}
    for _ in range(60):
        nested = {"type": "array", "items": nested}
    for schema in (
        nested,
        {"$ref": "#"},
        {"$ref": "http://a/"},
        {"type": "strin"},
        {"pattern": "(?=a)"},
        {"minItems": -1},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        yield Attack(CHAT, json.dumps(NEEDED[CHAT] | {"response_format": form}).encode(), status=0)


def heads() -> Iterator[Attack]:
    """Keys, hosts, origins, methods, paths."""
    good = json.dumps(NEEDED[CHAT]).encode()
    no_key = frozenset({"invalid_api_key"})
    for path in (
        CHAT,
        COMPLETIONS,
        "/tokenize",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/nope",
        "/health/",
    ):
        for key in ("", "Bearer", "Bearer x", "Basic sk-town-desk", "Bearer sk-town-deskx"):
            yield Attack(path, good, 401, no_key, None, headers={"authorization": key})
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1:1", "169.254.169.254"):
        yield Attack(CHAT, good, 421, frozenset({"host_not_allowed"}), None, headers={"host": host})
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "file://"):
        yield Attack(CHAT, good, 403, frozenset({"origin_not_allowed"}), None, headers={"origin": origin})
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        yield Attack(CHAT, b"", 405, frozenset({"method_not_allowed"}), None, method=method)
    for path in ("/v1/embeddings", "/v1/files", "/static/..%2f..%2fetc/passwd", "/static/nope.js", "/docs", "/redoc"):
        yield Attack(path, good, 404, frozenset({"route_not_found"}), None)
    yield Attack("/health?" + "x" * 9000, b"", 414, frozenset({"uri_too_long"}), None, method="GET")
