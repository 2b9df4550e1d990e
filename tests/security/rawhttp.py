"""Random bytes that are nearly HTTP requests, and a strict reader of what a server answers to them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import h11

STATUSES = {200, 400, 401, 403, 404, 405, 408, 413, 414, 415, 421, 431, 501, 503}
_METHODS = (
    *("GET", "POST", "POST", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"),
    "get",
    "G\x00T",
    "POST\t",
    "A B",
)
_TARGETS = (
    *("/health", "/ready", "/", "/v1/models", "/v1/completions", "/tokenize", "/detokenize", "/v1/chat/completions"),
    *("*", "//health", "/health?a=b", "http://127.0.0.1/health", "/%2e%2e", "/\xff", "", "/a b", "/" + "x" * 9000),
)
_VERSIONS = ("HTTP/1.1",) * 12 + ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "http/1.1", "HTTP/1.", "")
_BODIES = (
    b'{"model": "steps", "prompt": [5], "max_tokens": 2}',
    b'{"model": "steps", "prompt": [5], "max_tokens": 2, "stream": true}',
    b'{"prompt": "a"}',
    b'{"tokens": [5]}',
    b"{",
    b"",
    b"\x00\xff" * 40,
    b'{"prompt": "' + b"x" * 70_000 + b'"}',
)
_LENGTHS = ("{}", "{}", "{}", "-{}", "+{}", "0x{}", "{}, {}", "{}.0", " {} ", "{}\t", "", "a", "9" * 30, "00{}", "{};")
_CODINGS = ("chunked", "chunked", "Chunked", "gzip, chunked", "chunked, chunked", "xchunked", "identity", "\vchunked")
_OTHERS = (
    *(b"connection: close", b"connection: keep-alive", b"connection: upgrade", b"upgrade: websocket", b"te: trailers"),
    *(b"expect: 100-continue", b"expect: x", b"x: a\x00b", b"x : a", b": a", b"x", b"x: a\r\n b", b"\xff: a"),
    *(b"host: evil", b"host: ", b"content-encoding: gzip", b"x: " + b"v" * 9000, b"x-request-id: a\x0bb", b"x: \xff"),
    *(
        b"origin: null",
        b"authorization: Bearer x",
        b"transfer-encoding:",
        b"content-length:",
        b"x:\ra",
        b"keep-alive: 1",
    ),
)


@dataclass(frozen=True)
class Exchange:
    """What one connection sends: pieces, each written by itself, and how many requests they began as."""

    pieces: tuple[bytes, ...]
    requests: int
    leaves: bool  # closes at once, without reading


def exchange(seed: int, host: str) -> Exchange:
    """The bytes of a connection, always the same for a seed."""
    chance = random.Random(seed)
    count = chance.choice((1, 1, 1, 2, 3, 6))
    data = b"".join(_request(chance, host) for _ in range(count))
    if chance.random() < 0.25:
        data = _damaged(chance, data)
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data) + 1)]
    return Exchange(_cut(chance, data), count, chance.random() < 0.05)


def _request(chance: random.Random, host: str) -> bytes:
    good = chance.random() < 0.4
    path = chance.choice(_TARGETS[:8] if good else _TARGETS)
    posts = path in _TARGETS[4:8]
    method = ("POST" if posts else "GET") if good else chance.choice(_METHODS)
    version = "HTTP/1.1" if good else chance.choice(_VERSIONS)
    lines = [f"{method} {path} {version}".encode("latin-1"), b"host: " + host.encode()]
    lines += [b"content-type: application/json"] * (chance.random() < 0.9)
    body = chance.choice(_BODIES) if posts or chance.random() < 0.2 else b""
    if good:
        chunked = chance.random() < 0.5
        lines.append(b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(body))
        return b"\r\n".join([*lines, b"", _chunks(chance, body, sound=True) if chunked else body])
    framed = body
    if chance.random() < 0.5:
        length = len(body) + chance.choice((0, 0, 0, -1, 1, 100))
        lines.append(b"content-length: " + chance.choice(_LENGTHS).format(length, length).encode("latin-1"))
    if chance.random() < 0.4:
        lines.append(b"transfer-encoding: " + chance.choice(_CODINGS).encode("latin-1"))
        framed = _chunks(chance, body, sound=chance.random() < 0.5)
    lines += chance.choices(_OTHERS, k=chance.choice((0, 0, 1, 2, 5)))
    if chance.random() < 0.03:
        lines += [b"x-%d: 1" % n for n in range(150)]
    if chance.random() < 0.05:
        lines.remove(b"host: " + host.encode())
    rest = lines[1:]
    chance.shuffle(rest)
    lines[1:] = rest
    end = b"\r\n" if chance.random() < 0.95 else b"\n"
    return end.join([*lines, b"", framed])


def _chunks(chance: random.Random, body: bytes, *, sound: bool) -> bytes:
    """The body in chunks; sound ones can be read."""
    most = max(len(body) // chance.choice((1, 2, 9)), 1)
    parts = []
    while body:
        size = chance.randrange(1, most + 1)
        part, body = body[:size], body[size:]
        written = b"%x" % len(part)
        if chance.random() < 0.2:
            written += b";a=b"
        if not sound and chance.random() < 0.3:
            wrong = (b"-1", b"ffffffffffffffffff", b"", b"g", b"0x5", b" 5", b"5 ", b"+5", b"%x" % (size + 1))
            written = chance.choice(wrong)
        ending = b"\r\n" if sound or chance.random() < 0.9 else chance.choice((b"\n", b"", b"\r", b"xx"))
        parts.append(written + b"\r\n" + part + ending)
    last = b"0\r\n" + (b"x: y\r\n" if chance.random() < 0.2 else b"") + b"\r\n"
    return b"".join([*parts, last if sound or chance.random() < 0.8 else b""])


def _damaged(chance: random.Random, data: bytes) -> bytes:
    """With some bytes changed, lost or doubled."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 40))):
        place = chance.randrange(len(found)) if found else 0
        how = chance.randrange(4)
        if how == 0:
            found[place : place + 1] = bytes([chance.randrange(256)])
        elif how == 1:
            del found[place : place + chance.choice((1, 2, 50))]
        elif how == 2:
            again = bytes(found[place : place + 30])
            found[place:place] = chance.choice((b"\r\n", b"\r", b"\n", b"\x00", b"\r\n\r\n", b": ", again))
        else:
            found[place:place] = b"\xff" * chance.choice((1, 3000))
    return bytes(found)


def _cut(chance: random.Random, data: bytes) -> tuple[bytes, ...]:
    """In a few pieces, or every byte by itself."""
    if chance.random() < 0.03:
        data = data[:400]
        return tuple(data[place : place + 1] for place in range(len(data)))
    places = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 1, 2, 5))))
    return tuple(data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True) if end > start)


def read_answers(data: bytes) -> tuple[list[int], bool]:
    """Statuses of all answers in what a server sent, and whether the last one is whole.

    Raises:
        ValueError: it is not a sequence of answers as HTTP/1.1 and this server's contract have them.
    """
    statuses: list[int] = []
    while data:
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(data)
        try:
            status, body, whole = _read_one(reader)
        except h11.RemoteProtocolError as error:
            raise ValueError(f"{error}: {data[:300]!r}") from error
        if status == 0 or not whole:
            return statuses, False
        _check(status, body)
        statuses.append(status)
        data = reader.trailing_data[0]
    return statuses, True


def _read_one(reader: h11.Connection) -> tuple[int, bytes, bool]:
    status, body = 0, b""
    while True:
        event = reader.next_event()
        if isinstance(event, h11.InformationalResponse):
            if event.status_code != 100:
                raise ValueError(f"status {event.status_code}")
        elif isinstance(event, h11.Response):
            status = event.status_code
            if not {b"content-length", b"transfer-encoding"} & {name for name, _ in event.headers}:
                raise ValueError(f"an answer {status} without a length")
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return status, body, True
        else:  # it needs more
            return status, body, False


def _check(status: int, body: bytes) -> None:
    if status not in STATUSES:
        raise ValueError(f"status {status}: {body[:300]!r}")
    if b"Traceback" in body or b"site-packages" in body:
        raise ValueError(f"internals in {body[:300]!r}")
    if status >= 400 and body:
        error = json.loads(body)["error"]
        if sorted(error) != ["code", "message", "param", "type"]:
            raise ValueError(f"members {sorted(error)}")


def requests_in(exchanges: Sequence[Exchange]) -> int:
    """How many requests these began as."""
    return sum(each.requests for each in exchanges)
