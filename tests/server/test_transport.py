"""Limits below HTTP, over raw sockets: slow and endless heads, too many connections, bytes that are no request."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake import MESSAGES, FakeEngine, listening, wait_until

from mixtral.server import ServerConfig

CHAT = json.dumps({"model": "fake", "messages": MESSAGES}).encode()


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port or 80), timeout=60) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What the server sends until it closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def answered(address: str, data: bytes) -> tuple[int, Any]:
    """Status and JSON of the answer to these bytes, after which the connection is closed."""
    with connected(address) as connection:
        connection.sendall(data)
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else body


def head(address: str, *lines: str, path: str = "/health", method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"host: {urlsplit(address).netloc}", *lines, "", ""]).encode()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(FakeEngine(), ServerConfig(port=0, header_timeout_s=0.3)) as found:
        yield found


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n",
        b"GET /h\xc3\xa9 HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_get_a_bare_400_or_nothing(address: str, data: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(data)
        found = everything(connection)
    assert not found or found.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 421 ", b"HTTP/1.1 501 "))
    assert b"Traceback" not in found
    assert httpx.get(address + "/health").status_code == 200


def test_a_head_that_is_too_long_is_a_431(address: str) -> None:
    status, body = answered(address, head(address, *(f"x-{n}: {'v' * 1000}" for n in range(40))))
    assert (status, body["error"]["code"]) == (431, "headers_too_large")
    status, body = answered(address, b"GET /" + b"x" * 40_000)
    assert (status, body["error"]["code"]) == (431, "headers_too_large")
    status, body = answered(address, head(address, "connection: close", path="/" + "x" * 9000))
    assert (status, body["error"]["code"]) == (414, "uri_too_long")
    status, body = answered(address, head(address, "connection: close", *(f"x-{n}: 1" for n in range(110))))
    assert (status, body["error"]["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nhost: a\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(address: str, sent: bytes) -> None:
    began = time.monotonic()
    with connected(address) as connection:
        connection.sendall(sent)
        assert everything(connection) == b""
    assert 0.2 < time.monotonic() - began < 50


def test_a_head_that_drips_ends_the_connection(address: str) -> None:
    with connected(address) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        began = time.monotonic()
        for byte in head(address, f"x: {'y' * 5000}"):
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
            if time.monotonic() - began > 40:
                pytest.fail("the server still listens")


def test_a_second_request_has_its_own_time(address: str) -> None:
    with connected(address) as connection:
        for _ in range(3):
            connection.sendall(head(address))
            found = b""
            while b'{"status":"ok"}' not in found:
                found += connection.recv(65536) or pytest.fail("the server closed the connection")
            time.sleep(0.2)  # longer than nothing, shorter than the limit of keep-alive
        connection.sendall(b"GET /health HT")
        began = time.monotonic()
        assert everything(connection) == b""
        assert time.monotonic() - began < 50


def test_a_body_that_drips_is_a_408() -> None:
    with listening(FakeEngine(), ServerConfig(port=0, body_timeout_s=0.3)) as address:
        start = head(address, "content-type: application/json", "content-length: 500", path="/tokenize", method="POST")
        with connected(address) as connection:
            connection.sendall(start + b"{")
            found = everything(connection)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"request_read_timeout" in found


def test_a_client_that_is_still_sending_gets_its_answer(address: str) -> None:
    """5 MiB, of which the server reads 4: the answer is there although nobody took the rest."""
    start = head(
        address, "content-type: application/json", "transfer-encoding: chunked", path="/tokenize", method="POST"
    )
    with connected(address) as connection:
        connection.sendall(start)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(80):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        found = everything(connection)
    assert found.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in found


def test_tiny_chunks_are_a_body_like_any_other(address: str) -> None:
    start = head(
        address,
        *("content-type: application/json", "transfer-encoding: chunked", "connection: close"),
        path="/v1/chat/completions",
        method="POST",
    )
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in CHAT)
    status, body = answered(address, start + chunks + b"0\r\n\r\n")
    assert (status, body["object"]) == (200, "chat.completion")


def test_requests_in_one_write_are_answered_in_order(address: str) -> None:
    last = head(address, "connection: close", path="/v1/models")
    with connected(address) as connection:
        connection.sendall(head(address) * 3 + last)
        found = everything(connection)
    assert found.count(b"HTTP/1.1 200 OK") == 4
    assert found.count(b'{"status":"ok"}') == 3
    assert found.rstrip().endswith(b"}]}")


def test_connections_are_limited_and_come_back() -> None:
    with listening(FakeEngine(), ServerConfig(port=0, connections=3)) as address, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(address)) for _ in range(3)]
        for each in held:
            each.sendall(head(address))
            assert b" 200 OK" in each.recv(65536)
        response = httpx.get(address + "/health")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_connections")
        assert response.headers["retry-after"] == "1"
        assert response.headers["x-request-id"]
        held[0].close()
        wait_until(lambda: httpx.get(address + "/health").status_code == 200)


def test_a_flood_of_connections_leaves_the_server_alive() -> None:
    with listening(FakeEngine(), ServerConfig(port=0, connections=5, header_timeout_s=0.5)) as address:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    stack.enter_context(connected(address))
            time.sleep(0.7)
        wait_until(lambda: httpx.get(address + "/health").status_code == 200)


def test_upgrades_are_not_followed(address: str) -> None:
    lines = ("connection: upgrade, close", "upgrade: websocket", "sec-websocket-key: x", "sec-websocket-version: 13")
    status, _ = answered(address, head(address, *lines))
    assert status == 200  # an ordinary request


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("length", [0, 5, 4])
def test_a_request_of_two_lengths_is_the_last_of_its_connection(address: str, version: str, length: int) -> None:
    """Whoever goes by the other length takes a part of it for a request of its own."""
    lines = ("content-type: application/json", f"content-length: {length}", "transfer-encoding: chunked")
    start = head(address, *lines, path="/tokenize", method="POST").replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    with connected(address) as connection:
        connection.sendall(start + b"0\r\n\r\n" + head(address))
        found = everything(connection)
    assert found.startswith(b"HTTP/1.1 400 ")
    assert found.count(b"HTTP/1.1 ") == 1
    assert b"invalid_headers" in found
