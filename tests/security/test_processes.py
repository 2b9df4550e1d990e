"""The processes of a server: what they listen on, what they reach for, what they import."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import children
from watching import SECRET, Watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LISTENS, UNCONNECTED = "0A", "07"


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for each in found:
        found += children(each)
    return found


def sockets(pids: list[int]) -> dict[str, list[tuple[str, str]]]:
    """Kind of socket -> local address and state of those that these processes hold, from the kernel's tables."""
    held = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                held.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
    found: dict[str, list[tuple[str, str]]] = {}
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        table = Path(f"/proc/net/{kind}")
        rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
        found[kind] = [(row[1], row[3]) for row in rows if row[9] in held]
    return found


def test_one_socket_listens_and_nothing_else(watched: Watched) -> None:
    pids = family(watched.server.process.pid)
    assert len(pids) >= 2  # the engine is a process of its own
    found = sockets(pids)
    listening = [place for place, state in found["tcp"] if state == LISTENS]
    port = int(watched.server.address.rpartition(":")[2])
    assert listening == [f"0100007F:{port:04X}"]
    assert [state for _, state in found["tcp6"] if state == LISTENS] == []
    assert found["udp"] == found["udp6"] == found["raw"] == found["raw6"] == []
    bound = [event["what"] for event in watched.events if event["event"] == "socket.bind"]
    assert bound == ["('127.0.0.1', 0)"]


def test_the_table_of_sockets_shows_what_is_there() -> None:
    with socket.socket() as one, socket.socket(type=socket.SOCK_DGRAM) as other:
        one.bind(("127.0.0.1", 0))
        one.listen()
        other.bind(("127.0.0.1", 0))
        found = sockets([os.getpid()])
        assert (f"0100007F:{one.getsockname()[1]:04X}", LISTENS) in found["tcp"]
        assert (f"0100007F:{other.getsockname()[1]:04X}", UNCONNECTED) in found["udp"]


@pytest.fixture(scope="module")
def canary() -> Iterator[tuple[str, socket.socket]]:
    """An address that nobody has a reason to connect to, and the socket that would notice."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x.png", listener


def with_urls(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests that hold an address wherever one fits."""
    chat, user = "/v1/chat/completions", {"role": "user", "content": url}
    ask = {"model": "embedded", "messages": [user], "max_tokens": 2}
    yield chat, ask
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_id": url, "file_data": url}},
        {"type": "text", "text": url, "url": url},
    ):
        yield chat, ask | {"messages": [{"role": "user", "content": [part]}]}
    for name in ("model", "user", "prompt_cache_key", "stop", "chat_template", "documents", "prompt_embeds", "audio"):
        yield chat, ask | {name: url}
    for schema in ({"$ref": url}, {"$schema": url, "type": "object"}, {"$id": url, "$ref": f"{url}#a"}):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        yield chat, ask | {"response_format": form}
        tool = {
            "type": "function",
            "function": {"name": "a", "parameters": {"type": "object", "properties": {"a": schema}}},
        }
        yield chat, ask | {"tools": [tool]}
    yield (
        chat,
        ask
        | {
            "response_format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": f"start: %import {url}"}}
        },
    )
    yield chat, ask | {"web_search_options": {"url": url}}
    yield "/v1/completions", {"model": "embedded", "prompt": url, "max_tokens": 2}
    yield "/tokenize", {"prompt": url}


def test_nobody_follows_an_address(watched: Watched, canary: tuple[str, socket.socket]) -> None:
    url, listener = canary
    statuses = []
    for outer in (url, "http://example.invalid/x.png", "file:///etc/passwd"):
        for path, body in with_urls(outer):
            answer = watched.client.post(path, json=body, headers={"referer": url, "x-forwarded-for": "192.0.2.1"})
            statuses.append(answer.status_code)
            assert answer.status_code in (200, 400, 404), answer.text
            assert "root:" not in answer.text
    assert statuses.count(200) >= 9
    assert statuses.count(400) >= 45
    with pytest.raises(BlockingIOError):
        listener.accept()
    outward = [event for event in watched.events if event["event"] not in ("start", "import", "socket.bind")]
    assert outward == []


def test_no_process_imports_a_template_engine(watched: Watched) -> None:
    """And the one that talks HTTP has no torch."""
    watched.client.post(
        "/v1/chat/completions",
        json={
            "model": "embedded",
            "messages": [{"role": "user", "content": "a"}],
            "response_format": {"type": "json_object"},
            "max_tokens": 2,
        },
    ).raise_for_status()
    imports = [(event["pid"], event["what"]) for event in watched.events if event["event"] == "import"]
    assert [what for _, what in imports if what != "torch"] == []
    assert {pid for pid, _ in imports}  # the engine has torch, so the watch sees imports
    assert watched.server.process.pid not in {pid for pid, _ in imports}
    starts = [event for event in watched.events if event["event"] == "start"]
    assert len({event["pid"] for event in starts}) >= 2  # HTTP and engine; trials of grammars get no environment
    assert {event["optimise"] for event in starts} == {2 if watched.optimised else 0}


def test_keys_are_in_no_log_and_no_environment(watched: Watched) -> None:
    assert httpx.get(f"{watched.server.address}/v1/models").status_code == 401
    assert SECRET not in watched.server.log
    for pid in family(watched.server.process.pid)[1:]:
        assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
