"""Long requests are read elsewhere: with the same outcome, and a process that is lost costs one request alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from checks import check_error, events
from fake import MESSAGES, FakeEngine, FakeGrammar, listening
from serving import alive, until
from threaded import ThreadEngine

from mixtral.server import Grammars, ServerConfig
from mixtral.server.body import INLINE_BYTES
from mixtral.server.errors import ApiError, as_api_error
from mixtral.server.reading import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, read
from mixtral.server.texts import _COMMAND, Texts, in_parts
from mixtral.server.work import Prepared

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "array", "items": {"type": "null"}}}}
ODD = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "array", "contains": {}}}}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {"tools": [TOOL], "tool_choice": "required", "user": "somebody"},
    "schema": {"response_format": SCHEMA, "n": 3, "logprobs": True, "stream": True},
    "odd schema": {"response_format": ODD},
    "telemetry": {"mixtral": {"routing": "counts", "layers": [1]}, "stop": ["x", "y"], "logit_bias": {"7": -3}},
    "continued": {"messages": [*MESSAGES, {"role": "assistant", "content": "It", "prefix": True}]},
    "too long": {"messages": [{"role": "user", "content": "word " * 20_000}]},
    "unknown field": {"temprature": 1},
    "another model": {"model": "other"},
    "half a pair": {"messages": [{"role": "user", "content": "\ud800"}]},
}
RAW: dict[str, tuple[str, bytes]] = {
    "no JSON": (CHAT, b"{" * 70_000),
    "no UTF-8": (CHAT, b'{"a": "' + b"\xff" * 70_000),
    "deep": (CHAT, b"[" * 70_000),
    "echo": (COMPLETIONS, json.dumps({"model": "fake", "prompt": ["a b", "c"], "echo": True, "n": 2}).encode()),
    "ids": (COMPLETIONS, json.dumps({"model": "fake", "prompt": [5, 6], "logprobs": 2}).encode()),
    "a text": (TOKENIZE, json.dumps({"prompt": "many words " * 9000, "return_pieces": True}).encode()),
    "a conversation": (TOKENIZE, json.dumps({"messages": MESSAGES, "tools": [TOOL]}).encode()),
    "ids to text": (DETOKENIZE, json.dumps({"tokens": [700, 800, 900] * 9000}).encode()),
    "bad ids": (DETOKENIZE, json.dumps({"tokens": [10**6]}).encode()),
}
BODIES = {
    **{name: (CHAT, json.dumps({"model": "fake", "messages": MESSAGES, "seed": 1, **fields}).encode())
       for name, fields in CHATS.items()},
    **RAW,
}  # fmt: skip


def outcome(error: Exception) -> tuple[Any, ...]:
    known = as_api_error(error)
    return known.status, known.code, known.message, known.param, known.headers


def plain(found: Prepared | bytes) -> object:
    """Without what is drawn for each request."""
    if isinstance(found, bytes):
        return json.loads(found)
    params = msgspec.structs.replace(found.submit.params, seed=1)
    return msgspec.structs.replace(found, submit=msgspec.structs.replace(found.submit, request="", params=params))


def with_texts(act: Callable[[Texts, ThreadEngine], Awaitable[None]], **fields: Any) -> None:
    config = ServerConfig(**fields)

    async def run() -> None:
        texts = Texts(config, grammar=True)
        try:
            await act(texts, ThreadEngine(FakeEngine(), config))
        finally:
            pids = texts.pids()
            texts.close()
            assert not any(map(alive, pids))

    asyncio.run(run())


def test_it_reads_as_this_process_does() -> None:
    async def act(texts: Texts, engine: ThreadEngine) -> None:
        for name, (route, body) in BODIES.items():
            here: object
            there: object
            try:
                here = plain(read(route, engine, body, "key", Grammars(engine)))
            except Exception as error:
                here = outcome(error)
            try:
                there = plain(await texts.read(route, engine, body, "key"))
            except ApiError as error:
                there = outcome(error)
            assert here == there, name
            assert isinstance(here, tuple) == (name in BAD), name

    with_texts(act, text_processes=1)


BAD = {"odd schema", "too long", "unknown field", "another model", "no JSON", "no UTF-8", "deep", "bad ids"}


def long_text(size: int = 3_000_000) -> bytes:
    return json.dumps({"prompt": "some words " * (size // 11)}).encode()


async def begun(texts: Texts) -> int:
    """A process that is at work, at least about to be."""
    while not texts.pids():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.02)
    return texts.pids()[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_costs_its_request_alone(how: signal.Signals) -> None:
    async def act(texts: Texts, engine: ThreadEngine) -> None:
        small = json.dumps({"prompt": "Hi"}).encode()
        same = await asyncio.gather(*(texts.read(TOKENIZE, engine, small, "") for _ in range(4)))
        assert len(texts.pids()) == 2
        lost = asyncio.create_task(texts.read(TOKENIZE, engine, long_text(), ""))
        await asyncio.sleep(0.05)
        (victim,) = [pid for pid in texts.pids() if pid != texts._free[-1].pid]
        os.kill(victim, how)
        assert await texts.read(TOKENIZE, engine, small, "") == same[0]
        with pytest.raises(ApiError) as caught:
            await lost
        assert (caught.value.status, caught.value.code) == (500, "internal_error")
        assert not alive(victim)
        again = await asyncio.gather(*(texts.read(TOKENIZE, engine, small, "") for _ in range(4)))
        assert set(again) == set(same)
        assert victim not in texts.pids()

    with_texts(act, text_processes=2, text_timeout_s=3.0)


def test_an_idle_process_that_was_killed_is_replaced_unseen() -> None:
    async def act(texts: Texts, engine: ThreadEngine) -> None:
        small = json.dumps({"prompt": "Hi"}).encode()
        first = await texts.read(TOKENIZE, engine, small, "")
        os.kill(texts.pids()[0], signal.SIGKILL)
        while texts.pids():
            await asyncio.sleep(0.01)
        assert await texts.read(TOKENIZE, engine, small, "") == first

    with_texts(act, text_processes=1)


def test_a_reader_that_gives_up_leaves_no_answer_behind() -> None:
    async def act(texts: Texts, engine: ThreadEngine) -> None:
        gone = asyncio.create_task(texts.read(TOKENIZE, engine, long_text(), ""))
        await begun(texts)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        found = await texts.read(DETOKENIZE, engine, json.dumps({"tokens": [700]}).encode(), "")
        assert isinstance(found, bytes)
        assert b"prompt" in found

    with_texts(act, text_processes=1)


def test_a_model_that_changed_is_told_again() -> None:
    async def act(texts: Texts, engine: ThreadEngine) -> None:
        body = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 300}).encode()
        assert isinstance(await texts.read(COMPLETIONS, engine, body, ""), Prepared)
        engine.cache_tokens = 100
        with pytest.raises(ApiError, match="holds 100 tokens"):
            await texts.read(COMPLETIONS, engine, body, "")
        assert len(texts.pids()) == 1

    with_texts(act, text_processes=1)


def test_too_many_that_wait_are_told_to_come_back() -> None:
    async def act(texts: Texts, engine: ThreadEngine) -> None:
        asked = [asyncio.create_task(texts.read(TOKENIZE, engine, long_text(800_000), "")) for _ in range(5)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        refused = [each for each in found if isinstance(each, ApiError)]
        assert [(each.status, each.code) for each in refused] == [(503, "server_overloaded")] * 2

    with_texts(act, text_processes=1, queue_size=3)


def test_parts_of_any_length() -> None:
    assert in_parts(b"") == []
    assert max(map(len, in_parts(b"x" * 3_000_001))) < 2**20 + 64
    assert len(in_parts(b"x" * 3_000_001)) == 3


@pytest.mark.slow
def test_it_is_not_started_by_hand_and_ends_with_its_socket() -> None:
    for arguments in ([], ["x"], ["1", "2"]):
        done = subprocess.run([*_COMMAND, *arguments], capture_output=True, text=True, timeout=60)
        assert (done.returncode, "mixtral serve" in done.stderr) == (2, True)
    for data, fine in ((b"", True), (struct.pack("<I", 8) + b"\xff" * 8, False)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptor = theirs.fileno()
            process = subprocess.Popen([*_COMMAND, str(descriptor)], pass_fds=[descriptor], stderr=subprocess.DEVNULL)
            theirs.close()
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
            assert (process.wait(timeout=60) == 0) == fine


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=8) as found:
        yield found


def text_pids() -> list[int]:
    """The processes of this kind that this one started."""
    found = subprocess.run(["ps", "-o", "pid=,stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    lines = [line.split(None, 2) for line in found.stdout.splitlines() if "mixtral.server.textchild" in line]
    return [int(pid) for pid, state, _ in lines if not state.startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_go_on_while_a_process_is_lost_and_replaced(how: signal.Signals, pool: ThreadPoolExecutor) -> None:
    reply = "one two three " * 30
    config = ServerConfig(port=0, drain_s=1.0, text_timeout_s=5.0, text_processes=1)
    headers = {"content-type": "application/json"}
    with listening(FakeEngine(reply, delay_s=0.03), config, FakeGrammar()) as address:
        chat = {"model": "fake", "messages": MESSAGES, "stream": True}
        stream = pool.submit(httpx.post, address + CHAT, json=chat, timeout=60)
        padded = json.dumps({"tokens": [700]}).encode() + b" " * INLINE_BYTES
        good = httpx.post(address + DETOKENIZE, content=padded, headers=headers, timeout=60)
        assert good.status_code == 200
        (pid,) = text_pids()
        used = psutil.Process(pid).cpu_times().user
        lost = pool.submit(httpx.post, address + TOKENIZE, content=long_text(), headers=headers, timeout=60)
        until(lambda: psutil.Process(pid).cpu_times().user > used + 0.05)  # it is at work
        os.kill(pid, how)
        check_error(lost.result(), 500, "internal_error", None)
        assert httpx.get(address + "/health").status_code == 200
        again = httpx.post(address + DETOKENIZE, content=padded, headers=headers, timeout=60)
        assert again.content == good.content
        assert text_pids() not in ([], [pid])
        data = events(stream.result())
        assert data[-1] == "[DONE]"
        assert "".join(each["choices"][0]["delta"].get("content", "") for each in data[:-1]) == reply
    until(lambda: text_pids() == [])
