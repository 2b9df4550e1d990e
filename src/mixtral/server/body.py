"""The body of a request: media type, size, encoding and JSON are checked before any field is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from mixtral.limits import BODY
from mixtral.server.config import ServerConfig
from mixtral.server.errors import ApiError, ClientGone, show

__all__ = ["INLINE_BYTES", "Room", "parse_json", "read_body"]

INLINE_BYTES = 64 * 1024  # larger bodies are parsed and encoded in another process
_DEPTH, _VALUES, _DIGITS = (BODY[bound] for bound in ("levels", "values", "characters of a number"))
_MEDIA_TYPE = re.compile(r'application/json(?:[ \t]*;[ \t]*charset="?utf-8"?)?[ \t]*', re.IGNORECASE)
# Possessive, and the closing quote is optional: each byte is looked at once, whatever the input.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]|[-+0-9.eE]++', re.DOTALL)


class Room:
    """Memory for the long bodies of all requests that are being read at once."""

    def __init__(self, most_bytes: int) -> None:
        self.left = most_bytes

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function to be told how long a body is by now; inside the block the body has its memory.

        The first ``INLINE_BYTES`` of a body count for nothing. The function raises ApiError, 503, if no room is left.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            more = max(0, size - INLINE_BYTES) - taken
            if more > self.left:
                message = "other long requests are being read; try again later"
                headers = {"retry-after": "1", "connection": "close"}
                raise ApiError(503, "server_overloaded", message, headers=headers)
            self.left -= more
            taken += more

        try:
            yield take
        finally:
            self.left += taken


async def read_body(request: Request, config: ServerConfig, take: Callable[[int], None]) -> bytes:
    """A request's body, which says that it is JSON. ``take`` is that of a Room.

    Raises:
        ApiError: 408, 413 or 415, or what ``take`` raises.
        ClientGone: the client left before its body was complete.
    """
    _check_media_type(request)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _read(request, config.body_limit_bytes, take)
    except TimeoutError:
        message = f"the body did not arrive within {config.body_timeout_s:g} s"
        raise ApiError(408, "request_read_timeout", message, headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8 without BOM, no duplicate keys, no NaN or Infinity, at most 64 levels and 200,000 values.

    Lone surrogates in message content become U+FFFD (browsers cut strings inside pairs); elsewhere they are refused.

    Raises:
        ApiError: 400 ``invalid_encoding``, ``invalid_json`` or ``json_too_complex``.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_encoding", f"the body is not UTF-8: byte {error.start} is wrong") from None
    if text.startswith("\ufeff"):
        raise ApiError(400, "invalid_encoding", "the body begins with a byte order mark; send UTF-8 without one")
    _scan(body)
    try:
        value = json.loads(text, object_pairs_hook=_members, parse_float=_finite, parse_constant=_constant)
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {_reason(error)}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", f"the body is {show(value)}; expected a JSON object")
    return _whole_characters(value) if b"\\u" in body else value


def _check_media_type(request: Request) -> None:
    given = request.headers.getlist("content-type")
    if len(given) != 1 or not _MEDIA_TYPE.fullmatch(given[0]):
        got = show(given[0]) if given else "missing"
        raise ApiError(415, "unsupported_media_type", f"content-type is {got}; expected application/json")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, "unsupported_media_type", f"content-encoding is {show(encoding)}; send it uncompressed")


async def _read(request: Request, limit: int, take: Callable[[int], None]) -> bytes:
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if declared.isdecimal() and len(declared) < 16 and int(declared) <= limit:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                break
            take(len(body))
        else:
            return bytes(body)
    message = f"the body is larger than {limit} bytes, the limit of this server"
    raise ApiError(413, "body_too_large", message, headers={"connection": "close"})


def _scan(body: bytes) -> None:
    """Bounds of depth, number of values and length of numbers, found without building anything."""
    depth = values = 0
    for token in _TOKENS.finditer(body):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            values += 1
        elif first in b"]}":
            depth -= 1
        elif first == ord(","):
            values += 1
        elif first != ord('"') and token.end() - token.start() > _DIGITS:
            raise ApiError(400, "json_too_complex", f"a number has more than {_DIGITS} characters")
        if depth > _DEPTH:
            raise ApiError(400, "json_too_complex", f"the JSON has more than {_DEPTH} levels")
        if values > _VALUES:
            raise ApiError(400, "json_too_complex", f"the JSON has more than {_VALUES} values")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ApiError(400, "invalid_json", f"the key {show(key)} is given twice in one object", param=key)
            seen.add(key)
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is too large")
    return number


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; expected a finite number")


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return str(error)


def _whole_characters(value: Any, path: str = "") -> Any:
    """``value`` without lone surrogates. The depth was bounded before."""
    if isinstance(value, dict):
        for key in value:
            _whole_characters(key, f"{path}.{key}".lstrip("."))
        return {key: _whole_characters(member, f"{path}.{key}".lstrip(".")) for key, member in value.items()}
    if isinstance(value, list):
        return [_whole_characters(member, f"{path}[{place}]") for place, member in enumerate(value)]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            if not (path.startswith("messages[") and path.endswith((".content", ".text"))):
                raise ApiError(400, "invalid_encoding", "a string holds half a surrogate pair", param=path) from None
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value
