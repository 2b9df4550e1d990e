"""Random requests, aborts and steps on caches of very few pages: every answer is what a plain loop writes."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from driving import engine_of, submit, text
from hash_model import written
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mixtral.engine.pages import pages_for
from mixtral.engine.scheduler import MOST_PREEMPTIONS, Plan, Scheduler
from mixtral.wire import Done, Failed, SamplingParams, Submit, TokenEvent, Tokens, Update


class CheckedScheduler(Scheduler):
    """Checks each plan."""

    def plan(self) -> Plan:
        work = any(not one.request.paused for one in self.waiting + self.running)
        writing = {one.number for one in self.running if one.left == 1}
        plan = super().plan()
        assert bool(plan.pieces) == work
        assert not any(piece.sequence.request.paused for piece in plan.pieces)
        assert sum(piece.count for piece in plan.pieces) <= self.config.max_num_batched_tokens
        assert all(piece.count > 0 for piece in plan.pieces)
        answers = sum(piece.sequence.number in writing for piece in plan.pieces)
        most = self.config.max_tokens_beside_answers
        if most is not None and answers:
            assert sum(piece.count for piece in plan.pieces) <= answers + max(most - answers, most // 2)
        numbers = [piece.sequence.number for piece in plan.pieces]
        assert len(set(numbers)) == len(numbers)
        for piece in plan.pieces:
            assert piece.start == piece.sequence.computed
            assert len(self.pages.pages(piece.sequence.number)) == pages_for(len(piece.sequence.tokens))
        return plan


PROMPTS = st.builds(text, st.sampled_from([1, 2, 60, 63, 64, 65, 100, 128, 129, 192]), st.integers(0, 1))
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 2, 30, 65, 100, 130]),
    temperature=st.sampled_from([0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    seed=st.integers(0, 3),
    stop_ids=st.sampled_from([(), None, (5,)]),
    logprobs=st.sampled_from([None, 0]),
    min_tokens=st.sampled_from([0, 0, 1]),
)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, are stepped through and aborted, on caches of very few pages."""

    scheduler: ClassVar[type[Scheduler]] = CheckedScheduler
    steps: ClassVar[int] = 0

    @initialize(
        pages=st.sampled_from([3, 4, 4, 5, 6, 9]),
        seqs=st.integers(1, 5),
        budget=st.sampled_from([5, 16, 64, 100]),
        max_tokens_beside_answers=st.sampled_from([None, 2, 40]),
        prefix_cache=st.booleans(),
        speculation=st.booleans(),
    )
    def start(self, **fields: Any) -> None:
        pages, seqs, budget = (fields.pop(name) for name in ("pages", "seqs", "budget"))
        self.engine = engine_of(pages=pages, max_num_seqs=seqs, max_num_batched_tokens=budget, **fields)
        self.engine.scheduler = self.scheduler(self.engine.config, self.engine.pages)
        self.open: dict[str, Submit] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.gone: dict[str, set[int]] = {}
        self.number = 0

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=2),
        params=PARAMS,
        n=st.integers(1, 3),
        priority=st.integers(0, 1),
    )
    def submit(self, prompts: list[list[int]], params: SamplingParams, n: int, priority: int) -> None:
        scope = "ab"[self.number % 2]
        one = submit(f"{self.number}", *prompts, params=params, n=n, priority=priority, scope=scope)
        self.number += 1
        self.engine.submit(one)
        tokens = max(len(prompt) for prompt in prompts) + params.max_tokens - 1
        if pages_for(tokens) <= self.engine.pages.total:
            self.open[one.request], self.events[one.request], self.gone[one.request] = one, [], set()

    @rule(count=st.integers(1, 60))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            self.engine.abort(name)
            del self.open[name]

    @rule(data=st.data())
    def abort_one(self, data: st.DataObject) -> None:
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            one = self.open[name]
            sequence = data.draw(st.integers(0, one.n * len(one.prompts) - 1))
            self.engine.abort(name, sequence)
            self.gone[name].add(sequence)

    @rule(data=st.data(), on=st.booleans())
    def pause(self, data: st.DataObject, on: bool) -> None:
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            self.engine.pause(name, on=on)
            if on:
                waiting = [one for one in self.engine.scheduler.waiting if one.request.submit.request == name]
                assert not any(self.engine.pages.pages(one.number) for one in waiting)

    def take(self, updates: list[Update]) -> None:
        EngineMachine.steps += 1
        for update in updates:
            if isinstance(update, Failed):
                assert update.code == "request_exceeds_cache"
                continue
            assert update.request in self.open, "an update of a request that is over"
            if isinstance(update, Tokens):
                self.events[update.request] += update.events
            elif isinstance(update, Done):
                self.compare(self.open.pop(update.request))

    def compare(self, one: Submit) -> None:
        for sequence in range(one.n * len(one.prompts)):
            found = [event for event in self.events[one.request] if event.sequence == sequence]
            plain = written(one, sequence)
            assert found == (plain[: len(found)] if sequence in self.gone[one.request] else plain)

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.scheduler.check_integrity()
        stats = engine.stats()
        assert stats.running <= engine.config.max_num_seqs
        assert all(one.preemptions <= MOST_PREEMPTIONS for one in engine.scheduler.running + engine.scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for name in self.open:
            engine.pause(name, on=False)
        tokens = sum(
            one.n * sum(len(prompt) + one.params.max_tokens for prompt in one.prompts) for one in self.open.values()
        )
        bound = 10 + (MOST_PREEMPTIONS + 1) * tokens
        for _ in range(bound):
            if not engine.has_work:
                break
            self.take(engine.step())
            engine.scheduler.check_integrity()
        assert not engine.has_work, f"not done after {bound} steps"
        assert not self.open
        assert engine.stats().pages_used == 0
        engine.pages.forget()
        assert engine.pages.available == engine.pages.total == len(engine.pages._free)


def run_machine(machine: type[EngineMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_requests() -> None:
    run_machine(EngineMachine, 30, 15)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_requests_at_length() -> None:
    """At least 200,000 steps of the engine."""
    EngineMachine.steps = 0
    run_machine(EngineMachine, 500, 40)
    print(f"{EngineMachine.steps} steps")
    assert EngineMachine.steps >= 200_000


class PagesAreFreedTooLate(CheckedScheduler):
    """An aborted or finished sequence keeps its pages."""

    def finish(self, sequence: Any, reason: Any, *, damaged: bool = False) -> None:
        release, self.pages.release = self.pages.release, lambda *a, **k: None  # type: ignore[method-assign]
        super().finish(sequence, reason, damaged=damaged)
        self.pages.release = release  # type: ignore[method-assign]


class PreemptedKeepsItsPlace(CheckedScheduler):
    """A preempted sequence goes on where it was, on other pages."""

    def _start(self, sequence: Any, shared: Any) -> None:
        super()._start(sequence, shared)
        if sequence.preemptions and sequence.left > 1:
            sequence.computed += 1


class RejectedDraftsStay(CheckedScheduler):
    """A token too many counts as stored."""

    def computed(self, piece: Any, accepted: Any = ()) -> None:
        accepted = list(accepted)
        super().computed(piece, piece.drafts[: len(accepted) + 1])


class OldestIsPreempted(CheckedScheduler):
    """Whoever came first makes room."""

    def _grow(self, sequence: Any) -> bool:
        self.running.reverse()
        found = super()._grow(sequence)
        self.running.reverse()
        return found


class SiblingsDoNotWait(CheckedScheduler):
    """Pages of a prompt are shared before they are computed."""

    def _admit(self, plan: Plan, room: int) -> None:
        for one in self.waiting:
            one.request.ready = [True] * len(one.request.ready)
        super()._admit(plan, room)

    def _shared(self, sequence: Any, leader: Any) -> list[int]:
        if leader is not sequence and leader.phase.value == "running":
            return self.pages.fork(leader.number, sequence.prompt_length - 1)
        return super()._shared(sequence, leader)


class PausedKeepsItsPages(CheckedScheduler):
    """A request that is paused is worked on all the same."""

    def pause(self, request: Any, *, on: bool) -> None:
        request.paused = on


class TooManyTokens(CheckedScheduler):
    """The budget is not kept."""

    def _piece(self, sequence: Any, room: int) -> Any:
        return super()._piece(sequence, room + 1)


@pytest.mark.parametrize(
    "fault",
    [
        PagesAreFreedTooLate,
        pytest.param(PreemptedKeepsItsPlace, marks=[pytest.mark.slow, pytest.mark.long]),
        RejectedDraftsStay,
        pytest.param(OldestIsPreempted, marks=[pytest.mark.slow, pytest.mark.long]),
        SiblingsDoNotWait,
        pytest.param(PausedKeepsItsPages, marks=[pytest.mark.slow, pytest.mark.long]),
        TooManyTokens,
    ],
)
def test_the_machine_sees_a_planted_fault(fault: type[Scheduler]) -> None:
    machine = type("Faulty", (EngineMachine,), {"scheduler": fault})
    with pytest.raises(Exception):  # noqa: B017 - whatever notices first
        run_machine(machine, 300, 20)
