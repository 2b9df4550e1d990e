"""Faults that no other file here is about: overload, prompts far too long, lost memory, each process killed in turn."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from checks import check_error, events
from serving import PATH, alive, children, complete, engine_pid, expected, program, serving, spawn, until
from steps import CONTEXT, MARK, answer
from test_storms import idle, raw, sample

from mixtral.server import ServerConfig
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Stats

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=32) as found:
        yield found


# --- readers ----------------------------------------------------------------------------------------------------------


def gaps(address: str, prompt: list[int], count: int) -> list[float]:
    """Seconds between the events of a stream."""
    body = {"model": "steps", "prompt": prompt, "max_tokens": count, "stream": True}
    times = []
    with httpx.stream("POST", address + PATH, json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    assert len(times) > count / 2
    return [after - before for before, after in itertools.pairwise(times)]


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_readers_that_stand_still_leave_others_their_pace(pool: ThreadPoolExecutor) -> None:
    """Once they stand still they cost nothing, so the gaps between a neighbour's tokens are those of before."""
    config = ServerConfig(port=0, drain_s=1.0, buffer_bytes=16 * 1024, stall_timeout_s=120)
    with serving(spawn(0.01, slots=16), config) as (address, client, _), contextlib.ExitStack() as stack:
        gaps(address, [1], 50)
        alone = p99(gaps(address, [1], 300))
        for n in range(4):
            fields = {"max_tokens": 4000, "stream": True, "logprobs": 5}
            stack.enter_context(raw(address, [[n, m] for m in range(32)], buffer=4096, **fields))
        until(lambda: [run.paused for run in client._runs.values()] == [True] * 4, timeout_s=100)
        until(lambda: stands_still(client), timeout_s=60)
        beside = p99(gaps(address, [1], 300))
        print(f"p99 of the gaps: alone {alone:.4f} s, beside four that stand still {beside:.4f} s")
        assert beside <= max(2 * alone, 0.05)


def stands_still(client: Any) -> bool:
    """Whether the engine makes nothing for half a second, though it has requests."""
    made = client.supervisor.beat.stats.output_tokens
    time.sleep(0.5)
    return bool(made == client.supervisor.beat.stats.output_tokens)


# --- overload ---------------------------------------------------------------------------------------------------------


async def open_loop(
    address: str, rate: float, seconds: float, running: Callable[[], int]
) -> tuple[list[tuple[int, httpx.Response]], list[int]]:
    """Requests at a constant rate, whatever becomes of those before.

    Returns each response with the answers that were completed while it was waited for, and how many requests the
    engine was ``running``, every 50 ms while requests came.
    """
    answered = 0
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def one(n: int) -> tuple[int, httpx.Response]:
            nonlocal answered
            await asyncio.sleep(n / rate)
            before = answered
            response = await client.post(address + PATH, json={"model": "steps", "prompt": [n], "max_tokens": 20})
            seen = answered - before
            answered += response.status_code == 200
            return seen, response

        async def watch() -> list[int]:
            found = []
            for _ in range(int(seconds / 0.05)):
                await asyncio.sleep(0.05)
                found.append(running())
            return found

        watching = asyncio.create_task(watch())
        responses = await asyncio.gather(*(one(n) for n in range(int(rate * seconds))))
        return responses, await watching


@pytest.mark.long
@pytest.mark.slow
def test_twenty_times_what_it_can_do_costs_hardly_any_of_it() -> None:
    """An answer takes two seconds and two run at once: one a second. Twenty a second come.

    Counted, not timed: the engine computes nothing for those refused, both of its slots are in use nearly always, and
    a refusal does not wait for the queue, in which four answers are completed.
    """
    config = ServerConfig(port=0, drain_s=1.0, queue_size=4)
    with serving(spawn(0.1, slots=2), config) as (address, client, _):

        def stats() -> Stats:
            beat = client.supervisor.beat
            assert beat is not None
            return beat.stats

        until(lambda: client.supervisor.beat is not None)
        found, running = asyncio.run(open_loop(address, 20, 8, lambda: stats().running))
        good = [response for _, response in found if response.status_code == 200]
        refused = [(seen, response) for seen, response in found if response.status_code != 200]
        for _, response in refused:
            check_error(response, 503, "server_overloaded", None)
        for response in good:
            (text,) = [choice["text"] for choice in response.json()["choices"]]
            assert len(text) > 10
        until(lambda: idle(client) and stats().output_tokens == 20 * len(good))
        seen = sorted(seen for seen, _ in refused)
        busy = running.count(2) / len(running)
        full = stats().output_tokens / stats().steps
        print(
            f"{len(good)} answered, {len(refused)} refused; both slots in use {busy:.2f} of the time, {full:.2f} a step"
        )
        print(f"answers completed before a refusal: median {seen[len(seen) // 2]}, most {seen[-1]}")
        assert len(refused) > 120
        assert stats().prompt_tokens == len(good)
        assert busy > 0.7
        assert full > 1.6
        assert seen[len(seen) * 9 // 10] < 4


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompts_just_over_and_far_over_are_refused_with_both_numbers(path: str) -> None:
    def asked(count: int) -> dict[str, Any]:
        if path == "/v1/completions":
            return {"prompt": [5] * count}
        return {"messages": [{"role": "user", "content": " a" * count}]}

    with serving(spawn()) as (address, client, _):

        def post(count: int) -> httpx.Response:
            return httpx.post(address + path, json={"model": "steps", "max_tokens": 1, **asked(count)}, timeout=60)

        fits = CONTEXT - (1 if path == "/v1/completions" else 5)
        while post(fits).status_code != 200:
            fits -= 1
        assert fits > CONTEXT - 10
        for count in (fits + 1, 2 * CONTEXT, 190_000):
            response = post(count)
            param = "prompt" if path == "/v1/completions" else "messages"
            check_error(response, 400, "context_length_exceeded", param)
            message = response.json()["error"]["message"]
            assert f"{CONTEXT}" in message.replace(",", "")
            assert len(re.findall(r"\d+", message)) >= 2
        assert sample(address, "mixtral_tokens_total") == 0 or client.supervisor.restarts == 0


# --- choices that stop ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_choice_that_finds_its_stop_string_stops_computing() -> None:
    tokenizer = Tokenizer.from_version("v3")
    first, second = (
        b"".join(tokenizer.token_bytes(id) for id in answer([7], 300, choice)).decode("utf-8", "replace")
        for choice in range(2)
    )
    place = next(at for at in range(20, 60) if first[at : at + 6] not in second)
    stop = first[place : place + 6]
    with serving(spawn(0.005)) as (address, client, _):
        body = {"model": "steps", "prompt": [7], "max_tokens": 300, "n": 2, "stop": stop}
        response = httpx.post(address + PATH, json=body, timeout=60).json()
        assert [(each["text"], each["finish_reason"]) for each in response["choices"]] == [
            (first[: first.index(stop)], "stop"),
            (second, "length"),
        ]
        until(lambda: idle(client))
        beat = client.supervisor.beat
        assert beat is not None
        assert 300 < beat.stats.output_tokens < 500


# --- quarantine -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_that_only_waited_at_two_deaths_are_not_blamed(pool: ThreadPoolExecutor) -> None:
    config = ServerConfig(port=0, drain_s=1.0, engine_deaths=100)
    with serving(spawn(0.01, f"prompt:{MARK}:exit", slots=1), config) as (address, client, _):
        for n in range(2):
            first = pool.submit(complete, address, [1, n], 60)
            until(lambda: len(client._runs) == 1)
            killer = pool.submit(complete, address, [MARK], 10)
            until(lambda: len(client._runs) == 2)
            waits = pool.submit(complete, address, [5], 10)
            until(lambda: len(client._runs) == 3)
            assert first.result().status_code == 200
            for each in (killer, waits):
                check_error(each.result(), 500, "engine_dead", None)
            until(lambda: client.state == "ready")
        check_error(complete(address, [MARK], 10), 400, "request_quarantined", None)
        assert complete(address, [5], 10).json()["choices"][0]["text"] == expected([5], 10)


# --- memory and files -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_without_memory_left_refuses_and_recovers(pool: ThreadPoolExecutor) -> None:
    """Its address space is bounded to what it has and little more; many long bodies then cannot be held at once."""
    with program(delay_s=0.005) as (address, process), ThreadPoolExecutor(max_workers=40) as many:
        assert complete(address, [1], 10).status_code == 200
        (engine,) = children(process.pid)
        stream = pool.submit(complete, address, [3], 600, stream=True)
        size = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        subprocess.run(["prlimit", f"--pid={process.pid}", f"--as={size + 320 * 2**20}:unlimited"], check=True)
        body = json.dumps({"prompt": "a " * 2_000_000}).encode()

        def post(_: int) -> int:
            try:
                head = {"content-type": "application/json"}
                return httpx.post(address + "/tokenize", content=body, headers=head, timeout=60).status_code
            except httpx.HTTPError:
                return 0

        codes = list(many.map(post, range(60)))
        print(f"codes: {codes}")
        assert set(codes) <= {0, 200, 503}
        assert codes.count(200) < 60  # something was refused, or this test sees nothing
        assert events(stream.result())[-1] == "[DONE]"
        assert process.poll() is None
        assert alive(engine)
        subprocess.run(["prlimit", f"--pid={process.pid}", "--as=unlimited:unlimited"], check=True)
        assert complete(address, [1], 10).json()["choices"][0]["text"] == expected([1], 10)


# --- each process in turn ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_process_is_killed_in_turn_and_harms_what_it_had(pool: ThreadPoolExecutor) -> None:
    """Text and trial processes cost nobody else a byte; the engine costs what it had; all are back afterwards."""
    formats = {"type": "regex", "regex": "a+"}
    config = ServerConfig(port=0, drain_s=1.0, text_processes=1, engine_deaths=100)
    with serving(spawn(0.01), config, grammars=True) as (address, client, _):
        long = json.dumps({"tokens": [700]}).encode() + b" " * 70_000
        head = {"content-type": "application/json"}

        def works() -> None:
            assert httpx.post(address + "/detokenize", content=long, headers=head, timeout=60).status_code == 200
            assert complete(address, [1], 5, response_format=formats).status_code == 200

        works()
        engine = engine_pid(client)
        found = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(os.getpid())}
        texts = [pid for pid, line in found.items() if b"textchild" in line]
        trials = [pid for pid, line in found.items() if b"grammar.trial" in line]
        assert (len(texts), len(trials) > 0, engine in found) == (1, True, True)
        for pid in (*texts, *trials):
            stream = pool.submit(complete, address, [2], 150, stream=True)
            until(lambda: any(run.started for run in client._runs.values()))
            os.kill(pid, signal.SIGKILL)
            works()
            data = events(stream.result())
            assert data[-1] == "[DONE]"
            assert "".join(each["choices"][0]["text"] for each in data[:-1]) == expected([2], 150)
        assert engine_pid(client) == engine
        stream = pool.submit(complete, address, [2], 4000, stream=True)
        until(lambda: any(run.started for run in client._runs.values()))
        os.kill(engine, signal.SIGKILL)
        assert events(stream.result())[-1]["error"]["code"] == "engine_dead"
        until(lambda: client.state == "ready")
        works()
    until(lambda: not any(map(alive, [*texts, *trials, engine])))  # other children are those of other tests


# --- the table --------------------------------------------------------------------------------------------------------


def table() -> dict[str, list[tuple[str, str]]]:
    """Fault -> file and name of each test, as the documentation lists them."""
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    rows = text.split("<!-- table: faults -->")[1].split("<!-- end -->")[0].splitlines()
    found = {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 4 and "test_" in cells[3]:
            file, tests = "", []
            for place, name in re.findall(r"`([\w/]+\.py)`|\b(test_\w+)\b(?!\.py)", cells[3]):
                file = place or file
                if name:
                    tests.append((file, name))
            found[cells[0] or cells[1]] = tests
    return found


def test_every_fault_has_tests_and_they_exist() -> None:
    found = table()
    expected_rows = {f"F{number}" for number in (*range(1, 19), *range(21, 31))}
    assert expected_rows <= set(found)
    for fault, tests in found.items():
        assert tests, fault
        for file, name in tests:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {name}(" in source, (fault, file, name)


# --- what errors say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last)",
        'File "/usr/lib/python3/x.py", line 3',
        "no such file: /root/weights/model.safetensors",
        "<mixtral.engine.Engine object at 0x7f2840ec9090>",
        "mixtral.errors.ConfigError",
        "ValueError: x",
    ],
)
def test_an_error_that_leaks_is_noticed(text: str) -> None:
    body = {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": "c"}}
    with pytest.raises(AssertionError):
        check_error(httpx.Response(400, json=body, headers={"x-request-id": "a"}), 400, "c", None)
    body["error"]["message"] = "max_tokens is 7; expected at most 5"  # type: ignore[index]
    check_error(httpx.Response(400, json=body, headers={"x-request-id": "a"}), 400, "c", None)
