"""The server as a program: signals, limits of the system, logs that cannot be written, and no process left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from checks import check_error, events
from serving import COMMAND, PATH, alive, children, complete, expected, program, until
from steps import MARK
from test_auth import entry, write

from mixtral.server.run import _bind
from mixtral.server.supervisor import _COMMAND


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=32) as found:
        yield found


def metric(address: str, name: str) -> int:
    lines = httpx.get(address + "/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith(f"{name} "))))


def running(address: str) -> int:
    return metric(address, "mixtral_running")


def made(address: str) -> int:
    return metric(address, 'mixtral_tokens_total{kind="output"}')


def check_gone(process: subprocess.Popen[str], engines: list[int], code: int) -> None:
    """The process ended by itself with this code, and nothing of it is left."""
    assert process.wait(timeout=60) == code
    until(lambda: not any(alive(pid) for pid in engines))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_refuses_new_ones(number: signal.Signals, pool: ThreadPoolExecutor) -> None:
    with program(delay_s=0.02, config={"drain_s": 20}) as (address, process):
        engines = children(process.pid)
        assert len(engines) == 1
        asked = [pool.submit(complete, address, [n], 100, stream=n < 2) for n in range(4)]
        until(lambda: running(address) == 4)
        process.send_signal(number)
        until(lambda: httpx.get(address + "/ready").status_code == 503)
        response = complete(address, [9], 5)
        check_error(response, 503, "server_shutting_down", None)
        assert response.headers["retry-after"]
        assert httpx.get(address + "/health").status_code == 200
        for n, future in enumerate(asked):
            if n < 2:
                assert events(future.result())[-1] == "[DONE]"
            else:
                assert future.result().json()["choices"][0]["text"] == expected([n], 100)
        check_gone(process, engines, 0)


@pytest.mark.parametrize("how", ["limit", "no grace", "second signal"])
def test_what_does_not_finish_gets_an_error_that_says_so(how: str, pool: ThreadPoolExecutor) -> None:
    drain_s = {"limit": 0.3, "no grace": 0, "second signal": 60}[how]
    with program(delay_s=0.05, config={"drain_s": drain_s}) as (address, process):
        engines = children(process.pid)
        asked = [pool.submit(complete, address, [n], 4000, stream=n < 2) for n in range(4)]
        until(lambda: running(address) == 4)
        before = made(address)
        until(lambda: made(address) >= before + 8)  # every stream has begun
        process.send_signal(signal.SIGTERM)
        if how == "second signal":
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        for n, future in enumerate(asked):
            response = future.result(timeout=60)
            if n >= 2:
                check_error(response, 503, "server_shutting_down", None)
                continue
            data = events(response)
            assert data[-1]["error"]["code"] == "server_shutting_down"
            assert not [event for event in data[:-1] if event["choices"][0]["finish_reason"]]
        check_gone(process, engines, 0)


@pytest.mark.slow
def test_a_reader_that_stands_still_does_not_hold_up_the_end() -> None:
    with program(config={"drain_s": 0.2}) as (address, process):
        place = urlsplit(address)
        many = {"model": "steps", "prompt": [[1, n] for n in range(32)], "max_tokens": 4000, "logprobs": 5}
        body = json.dumps({**many, "stream": True}).encode()
        with socket.create_connection((place.hostname, place.port or 80)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            until(lambda: running(address) == 1)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_a_bad_key_file_and_broken_connections_under_load_change_nothing(
    pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    path = write(tmp_path / "keys.toml", entry("ann", "first-key"))
    with program(delay_s=0.01, keys=path) as (address, process), httpx.Client(timeout=60) as client:
        client.headers["authorization"] = "Bearer first-key"

        def ask(n: int) -> httpx.Response:
            return client.post(
                address + PATH, json={"model": "steps", "prompt": [n], "max_tokens": 150, "stream": True}
            )

        asked = [pool.submit(ask, n) for n in range(4)]
        time.sleep(0.3)
        write(path, "broken")
        place = urlsplit(address)
        body = json.dumps({"model": "steps", "prompt": [9], "max_tokens": 4000, "stream": True}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: {place.netloc}\r\nauthorization: Bearer first-key\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        for _ in range(10):
            process.send_signal(signal.SIGHUP)
            with socket.create_connection((place.hostname, place.port or 80)) as connection:
                connection.sendall(head.encode() + body)
                connection.recv(100)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for n, future in enumerate(asked):
            data = events(future.result())
            assert data[-1] == "[DONE]"
            assert "".join(event["choices"][0]["text"] for event in data[:-1]) == expected([n], 150)
        assert client.get(address + "/v1/models").status_code == 200
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=60)[1]
    assert "stay as they were" in log
    assert "first-key" not in log


@pytest.mark.slow
def test_signals_to_the_whole_group_do_not_end_the_engine_early(pool: ThreadPoolExecutor) -> None:
    with program(delay_s=0.02, config={"drain_s": 20}) as (address, process):
        (engine,) = children(process.pid)
        asked = pool.submit(complete, address, [1], 60)
        until(lambda: running(address) == 1)
        for pid in (engine, process.pid):
            os.kill(pid, signal.SIGTERM)
        assert asked.result().json()["choices"][0]["text"] == expected([1], 60)
        check_gone(process, [engine], 0)


@pytest.mark.parametrize("busy", [False, True])
def test_no_engine_outlives_a_server_that_was_killed(pool: ThreadPoolExecutor, busy: bool) -> None:
    points = ["step:3:hang"] if busy else []  # an engine in a step does not look at its channel
    with program(*points, delay_s=0.01) as (address, process):
        (engine,) = children(process.pid)
        if busy:
            pool.submit(lambda: contextlib.suppress(httpx.HTTPError).__enter__() or complete(address, [1], 50))
            until(lambda: running(address) == 1)
            time.sleep(0.1)
        process.kill()
        until(lambda: not alive(engine))


def test_an_engine_leaves_no_core_file_and_gains_no_rights() -> None:
    with program() as (_, process):
        (engine,) = children(process.pid)
        with open(f"/proc/{engine}/status") as file:
            assert "NoNewPrivs:\t1" in file.read()
        with open(f"/proc/{engine}/limits") as file:
            core = next(line for line in file if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]


@pytest.mark.slow
def test_a_server_without_files_left_refuses_and_recovers() -> None:
    with program(files=40) as (address, process):
        (engine,) = children(process.pid)
        place = urlsplit(address)
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                connection = socket.create_connection((place.hostname, place.port or 80), timeout=30)
                stack.enter_context(connection)
            time.sleep(0.3)
            os.kill(engine, signal.SIGKILL)  # the next one cannot be started yet, which is no death of its own
            time.sleep(3)
            assert process.poll() is None
        until(lambda: _status(address, "/ready") == 200)
        assert complete(address, [1], 10).json()["choices"][0]["text"] == expected([1], 10)
        process.send_signal(signal.SIGTERM)
        check_gone(process, [engine], 0)


def _status(address: str, path: str) -> int:
    try:
        return httpx.get(address + path, timeout=30).status_code
    except httpx.HTTPError:
        return 0


@pytest.mark.slow
def test_a_log_that_cannot_be_written_changes_nothing(pool: ThreadPoolExecutor) -> None:
    """Once onto a full device, once into a pipe that nobody reads, once into one that is closed."""
    with open("/dev/full", "w") as full, program(stderr=full) as (address, _):
        check_serves(address, pool)
    with program(stderr=subprocess.PIPE) as (address, process):
        check_serves(address, pool, times=900)  # more lines than the pipe holds
        assert process.stderr is not None
        process.stderr.close()
        check_serves(address, pool)
        process.stderr = None


def check_serves(address: str, pool: ThreadPoolExecutor, times: int = 10) -> None:
    with httpx.Client() as client:
        for _ in range(times):
            assert client.get(f"{address}/v1/models").status_code == 200
    assert complete(address, [1], 10).json()["choices"][0]["text"] == expected([1], 10)


def test_a_closed_standard_output_changes_nothing(pool: ThreadPoolExecutor) -> None:
    with program() as (address, process):
        assert process.stdout is not None
        process.stdout.close()
        check_serves(address, pool)
        process.stdout = None


def test_prompts_and_answers_are_not_in_the_log(pool: ThreadPoolExecutor) -> None:
    with program(f"prompt:{MARK}:raise", config={"engine_deaths": 100}) as (address, process):
        body = {"model": "steps", "prompt": "my secret words", "max_tokens": 20}
        answer = httpx.post(address + "/v1/completions", json=body).json()["choices"][0]["text"]
        assert complete(address, [MARK, 4711], 5).status_code == 500
        until(lambda: _status(address, "/ready") == 200)
        httpx.get(f"{address}/a%0a2026-01-01T00:00:00Z%20forged%1b[31m?key=secret-key")
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=60)[1]
    assert "my secret" not in log
    assert answer not in log
    assert "4711" not in log
    assert "secret-key" not in log
    assert "forged" in log
    assert not [line for line in log.splitlines() if line.startswith("2026-01-01")]
    assert "\x1b" not in log
    assert "FaultError" in log  # what went wrong is there


@pytest.mark.parametrize("arguments", [[], ["x"], ["1", "2"]])
def test_an_engine_process_is_not_started_by_hand(arguments: list[str]) -> None:
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "mixtral serve" in result.stderr


def test_small_writes_are_sent_at_once() -> None:
    """Otherwise each event of a stream would wait for the client's system to confirm the one before."""
    with _bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP

        async def accepted() -> int:
            options: asyncio.Future[int] = asyncio.get_running_loop().create_future()

            def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                own = writer.get_extra_info("socket")
                options.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                writer.close()

            async with await asyncio.start_server(connected, sock=listener.dup()):
                with socket.create_connection(listener.getsockname()):
                    return await options

        assert asyncio.run(accepted()) == 1


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    for name in ("msgspec", "torch", "numpy", "mixtral"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w').close()\nraise SystemExit(99)\n")
    result = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 2
    assert "mixtral serve" in result.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("data", "code"), [(b"", 0), (b"\x01\x00\x00\x00\x90", 0), (b"\x00\x00\x00\x00", 1), (b"\xff" * 100, 1)]
)
def test_an_engine_process_ends_when_its_first_message_is_none(data: bytes, code: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process: subprocess.Popen[Any] = subprocess.Popen(
            [*COMMAND, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL
        )
        theirs.close()
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        assert process.wait(timeout=60) == code
