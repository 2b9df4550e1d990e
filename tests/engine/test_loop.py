"""The loop behind a channel: what goes in, what comes out and in which order, and how an engine ends."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from steps import HELLO, MARK, StepEngine, answer

from mixtral import faults
from mixtral.engine.loop import EngineThread, merged
from mixtral.errors import ConfigError
from mixtral.wire import (
    Abort,
    Channel,
    ChannelClosedError,
    ChannelError,
    Done,
    Failed,
    FromEngine,
    Heartbeat,
    Hello,
    Pause,
    SamplingParams,
    Scheduled,
    Started,
    Submit,
    TokenEvent,
    Tokens,
    Update,
)


class Harness:
    """An engine in a thread and the other end of its channel."""

    def __init__(self, engine: StepEngine, beat_s: float = 0.02) -> None:
        self.engine = engine
        self.thread = EngineThread(lambda: (engine, HELLO), beat_s=beat_s)
        self.channel: Channel[Any] = Channel(self.thread.sock, FromEngine)
        self.beats: list[Heartbeat] = []
        self.scheduled: list[Scheduled] = []
        self.seen: list[Any] = []

    def submit(self, request: str, *prompts: list[int], **fields: Any) -> None:
        params = SamplingParams(max_tokens=fields.pop("max_tokens", 5))
        self.channel.send([Submit(request=request, prompts=list(prompts), params=params, **fields)])

    def until(self, condition: Callable[[], bool]) -> None:
        """Take messages until the condition holds."""
        end = time.monotonic() + 60
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"it did not come: {self.seen}")
            for message in self.channel.receive(wait=True):
                places = {Heartbeat: self.beats, Scheduled: self.scheduled}
                places.get(type(message), self.seen).append(message)

    def ended(self, *requests: str) -> Callable[[], bool]:
        return lambda: set(requests) <= {m.request for m in self.seen if isinstance(m, Done | Failed)}

    def ids(self, request: str, sequence: int = 0) -> list[int]:
        mine = [m for m in self.seen if isinstance(m, Tokens) and m.request == request]
        return [event.id for m in mine for event in m.events if event.sequence == sequence]


@pytest.fixture
def start() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(**fields: Any) -> Harness:
        made.append(Harness(StepEngine(**fields)))
        return made[-1]

    yield make
    faults.install([])
    for each in made:
        each.channel.close()
        assert each.thread.wait(60) is not None


def test_hello_comes_first_and_requests_get_all_their_updates(start: Callable[..., Harness]) -> None:
    harness = start()
    harness.submit("a", [1, 2, 3], max_tokens=7)
    harness.submit("b", [4], [5, 6], n=2)
    harness.until(harness.ended("a", "b"))
    assert isinstance(harness.seen[0], Hello)
    assert harness.ids("a") == answer([1, 2, 3], 7)
    for sequence, (prompt, choice) in enumerate([([4], 0), ([4], 1), ([5, 6], 0), ([5, 6], 1)]):
        assert harness.ids("b", sequence) == answer(prompt, 5, choice)
    for request in "ab":
        kinds = [type(m) for m in harness.seen[1:] if m.request == request]
        assert kinds == [Started, *[Tokens] * (len(kinds) - 2), Done]


def test_requests_that_come_during_others_are_taken_between_steps(start: Callable[..., Harness]) -> None:
    harness = start(delay_s=0.01)
    harness.submit("long", [1], max_tokens=60)
    harness.until(lambda: len(harness.ids("long")) > 5)
    harness.submit("short", [2], max_tokens=3)
    harness.until(harness.ended("short"))
    assert len(harness.ids("long")) < 40
    harness.until(harness.ended("long"))
    assert harness.ids("long") == answer([1], 60)


def test_nothing_comes_after_an_abort(start: Callable[..., Harness]) -> None:
    harness = start(delay_s=0.005)
    harness.submit("a", [1], max_tokens=4000)
    harness.submit("b", [2], max_tokens=50)
    harness.until(lambda: len(harness.ids("a")) > 3)
    harness.channel.send([Abort(request="a"), Abort(request="a"), Abort(request="unknown")])
    harness.until(harness.ended("b"))
    assert harness.ids("b") == answer([2], 50)
    assert not harness.ended("a")()
    assert harness.engine.requests == {}
    at = max(place for place, m in enumerate(harness.seen) if isinstance(m, Tokens) and m.request == "a")
    assert sum(isinstance(m, Tokens) and m.request == "b" for m in harness.seen[at:]) > 30


def test_what_a_step_works_on_is_told_before_it(start: Callable[..., Harness]) -> None:
    harness = start(slots=2, delay_s=0.005)
    for name in "abc":
        harness.submit(name, [ord(name)], max_tokens=30 if name == "a" else 10)
    harness.until(harness.ended(*"abc"))
    told = [each.requests for each in harness.scheduled]
    assert told[-3:] == [["a", "b"], ["a", "c"], ["a"]] or told[-2:] == [["a", "b"], ["a", "c"]]
    assert len(told) <= 4  # not in every step
    assert harness.ids("a") == answer([ord("a")], 30)


def test_a_paused_request_waits_and_then_goes_on(start: Callable[..., Harness]) -> None:
    harness = start(delay_s=0.002)
    harness.submit("a", [1], max_tokens=400)
    harness.submit("b", [2], max_tokens=350)
    harness.until(lambda: len(harness.ids("a")) > 3)
    harness.channel.send([Pause(request="a", on=True), Pause(request="unknown", on=True)])
    harness.until(harness.ended("b"))
    made = len(harness.ids("a"))
    assert made < 340
    before = harness.engine.counts["steps"]
    time.sleep(0.05)
    assert harness.engine.counts["steps"] - before <= 1  # an engine whose requests are all paused rests
    harness.channel.send([Pause(request="a", on=False)])
    harness.until(harness.ended("a"))
    assert harness.ids("a") == answer([1], 400)


def test_a_refused_request_fails_alone(start: Callable[..., Harness]) -> None:
    harness = start()
    harness.submit("good", [1], max_tokens=20)
    harness.submit("large", [1], max_tokens=100_000)
    harness.until(harness.ended("good", "large"))
    failed = next(m for m in harness.seen if isinstance(m, Failed))
    assert (failed.request, failed.code, failed.param) == ("large", "request_exceeds_cache", "prompt")
    assert harness.ids("good") == answer([1], 20)
    assert harness.thread.poll() is None


def test_a_failing_step_fails_every_open_request_and_ends_the_engine(start: Callable[..., Harness]) -> None:
    faults.install(["step:5:raise"])
    harness = start(slots=2)
    for number in range(4):
        harness.submit(f"{number}", [number], max_tokens=50 if number else 2)
    harness.until(harness.ended(*"0123"))
    failed = [m for m in harness.seen if isinstance(m, Failed)]
    assert {m.request for m in failed} == {"1", "2", "3"}
    assert {m.code for m in failed} == {"engine_dead"}
    assert "FaultError" not in failed[0].message
    with pytest.raises(ChannelClosedError):
        harness.until(lambda: False)
    assert harness.thread.wait(60) == 1


def test_a_marked_prompt_fails_the_engine(start: Callable[..., Harness]) -> None:
    faults.install([f"prompt:{MARK}:raise"])
    harness = start()
    harness.submit("a", [1], max_tokens=2)
    harness.until(harness.ended("a"))
    harness.submit("b", [1, MARK], max_tokens=2)
    harness.until(harness.ended("b"))
    assert isinstance(harness.seen[-1], Failed)


def test_heartbeats_tell_of_a_step_that_lasts_and_of_those_that_ended(start: Callable[..., Harness]) -> None:
    harness = start(delay_s=0.2)
    harness.submit("a", [1], max_tokens=3)
    harness.until(harness.ended("a"))
    harness.until(lambda: sum(len(beat.seconds) for beat in harness.beats) == 3)
    assert max(beat.step_age for beat in harness.beats) > 0.1
    assert all(0.2 <= seconds < 5 for beat in harness.beats for seconds in beat.seconds)
    harness.until(lambda: harness.beats[-1].stats.output_tokens == 3 and harness.beats[-1].stats.running == 0)
    assert harness.beats[-1].step == 3
    assert harness.beats[-1].step_age == 0.0


def test_an_idle_engine_uses_no_processor_time(start: Callable[..., Harness]) -> None:
    harness = start()
    harness.until(lambda: len(harness.beats) > 1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.5)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.2


def test_a_closed_channel_ends_it_during_work_too(start: Callable[..., Harness]) -> None:
    harness = start(delay_s=0.01)
    harness.submit("a", [1], max_tokens=4000)
    harness.until(lambda: len(harness.ids("a")) > 2)
    harness.channel.close()
    assert harness.thread.wait(60) == 0


def test_an_engine_that_cannot_be_built_says_why() -> None:
    def build() -> Any:
        raise ConfigError("no such model", param="model")

    thread = EngineThread(build)
    channel: Channel[Any] = Channel(thread.sock, FromEngine)
    refusal = Failed(request="", code="invalid_config", message="no such model", param="model")
    assert channel.receive(wait=True) == [refusal]
    assert thread.wait(60) == 2
    channel.close()


def test_an_engine_whose_building_breaks_ends_with_1() -> None:
    def build() -> Any:
        raise ZeroDivisionError

    thread = EngineThread(build)
    assert thread.wait(60) == 1
    with thread.sock, pytest.raises(ChannelClosedError):
        Channel[Any](thread.sock, FromEngine).receive(wait=True)


@pytest.mark.parametrize(("kind", "says"), [("short", "bytes of a frame"), ("garbage", "a frame"), ("close", "closed")])
def test_a_broken_channel_is_seen(start: Callable[..., Harness], kind: str, says: str) -> None:
    faults.install([f"ipc:{kind}"])
    harness = start()
    harness.submit("a", [1], max_tokens=500)
    with pytest.raises(ChannelError, match=says):
        harness.until(lambda: False)
    assert harness.thread.wait(60) == 0


def test_what_the_engine_was_not_told_to_expect_ends_it(start: Callable[..., Harness]) -> None:
    harness = start()
    harness.submit("a", [1], max_tokens=4000)
    harness.submit("a", [1], max_tokens=4000)  # one id, twice
    harness.until(harness.ended("a"))
    assert harness.thread.wait(60) == 1


def test_tokens_of_one_request_are_merged_in_order() -> None:
    def tokens(request: str, *ids: int) -> Tokens:
        return Tokens(request=request, events=[TokenEvent(sequence=0, id=id) for id in ids])

    updates: list[Update] = [
        Started(request="a", cached=(0,)),
        tokens("a", 1),
        tokens("b", 10, 11),
        tokens("a", 2, 3),
        Done(request="a"),
        tokens("b", 12),
        Failed(request="b", code="x", message="y"),
    ]
    assert merged(updates) == [
        Started(request="a", cached=(0,)),
        tokens("a", 1, 2, 3),
        tokens("b", 10, 11, 12),
        Done(request="a"),
        Failed(request="b", code="x", message="y"),
    ]
    assert len(updates[1].events) == 1  # type: ignore[union-attr]
    apart: list[Update] = [tokens("a", 1), Failed(request="a", code="x", message="y"), tokens("a", 2)]
    assert merged(apart) == apart


def test_a_heartbeat_waits_for_no_step() -> None:
    engine = StepEngine()
    hold = threading.Event()
    step = engine.step
    engine.step = lambda begin=None: step() if hold.wait(60) else []  # type: ignore[method-assign]
    thread = EngineThread(lambda: (engine, HELLO), beat_s=0.02)
    channel: Channel[Any] = Channel(thread.sock, FromEngine)
    channel.send([Submit(request="a", prompts=[[1]], params=SamplingParams())])
    end = time.monotonic() + 60
    ages: list[float] = []
    while max(ages, default=0) < 0.2 and time.monotonic() < end:
        ages += [m.step_age for m in channel.receive(wait=True) if isinstance(m, Heartbeat)]
    assert max(ages) >= 0.2
    channel.close()
    hold.set()
    assert thread.wait(60) == 0
