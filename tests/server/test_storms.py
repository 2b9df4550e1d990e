"""Many clients at once, of the kinds that there are: leaving, slow, too many, impatient. The others notice nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from checks import check_error, events
from serving import PATH, complete, engine_pid, expected, serving, spawn, until

from mixtral.server import ServerConfig
from mixtral.server.client import Client


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=140) as found:
        yield found


@contextlib.contextmanager
def raw(address: str, prompt: list[Any], *, buffer: int | None = None, **fields: Any) -> Iterator[socket.socket]:
    """A socket that has sent a completion and reads only when told to."""
    body = json.dumps({"model": "steps", "prompt": prompt, **fields}).encode()
    place = urlsplit(address)
    head = f"POST {PATH} HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\nx-request-id: same\r\n\r\n"
    with socket.socket() as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(60)
        connection.connect((place.hostname or "", place.port or 80))
        connection.sendall(head.encode() + body)
        yield connection


def reset(connection: socket.socket) -> None:
    """Close it in the impolite way."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def idle(client: Client) -> bool:
    """Whether the engine has nothing to do, as it says itself, and the server holds no request."""
    beat = client.supervisor.beat
    return beat is not None and beat.stats.running + beat.stats.waiting == 0 and not client.busy


def sample(address: str, name: str) -> float:
    """The value of a metric, 0 if it has none yet."""
    lines = httpx.get(address + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and line[len(name)] in " {")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_the_engine(stream: bool) -> None:
    with serving(spawn(0.005, slots=64)) as (address, client, _):
        with contextlib.ExitStack() as stack:
            leaving = [stack.enter_context(raw(address, [n], max_tokens=4000, stream=stream)) for n in range(40)]
            until(lambda: sum(run.started for run in client._runs.values()) == 40)
            for place, connection in enumerate(leaving):
                reset(connection) if place % 2 else connection.close()
            until(lambda: idle(client))
        assert sample(address, 'mixtral_aborted_total{reason="disconnect"}') == 40
        assert sample(address, "mixtral_running") == 0
        assert complete(address, [1], 10).json()["choices"][0]["text"] == expected([1], 10)
        assert "500" not in [line.split('status="')[1][:3] for line in _answers(address)]


def _answers(address: str) -> list[str]:
    lines = httpx.get(address + "/metrics").text.splitlines()
    return [line for line in lines if line.startswith("mixtral_requests_total{")]


def test_a_client_that_times_out_frees_the_engine() -> None:
    with serving(spawn(0.01)) as (address, client, _):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + PATH, json={"model": "steps", "prompt": [1], "max_tokens": 4000}, timeout=0.3)
        until(lambda: idle(client))


def test_a_client_that_leaves_the_queue_never_reaches_a_slot() -> None:
    with serving(spawn(0.01, slots=1)) as (address, client, _), raw(address, [1], max_tokens=100) as first:
        until(lambda: len(client._runs) == 1)
        with raw(address, [2], max_tokens=4000, stream=True):
            until(lambda: len(client._runs) == 2)
        until(lambda: len(client._runs) == 1)
        assert b" 200 " in first.recv(100)
        until(lambda: idle(client))
        beat = client.supervisor.beat
        assert beat is not None
        assert beat.stats.prompt_tokens == 1


@pytest.mark.long
@pytest.mark.slow
def test_readers_that_read_nothing_cost_little_and_delay_nobody(pool: ThreadPoolExecutor) -> None:
    config = ServerConfig(port=0, drain_s=1.0, stall_timeout_s=1.0, buffer_bytes=64 * 1024)
    with serving(spawn(0.002, slots=16), config) as (address, client, _), contextlib.ExitStack() as stack:
        complete(address, [1], 50)
        before = rss_bytes()
        slow = {"max_tokens": 4000, "stream": True, "logprobs": 5}
        for n in range(6):
            stack.enter_context(raw(address, [[n, m] for m in range(32)], buffer=4096, **slow))
        until(lambda: sum(run.started for run in client._runs.values()) == 6)
        good = [pool.submit(complete, address, [n, 5], 100, stream=n == 0) for n in range(3)]
        assert events(good[0].result())[-1] == "[DONE]"
        for n in (1, 2):
            assert good[n].result().json()["choices"][0]["text"] == expected([n, 5], 100)
        until(lambda: idle(client))
        assert rss_bytes() - before < 100 * 2**20
        assert sample(address, 'mixtral_aborted_total{reason="slow_reader"}') == 6


@pytest.mark.slow
def test_a_reader_that_is_behind_pauses_its_own_request_and_gets_every_byte() -> None:
    config = ServerConfig(port=0, drain_s=1.0, buffer_bytes=16 * 1024)
    fields = {"max_tokens": 1500, "stream": True, "logprobs": 5}
    with serving(spawn(0.0005, slots=16), config) as (address, client, _):
        with raw(address, [[n, 3] for n in range(24)], buffer=4096, **fields) as slow:
            until(lambda: bool(client._runs))
            (run,) = client._runs.values()
            made = -1
            while made != _output(client) or not run.paused:  # until the buffers of the system are full, too
                made = _output(client)
                time.sleep(0.5)
            held = run._bytes
            assert held < 16 * 1024 + 3 * 24 * (128 + 5 * 96)  # the buffer, and what was on its way
            assert complete(address, [1], 100).json()["choices"][0]["text"] == expected([1], 100)
            until(lambda: _output(client) == made + 100)  # nothing was made for the other one
            assert run.paused
            response = http.client.HTTPResponse(slow)
            response.begin()
            data = response.read()
            response.close()
        assert data.endswith(b"data: [DONE]\n\n")
        texts = dict.fromkeys(range(24), "")
        for line in data.split(b"\n"):
            if line.startswith(b"data: {"):
                choice = json.loads(line.removeprefix(b"data: "))["choices"][0]
                texts[choice["index"]] += choice["text"]
        assert texts == {n: expected([n, 3], 1500) for n in range(24)}
        until(lambda: idle(client))
        assert sample(address, "mixtral_aborted_total") == 0


def _output(client: Client) -> int:
    beat = client.supervisor.beat
    return -1 if beat is None else beat.stats.output_tokens


@pytest.mark.long
@pytest.mark.slow
def test_far_too_much_is_refused_at_the_door_and_the_rest_is_answered(pool: ThreadPoolExecutor) -> None:
    config = ServerConfig(port=0, drain_s=1.0, queue_size=4)
    with serving(spawn(0.01, slots=2), config) as (address, client, _):
        asked = [pool.submit(complete, address, [n], 20, stream=n % 2 == 0) for n in range(120)]
        codes = []
        for n, future in enumerate(asked):
            response = future.result()
            codes.append(response.status_code)
            if response.status_code == 503:
                check_error(response, 503, "server_overloaded", None)
                assert 1 <= int(response.headers["retry-after"]) <= 60
                continue
            if n % 2:
                assert response.json()["choices"][0]["text"] == expected([n], 20)
            else:
                data = events(response)
                assert "".join(event["choices"][0]["text"] for event in data[:-1]) == expected([n], 20)
                assert data[-1] == "[DONE]"
        assert set(codes) == {200, 503}
        assert codes.count(200) >= 6
        until(lambda: idle(client))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_too_long_is_told_and_forgotten(pool: ThreadPoolExecutor, stream: bool) -> None:
    config = ServerConfig(port=0, drain_s=1.0, queue_timeout_s=0.5)
    with serving(spawn(0.01, slots=1), config) as (address, client, _):
        first = pool.submit(complete, address, [1], 200)
        until(lambda: len(client._runs) == 1)
        response = complete(address, [2], 20, stream=stream)
        check_error(response, 503, "queue_timeout", None)
        assert response.headers["retry-after"]
        assert first.result().json()["choices"][0]["text"] == expected([1], 200)
        until(lambda: idle(client))
        assert sample(address, 'mixtral_aborted_total{reason="queue_timeout"}') == 1


def test_who_takes_too_long_is_ended() -> None:
    config = ServerConfig(port=0, drain_s=1.0, request_timeout_s=0.6)
    with serving(spawn(0.01), config) as (address, client, _):
        response = complete(address, [1], 4000)
        check_error(response, 504, "generation_timeout", None)
        assert response.headers["x-should-retry"] == "false"
        assert events(complete(address, [1], 4000, stream=True))[-1]["error"]["code"] == "generation_timeout"
        until(lambda: idle(client))
        assert sample(address, 'mixtral_aborted_total{reason="generation_timeout"}') == 2


def storm(address: str, seed: int, seconds: float, problems: list[str]) -> None:
    """One client of a cancel storm: it asks, leaves, resets, or stays and compares."""
    draw = random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        prompt, count = [draw.randrange(1000) for _ in range(draw.randint(1, 4))], draw.randint(1, 60)
        stream, leaves = draw.random() < 0.5, draw.random() < 0.6
        with raw(address, prompt, max_tokens=4000 if leaves else count, stream=stream) as connection:
            if leaves:
                time.sleep(draw.random() * 0.05)
                reset(connection) if draw.random() < 0.5 else connection.close()
                continue
        response = complete(address, prompt, count, stream=stream)
        if response.status_code == 503:
            continue
        if stream:
            text = "".join(event["choices"][0]["text"] for event in events(response)[:-1])
        else:
            text = response.json()["choices"][0]["text"]
        if text != expected(prompt, count):
            problems.append(f"{prompt} {count} {stream}: {response.status_code} {response.text[:300]}")


@pytest.mark.parametrize(
    "seconds", [1.5, pytest.param(60.0, marks=[pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(180)])]
)
def test_a_storm_of_cancels_leaves_the_others_their_bytes(seconds: float) -> None:
    with serving(spawn(0.001, slots=16)) as (address, client, _):
        pid = engine_pid(client)
        problems: list[str] = []
        threads = [threading.Thread(target=storm, args=(address, n, seconds, problems)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        until(lambda: idle(client))
        assert engine_pid(client) == pid
        assert client.supervisor.restarts == 0
