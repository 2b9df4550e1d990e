"""The queue, time limits, clients that leave, slow readers, and the end of the server. Over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from checks import check_error, events
from fake import MESSAGES, FakeEngine, listening, wait_until
from threaded import ThreadEngine

from mixtral.errors import ConfigError
from mixtral.server import Server, ServerConfig, serve
from mixtral.server.errors import ApiError
from mixtral.wire import SamplingParams, Submit

GOOD = {"model": "fake", "messages": MESSAGES}
PATH = "/v1/chat/completions"
LONG = "one two three " * 100


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine that waits before its first token until ``engine.hold.set()``."""
    found = FakeEngine()
    found.hold = threading.Event()
    yield found
    found.hold.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=32) as found:
        yield found


def post(address: str, **fields: object) -> httpx.Response:
    return httpx.post(address + PATH, json={**GOOD, **fields}, timeout=60)


def is_held(port: int | None, other: int) -> bool:
    """Whether the server at ``port`` still has its end of the connection from ``other``."""
    found = psutil.Process().net_connections()
    return any(each.raddr and (each.laddr.port, each.raddr.port) == (port, other) for each in found)


def release(engine: FakeEngine) -> None:
    if engine.hold is not None:
        engine.hold.set()


@contextlib.contextmanager
def raw(address: str, **fields: object) -> Iterator[socket.socket]:
    """A socket that has sent a request and reads only when told to."""
    body = json.dumps({**GOOD, **fields}).encode()
    place = urlsplit(address)
    head = f"POST {PATH} HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    with socket.create_connection((place.hostname, place.port or 80), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_503_at_once(engine: FakeEngine, pool: ThreadPoolExecutor, stream: bool) -> None:
    with listening(engine, ServerConfig(port=0, queue_size=3)) as address:
        first = pool.submit(post, address)
        wait_until(lambda: engine.begun == 1)
        waiting = [pool.submit(post, address, stream=stream) for _ in range(8)]
        wait_until(lambda: sum(each.done() for each in waiting) == 5)
        for each in waiting:
            if each.done():
                check_error(each.result(), 503, "server_overloaded", None)
                assert 1 <= int(each.result().headers["retry-after"]) <= 60
        assert httpx.get(address + "/health").status_code == 200
        release(engine)
        answered = [first, *waiting]
        assert sorted(each.result().status_code for each in answered) == [200] * 4 + [503] * 5
    assert engine.opened == engine.closed == 4


def test_a_queue_of_one_runs_one(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with listening(engine, ServerConfig(port=0, queue_size=1)) as address:
        first = pool.submit(post, address)
        wait_until(lambda: engine.begun == 1)
        second = pool.submit(post, address)
        wait_until(lambda: engine.held == 2)
        check_error(post(address), 503, "server_overloaded", None)
        release(engine)
        assert (first.result().status_code, second.result().status_code) == (200, 200)
        wait_until(lambda: engine.closed == 2)
        assert post(address).status_code == 200


def test_the_queue_is_bounded_in_tokens(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with listening(engine, ServerConfig(port=0, queue_tokens=100)) as address:

        def send(**fields: object) -> httpx.Response:
            return httpx.post(address + "/v1/completions", json={"model": "fake", **fields}, timeout=60)

        first = pool.submit(send, prompt=[5] * 60)
        wait_until(lambda: engine.begun == 1)
        second = pool.submit(send, prompt=[5] * 60)
        wait_until(lambda: engine.held == 2)
        check_error(send(prompt=[5] * 60), 503, "server_overloaded", None)
        third = pool.submit(send, prompt=[5] * 40)
        check_error(send(prompt=[[5] * 60, [6] * 60]), 400, "request_exceeds_cache", "prompt")
        release(engine)
        assert [each.result().status_code for each in (first, second, third)] == [200] * 3


def test_requests_run_in_order_of_arrival_and_alone(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    engine.reply = lambda prompt: engine.tokenizer.decode(prompt)[-2:]
    with listening(engine) as address:
        asked: list[Future[httpx.Response]] = []
        for number in range(10, 16):
            asked.append(pool.submit(post, address, messages=[{"role": "user", "content": f"number {number}"}]))
            wait_until(lambda: engine.held == len(asked))
        wait_until(lambda: engine.begun == 1)
        assert engine.opened == 1
        release(engine)
        texts = [each.result().json()["choices"][0]["message"]["content"] for each in asked]
    assert texts == [str(number) for number in range(10, 16)]
    assert [engine.tokenizer.decode(prompt)[-2:] for prompt in engine.prompts] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_wait_that_is_too_long_is_a_503(engine: FakeEngine, pool: ThreadPoolExecutor, stream: bool) -> None:
    with listening(engine, ServerConfig(port=0, queue_timeout_s=0.5)) as address:
        first = pool.submit(post, address)
        wait_until(lambda: engine.begun == 1)
        response = post(address, stream=stream)
        check_error(response, 503, "queue_timeout", None)
        assert response.headers["retry-after"]
        release(engine)
        assert first.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_engine_within_a_token(engine: FakeEngine, stream: bool) -> None:
    release(engine)
    engine.reply, engine.delay_s = LONG, 0.02
    with listening(engine) as address:
        with raw(address, stream=stream):
            wait_until(lambda: engine.tokens >= 3)
        wait_until(lambda: engine.closed == 1)
        assert engine.tokens < 150  # of 600; the time to notice it is that of a busy machine
        engine.delay_s, engine.reply = 0.0, "Next."
        assert post(address).json()["choices"][0]["message"]["content"] == "Next."


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_run(
    engine: FakeEngine, pool: ThreadPoolExecutor, stream: bool
) -> None:
    with listening(engine) as address:
        first = pool.submit(post, address)
        wait_until(lambda: engine.begun == 1)
        with raw(address, stream=stream):
            wait_until(lambda: engine.held == 2)
        wait_until(lambda: engine.held == 1)
        second = pool.submit(post, address)
        wait_until(lambda: engine.held == 2)
        release(engine)
        assert (first.result().status_code, second.result().status_code) == (200, 200)
    assert engine.opened == 2


def test_a_reader_that_stands_still_is_dropped(engine: FakeEngine) -> None:
    release(engine)
    engine.context, engine.reply = 10**6, engine.tokenizer.encode("word") * 60_000
    config = ServerConfig(port=0, stall_timeout_s=0.3)
    with listening(engine, config) as address:
        with raw(address, stream=True, max_tokens=200_000, logprobs=True, top_logprobs=20):
            wait_until(lambda: engine.closed == 1)
        assert engine.tokens < 60_000
        engine.reply = "Next."
        assert post(address, max_tokens=9).status_code == 200


@pytest.mark.slow
def test_a_whole_answer_that_nobody_reads_is_dropped() -> None:
    """Also what is left of it in the buffers after its last part was handed on."""
    engine = FakeEngine()
    body = json.dumps({"prompt": "word " * 500_000, "return_pieces": True}).encode()
    config = ServerConfig(port=0, stall_timeout_s=0.3, keep_alive_s=0.3)
    with listening(engine, config) as address:
        place = urlsplit(address)
        head = f"POST /tokenize HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-length: {len(body)}\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((place.hostname or "", place.port or 80))
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            ends = (place.port, connection.getsockname()[1])
            wait_until(lambda: is_held(*ends))
            wait_until(lambda: not is_held(*ends))


def test_a_stream_without_tokens_is_kept_open_by_comments(engine: FakeEngine) -> None:
    with listening(engine, ServerConfig(port=0, wait_note_s=0.05)) as address:
        found = b""
        with raw(address, stream=True) as connection:
            while found.count(b": wait\n\n") < 3:
                found += connection.recv(65536)
            release(engine)
            while b"data: [DONE]" not in found:
                found += connection.recv(65536)


def test_a_request_that_takes_too_long_ends(engine: FakeEngine) -> None:
    release(engine)
    engine.reply, engine.delay_s = LONG, 0.02
    with listening(engine, ServerConfig(port=0, request_timeout_s=0.5)) as address:
        response = post(address)
        check_error(response, 504, "generation_timeout", None)
        assert response.headers["x-should-retry"] == "false"
        stream = events(post(address, stream=True))
        assert stream[-1]["error"]["code"] == "generation_timeout"
        wait_until(lambda: engine.closed == 2)


def test_a_stopping_server_finishes_what_it_has(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with listening(engine, ServerConfig(port=0, drain_s=20)) as address:
        asked = [pool.submit(post, address, stream=stream) for stream in (True, False)]
        wait_until(lambda: engine.held == 2)
        threading.Timer(0.2, release, [engine]).start()
    assert [each.result().status_code for each in asked] == [200, 200]
    assert events(asked[0].result())[-1] == "[DONE]"


def test_what_does_not_finish_in_time_gets_an_error(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    release(engine)
    engine.reply, engine.delay_s = LONG, 0.05
    with listening(engine, ServerConfig(port=0, drain_s=0.2)) as address:
        stream = pool.submit(post, address, stream=True)
        wait_until(lambda: engine.begun == 1)
        waiting = pool.submit(post, address)
        wait_until(lambda: engine.held == 2 and engine.tokens >= 2)
    data = events(stream.result())
    assert data[-1]["error"]["code"] == "server_shutting_down"
    assert not [event for event in data[:-1] if event["choices"][0]["finish_reason"]]
    check_error(waiting.result(), 503, "server_shutting_down", None)
    assert engine.opened == engine.closed == 1


def test_a_draining_engine_takes_no_request(engine: FakeEngine) -> None:
    async def run() -> None:
        runner = ThreadEngine(engine, ServerConfig())
        runner.drain()
        async with runner.run(Submit(request="a", prompts=[[1]], params=SamplingParams())):
            pass

    with pytest.raises(ApiError, match="shutting down") as caught:
        asyncio.run(run())
    assert caught.value.status == 503
    assert engine.opened == 0


def test_a_port_in_use_is_one_clear_error(engine: FakeEngine) -> None:
    with listening(engine) as address, pytest.raises(ConfigError, match="another server") as caught:
        serve(ThreadEngine(engine, ServerConfig()), ServerConfig(port=urlsplit(address).port or 0))
    assert caught.value.param == "port"


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs the kernel's socket table")
def test_it_listens_on_loopback_alone(engine: FakeEngine) -> None:
    with listening(engine) as address:
        port = f"{urlsplit(address).port:04X}"
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        assert [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port}")] == [f"0100007F:{port}"]


PROGRAM = """
import sys
sys.path[:0] = [{tests!r}]
from fake import FakeEngine
from threaded import ThreadEngine
from mixtral.server import ServerConfig, serve
config = ServerConfig(port=0, drain_s=20)
fake = FakeEngine(delay_s=0.02)
fake.reply = lambda prompt: print("asked", flush=True) or "one two three " * 100
engine = ThreadEngine(fake, config)
serve(engine, config, on_ready=lambda url: print(url, flush=True))
print("after")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "twice", "ending"), [(signal.SIGTERM, False, "[DONE]"), (signal.SIGINT, True, "server_shutting_down")]
)
def test_a_signal_ends_it_in_order(number: signal.Signals, twice: bool, ending: str, pool: ThreadPoolExecutor) -> None:
    code = PROGRAM.format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        address = process.stdout.readline().strip()
        stream = pool.submit(post, address, stream=True, max_tokens=50)
        assert process.stdout.readline() == "asked\n"
        for _ in range(1 + twice):
            os.kill(process.pid, number)
            time.sleep(0.2)
        assert ending in stream.result().text
        assert process.stdout.read() == "after\n"
        assert process.wait(timeout=60) == 0


def test_the_server_says_where_it_is(engine: FakeEngine) -> None:
    with listening(engine, ServerConfig(port=0, host="localhost")) as address:
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(address + "/health").headers.get("server") is None
    assert Server(ThreadEngine(engine, ServerConfig()), ServerConfig()).stopped_by is None
