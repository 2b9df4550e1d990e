"""The client by itself: buffers of slow readers, quarantine, engines in a thread, and one that turns into another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from steps import HELLO, MARK, StepEngine, answer

from mixtral.engine.loop import EngineThread
from mixtral.errors import EngineError
from mixtral.server import Client, ServerConfig
from mixtral.server.client import ClientRun, Quarantine
from mixtral.server.errors import ApiError
from mixtral.wire import (
    Abort,
    Constraint,
    Done,
    Failed,
    Pause,
    PromptScores,
    PromptToken,
    SamplingParams,
    Started,
    Submit,
    ToEngine,
    TokenEvent,
    Tokens,
    Update,
)


def submission(prompt: list[int], request: str = "a", max_tokens: int = 10, **fields: Any) -> Submit:
    return Submit(request=request, prompts=[prompt], params=SamplingParams(max_tokens=max_tokens), **fields)


def tokens(*ids: int) -> Tokens:
    return Tokens(request="a", events=[TokenEvent(sequence=0, id=id) for id in ids])


# --- buffers ----------------------------------------------------------------------------------------------------------


def buffered(updates: list[Update], config: ServerConfig | None = None) -> tuple[ClientRun, list[ToEngine]]:
    """A run that got these updates before anybody read, and what it told the engine."""
    told: list[ToEngine] = []
    run = ClientRun(submission([1]), config or ServerConfig(), send=told.append)
    for update in updates:
        run.put(update)
    return run, told


async def drained(run: ClientRun) -> list[Update | None]:
    return [update async for update in run]


def test_tokens_that_wait_are_put_together() -> None:
    async def act() -> list[Update | None]:
        run, _ = buffered([Started(request="a", cached=(0,)), tokens(1), tokens(2, 3), tokens(4), Done(request="a")])
        return await drained(run)

    assert asyncio.run(act()) == [Started(request="a", cached=(0,)), tokens(1, 2, 3, 4), Done(request="a")]


def test_an_error_comes_after_what_came_before_it() -> None:
    async def act() -> None:
        run, _ = buffered([tokens(1), Failed(request="a", code="numerical_error", message="why")])
        assert await anext(run) == tokens(1)
        for _ in range(2):
            with pytest.raises(ApiError) as caught:
                await anext(run)
            assert (caught.value.status, caught.value.code, caught.value.message) == (500, "numerical_error", "why")

    asyncio.run(act())


@pytest.mark.parametrize(
    ("code", "status"),
    [("request_exceeds_cache", 400), ("grammar_invalid", 400), ("grammar_failed", 500), ("what_is_this", 500)],
)
def test_codes_of_the_engine_have_a_status(code: str, status: int) -> None:
    async def act() -> ApiError:
        run, _ = buffered([Failed(request="a", code=code, message="m", param="p")])
        with pytest.raises(ApiError) as caught:
            await anext(run)
        return caught.value

    error = asyncio.run(act())
    assert (error.status, error.code, error.param) == (status, code, "p")
    assert ("x-should-retry" in error.headers) == (status == 500)


def test_a_pause_is_none_and_loses_nothing() -> None:
    async def act() -> list[Update | None]:
        run, _ = buffered([], ServerConfig(wait_note_s=0.05))
        first = await anext(run)
        run.put(tokens(1))
        second = await anext(run)
        waits = asyncio.ensure_future(anext(run))
        await asyncio.sleep(0)
        waits.cancel()  # a reader that gave up, and comes again
        await asyncio.gather(waits, return_exceptions=True)
        run.put(tokens(2))
        run.put(Done(request="a"))
        return [first, second, *await drained(run)]

    assert asyncio.run(act()) == [None, tokens(1), tokens(2), Done(request="a")]


def test_a_reader_far_behind_pauses_its_request_until_it_has_caught_up() -> None:
    config = ServerConfig(buffer_bytes=4096)
    pause, go_on = Pause(request="a", on=True), Pause(request="a", on=False)

    async def act() -> None:
        run, told = buffered([tokens(*range(20))], config)
        assert told == []
        run.put(tokens(*range(20)))  # 40 events of 128 bytes
        assert told == [pause]
        run.put(tokens(1, 2))  # was on its way
        assert told == [pause]
        assert len(run._waiting) == 1
        assert await anext(run) == tokens(*range(20), *range(20), 1, 2)
        assert told == [pause, go_on]
        assert run._bytes == 0
        for _ in range(2):
            run.put(tokens(*range(40)))
        run.put(Done(request="a"))
        assert told == [pause, go_on, pause]
        assert len(await drained(run)) == 2
        assert told == [pause, go_on, pause]  # it is done: there is nothing to go on with

    asyncio.run(act())


def test_one_sequence_is_aborted_as_long_as_there_is_something_to_abort() -> None:
    async def act() -> list[ToEngine]:
        run, told = buffered([tokens(1)])
        run.abort(3)
        run.put(Done(request="a"))
        run.abort(2)
        return told

    assert asyncio.run(act()) == [Abort(request="a", sequence=3)]


def test_scores_of_a_long_prompt_are_no_stall() -> None:
    async def act() -> list[ToEngine]:
        scores = PromptScores(request="a", prompt=0, tokens=[PromptToken(id=1)] * 30_000)
        return buffered([scores, tokens(1)], ServerConfig(buffer_bytes=1024))[1]

    assert asyncio.run(act()) == []


# --- quarantine -------------------------------------------------------------------------------------------------------


def test_two_recent_deaths_make_a_quarantine() -> None:
    now = [0.0]
    quarantine = Quarantine(600.0, clock=lambda: now[0])
    killer, other = submission([1, 2]), submission([3])
    quarantine.note([killer, killer, other])
    assert not quarantine.holds(killer)  # once, however often it was there
    now[0] = 10.0
    quarantine.note([killer, submission([4])])
    assert quarantine.holds(killer)
    assert not quarantine.holds(other)
    now[0] = 601.0
    assert not quarantine.holds(killer)
    quarantine.note([killer])
    assert quarantine.holds(killer)


def test_what_makes_two_requests_the_same() -> None:
    base = submission([1, 2])
    key = Quarantine.key
    replace = msgspec.structs.replace
    same = [
        replace(base, request="b", scope="x", priority=3),
        replace(base, params=replace(base.params, seed=7)),
    ]
    others = [
        submission([1, 2, 3]),
        submission([1, 2], max_tokens=11),
        replace(base, n=2),
        replace(base, constraint=Constraint(text="x")),
        replace(base, params=replace(base.params, temperature=0.5)),
    ]
    assert {key(each) for each in same} == {key(base)}
    assert len({key(each) for each in [base, *others]}) == 1 + len(others)


# --- engines in a thread ----------------------------------------------------------------------------------------------


def with_client(
    act: Callable[[Client], Awaitable[None]], *engines: Callable[[], Any], config: ServerConfig | None = None
) -> Client:
    """Run ``act`` with a client over engines in threads: each start takes the next one, or the last again."""
    left = list(engines or [lambda: (StepEngine(), HELLO)])

    async def run() -> Client:
        make = lambda: EngineThread(left.pop(0) if len(left) > 1 else left[0], beat_s=0.02)  # noqa: E731
        client = Client(make, config or ServerConfig())
        await client.start()
        try:
            await client.until_ready()
            await act(client)
        finally:
            await client.close()
        return client

    return asyncio.run(run())


async def generated(client: Client, submit: Submit) -> list[int]:
    async with client.run(submit) as run:
        updates = [update async for update in run]
    assert isinstance(updates[0], Started)
    assert isinstance(updates[-1], Done)
    return [event.id for each in updates if isinstance(each, Tokens) for event in each.events]


def test_many_requests_at_once_over_one_channel() -> None:
    async def act(client: Client) -> None:
        submits = [submission([n, n + 1], f"r{n}", 30) for n in range(50)]
        found = await asyncio.gather(*(generated(client, submit) for submit in submits))
        assert found == [answer([n, n + 1], 30) for n in range(50)]
        assert not client.busy

    with_client(act)


def test_leaving_the_block_ends_the_request_in_the_engine() -> None:
    engine = StepEngine(delay_s=0.002)

    async def act(client: Client) -> None:
        async with client.run(submission([1], max_tokens=4000)) as run:
            async for update in run:
                if isinstance(update, Tokens):
                    break
        assert await generated(client, submission([2], "b")) == answer([2], 10)
        assert engine.requests == {}

    with_client(act, lambda: (engine, HELLO))


def test_before_it_is_ready_everything_says_so() -> None:
    async def act() -> None:
        client = Client(lambda: EngineThread(lambda: (StepEngine(), HELLO)), ServerConfig())
        for get in (lambda: client.name, lambda: client.tokenizer, lambda: client.context, lambda: client.fingerprint):
            with pytest.raises(ApiError) as caught:
                get()
            assert (caught.value.status, caught.value.code) == (503, "model_loading")
        with pytest.raises(ApiError, match="being loaded"):
            await client.run(submission([1])).__aenter__()
        await client.start()
        await client.until_ready()
        assert (client.name, client.context, client.layers, client.experts) == ("steps", 4096, 2, 4)
        assert client.tokenizer.version == "v3"
        await client.close()
        with pytest.raises(ApiError, match="shutting down"):
            await client.run(submission([1])).__aenter__()

    asyncio.run(act())


def test_an_engine_that_became_another_model_is_not_used() -> None:
    other = msgspec.structs.replace(HELLO, fingerprint="fp_other")
    smaller = msgspec.structs.replace(HELLO, cache_tokens=100)

    def failing() -> Any:
        engine = StepEngine()
        engine.step = lambda begin=None: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        return engine, HELLO

    async def act(client: Client) -> None:
        with pytest.raises(ApiError):
            await generated(client, submission([1]))
        error = await asyncio.wait_for(client.until_ended(), 10)
        assert isinstance(error, EngineError)
        assert client.state == "dead"

    with_client(act, failing, lambda: (StepEngine(), other), config=ServerConfig(engine_deaths=2))

    async def goes_on(client: Client) -> None:
        with pytest.raises(ApiError):
            await generated(client, submission([1]))
        while client.state != "ready":
            await asyncio.sleep(0.01)
        assert await generated(client, submission([1])) == answer([1], 10)
        assert client.cache_tokens == 100

    with_client(goes_on, failing, lambda: (StepEngine(), smaller))


class Deaf:
    """A worker that ends only when it is killed."""

    pid = 0

    def __init__(self) -> None:
        self.sock, self.other = socket.socketpair()
        self.killed = False

    def poll(self) -> int | None:
        return -9 if self.killed else None

    def kill(self) -> None:
        self.killed = True


def test_an_engine_is_ended_also_if_the_client_is_closed_while_it_waits_for_that() -> None:
    async def act() -> None:
        worker = Deaf()
        client = Client(lambda: worker, ServerConfig())
        await client.start()
        await asyncio.sleep(0.1)
        worker.other.sendall(b"\xff" * 64)  # no frame: its channel is given up, and it gets time to end
        await asyncio.sleep(0.3)
        assert not worker.killed
        await client.close()
        assert worker.killed
        worker.other.close()

    asyncio.run(act())


def test_aborting_ends_what_is_open_with_the_reason() -> None:
    async def act(client: Client) -> None:
        async with client.run(submission([MARK], max_tokens=4000)) as run:
            await anext(run)
            client.drain()
            assert client.state == "draining"
            assert client.busy
            client.abort()
            with pytest.raises(ApiError, match="shutting down"):
                await drained(run)
        assert not client.busy

    with_client(act, lambda: (StepEngine(delay_s=0.005), HELLO))
