"""Engines that die, hang or talk nonsense under load: every request ends in time, and the next engine serves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from checks import check_error, events
from serving import alive, complete, engine_pid, expected, lives, serving, spawn, until
from steps import MARK

from mixtral.errors import ConfigError, EngineError
from mixtral.server import ServerConfig
from mixtral.server.client import Client

QUICK = ServerConfig(port=0, drain_s=1.0, engine_stall_s=0.6, engine_deaths=100)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=64) as found:
        yield found


def opened(client: Client) -> int:
    """Requests in the engine, as it said last."""
    beat = client.supervisor.beat
    return -1 if beat is None else beat.stats.running + beat.stats.waiting


def texts(data: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in data if "choices" in event)


def begin(pool: ThreadPoolExecutor, address: str, client: Client) -> list[Future[httpx.Response]]:
    """Four streams and two whole answers that are running."""
    asked = [pool.submit(complete, address, [n, 7], 4000, stream=n < 4) for n in range(6)]
    until(lambda: opened(client) == 6)
    time.sleep(0.1)
    return asked


def check_ends(asked: list[Future[httpx.Response]]) -> None:
    """Each ended with the error that says what happened, and with nothing that looks like success."""
    for n, future in enumerate(asked):
        response = future.result(timeout=60)
        if n >= 4 or response.status_code == 500:  # or its stream had not begun yet
            check_error(response, 500, "engine_dead", None)
            assert response.headers["x-should-retry"] == "false"
            continue
        data = events(response)
        assert data[-1]["error"]["code"] == "engine_dead"
        assert "[DONE]" not in data
        assert not [event for event in data[:-1] if event["choices"][0]["finish_reason"]]
        assert expected([n, 7], 4000).startswith(texts(data[:-1])[:40])


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_lost_engine_is_reported_and_replaced(pool: ThreadPoolExecutor, how: str) -> None:
    with serving(spawn(0.01), QUICK) as (address, client, _):
        asked = begin(pool, address, client)
        pid = engine_pid(client)
        os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        until(lambda: httpx.get(address + "/health").status_code == 503)
        check_ends(asked)
        until(lambda: httpx.get(address + "/ready").status_code == 200)
        assert httpx.get(address + "/health").json() == {"status": "ok"}
        assert not alive(pid)
        assert engine_pid(client) != pid
        assert complete(address, [5, 7], 10).json()["choices"][0]["text"] == expected([5, 7], 10)
        lines = httpx.get(address + "/metrics").text.splitlines()
        assert "mixtral_engine_restarts_total 1.0" in lines
        assert "mixtral_engine_up 1.0" in lines
        assert "mixtral_running 0.0" in lines


@pytest.mark.parametrize("point", ["step:20:raise", "step:20:exit", "step:20:hang"])
def test_a_failing_step_is_reported_and_the_engine_replaced(pool: ThreadPoolExecutor, point: str) -> None:
    with serving(lives(spawn(0.02, point), spawn()), QUICK) as (address, client, _):
        asked = [pool.submit(complete, address, [n, 7], 4000, stream=n < 4) for n in range(6)]
        check_ends(asked)
        until(lambda: client.state == "ready")
        assert complete(address, [5, 7], 10).status_code == 200


@pytest.mark.parametrize("kind", ["short", "garbage", "close"])
def test_an_engine_that_talks_nonsense_is_replaced(pool: ThreadPoolExecutor, kind: str) -> None:
    with serving(lives(spawn(0.02, f"ipc:{kind}"), spawn()), QUICK) as (address, client, _):
        asked = [pool.submit(complete, address, [n, 7], 4000, stream=n < 4) for n in range(6)]
        codes = []
        for response in (future.result(timeout=60) for future in asked):
            if response.status_code == 200:  # its first tokens came before the nonsense did
                codes.append(events(response)[-1]["error"]["code"])
            else:
                codes.append(response.json()["error"]["code"])
        assert "engine_dead" in codes
        assert set(codes) <= {"engine_dead", "engine_restarting"}  # or came when it was over
        until(lambda: client.state == "ready")
        assert complete(address, [5, 7], 10).status_code == 200


@pytest.mark.slow
def test_until_it_is_ready_requests_are_told_to_come_back() -> None:
    with serving(spawn(load_s=1.0), wait=False) as (address, client, _):
        assert httpx.get(address + "/health").json() == {"status": "starting"}
        assert httpx.get(address + "/ready").status_code == 503
        response = complete(address, [1])
        check_error(response, 503, "model_loading", None)
        assert 1 <= int(response.headers["retry-after"]) <= 60
        until(lambda: client.state == "ready")
        os.kill(engine_pid(client), signal.SIGKILL)
        until(lambda: client.state == "restarting")
        for path in ("/health", "/ready"):
            assert httpx.get(address + path).json() == {"status": "restarting"}
        response = complete(address, [1])
        check_error(response, 503, "engine_restarting", None)
        assert 1 <= int(response.headers["retry-after"]) <= 60
        until(lambda: client.state == "ready")
        assert complete(address, [1]).status_code == 200


def test_an_engine_that_cannot_be_built_ends_the_server() -> None:
    with serving(spawn(model="broken"), wait=False, fails=True) as (_, _, server):
        until(lambda: server.fault is not None)
        assert isinstance(server.fault, ConfigError)
        assert str(server.fault) == "there is no model 'broken'"
        assert server.fault.param == "model"


def test_an_engine_that_dies_again_and_again_ends_the_server() -> None:
    with serving(spawn(0.0, "step:1:exit"), fails=True) as (address, client, server):
        for n in range(3):
            until(lambda: client.state == "ready")
            check_error(complete(address, [n]), 500, "engine_dead", None)
        until(lambda: server.fault is not None)
        assert isinstance(server.fault, EngineError)
        assert "3 times" in str(server.fault)


def test_deaths_long_ago_do_not_count() -> None:
    config = ServerConfig(port=0, drain_s=1.0, engine_deaths=2, engine_deaths_within_s=0.2)
    with serving(spawn(0.0, "step:1:exit"), config) as (address, client, _):
        for n in range(3):
            until(lambda: client.state == "ready")
            assert complete(address, [n]).status_code == 500
            time.sleep(0.25)
        until(lambda: client.state == "ready")


def test_a_restarted_engine_that_cannot_be_built_ends_the_server() -> None:
    with serving(lives(spawn(0.0, "step:1:exit"), spawn(model="broken")), fails=True) as (address, _, server):
        assert complete(address, [1]).status_code == 500
        until(lambda: server.fault is not None)
        assert isinstance(server.fault, EngineError)
        assert "there is no model 'broken'" in str(server.fault)


@pytest.mark.slow
def test_a_request_that_kills_twice_is_not_run_a_third_time(pool: ThreadPoolExecutor) -> None:
    with serving(spawn(0.01, f"prompt:{MARK}:exit"), fails=True) as (address, client, server):
        for n in range(2):
            bystander = pool.submit(complete, address, [n], 4000)
            until(lambda: opened(client) == 1)
            check_error(complete(address, [4, MARK], 30, seed=n), 500, "engine_dead", None)
            check_error(bystander.result(), 500, "engine_dead", None)
            until(lambda: client.state == "ready")
        for seed in range(5):
            response = complete(address, [4, MARK], 30, seed=seed)
            check_error(response, 400, "request_quarantined", None)
        assert complete(address, [0], 10).status_code == 200  # was there at one death alone
        assert complete(address, [4, 5], 30).status_code == 200
        assert server.fault is None
        # Another body with the mark is another request: it costs the third life.
        assert complete(address, [MARK], 30).status_code == 500
        until(lambda: server.fault is not None)
    assert isinstance(server.fault, EngineError)


def test_numbers_that_are_not_finite_end_one_request_only(pool: ThreadPoolExecutor) -> None:
    with serving(spawn(0.01, f"logits:nan:{MARK}")) as (address, _, _):
        good = [pool.submit(complete, address, [n], 50) for n in range(3)]
        response = complete(address, [1, MARK])
        check_error(response, 500, "numerical_error", None)
        assert response.headers["x-should-retry"] == "false"
        data = events(complete(address, [1, MARK], stream=True))
        assert data[-1]["error"]["code"] == "numerical_error"
        assert [each.result().json()["choices"][0]["text"] for each in good] == [expected([n], 50) for n in range(3)]


def test_what_the_engine_refuses_is_a_400() -> None:
    with serving(spawn()) as (address, _, _):
        # The server's own checks come first; this one is the engine's, which knows its cache.
        response = complete(address, [1] * 10, 4095)
        assert (response.status_code, response.json()["error"]["code"]) in [
            (400, "context_length_exceeded"),
            (400, "request_exceeds_cache"),
        ]


def test_an_idle_server_and_engine_use_no_processor_time() -> None:
    with serving(spawn()) as (_, client, _):
        pid = engine_pid(client)

        def ticks() -> int:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before, own = ticks(), time.process_time()
        time.sleep(0.7)
        assert ticks() - before <= 10  # hundredths of a second
        assert time.process_time() - own < 0.3


def test_the_wall_clock_may_jump(monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> None:
    now = time.time
    jump = 0.0
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    config = ServerConfig(port=0, drain_s=1.0, engine_stall_s=10.0)
    with serving(spawn(0.01), config) as (address, client, _):
        asked = [pool.submit(complete, address, [n], 60, stream=n == 0) for n in range(3)]
        until(lambda: opened(client) == 3)
        for step in (1e9, -1e9, 3600.0):
            jump += step
            time.sleep(0.1)
        assert events(asked[0].result())[-1] == "[DONE]"
        assert {each.result().json()["choices"][0]["finish_reason"] for each in asked[1:]} == {"length"}
        assert client.supervisor.restarts == 0


@pytest.mark.slow
def test_a_server_that_stood_still_does_not_blame_the_engine(pool: ThreadPoolExecutor) -> None:
    """The event loop is blocked for longer than a stall may last; what the engine said meanwhile is read first."""
    config = ServerConfig(port=0, drain_s=1.0, engine_stall_s=1.2)
    with serving(spawn(0.02), config) as (address, client, server):
        asked = pool.submit(complete, address, [1], 100)
        until(lambda: opened(client) == 1)
        server._loop.call_soon_threadsafe(time.sleep, 1.8)
        assert asked.result().json()["choices"][0]["text"] == expected([1], 100)
        assert client.supervisor.restarts == 0
