"""The engine over a model that sees every wrong page: what it tells, and a state machine of requests against plain loops."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import choosing
import numpy as np
import pytest
from hash_model import EOS, EXPERTS, LAYERS, NAN_TOKEN, HashModel, V, picks_of, row_of, states_of, written
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.engine.pages import pages_for
from mixtral.engine.scheduler import MOST_PASSED, MOST_PREEMPTIONS, Plan, Scheduler
from mixtral.errors import ConfigError, RequestError
from mixtral.wire import (
    Constraint,
    Done,
    Failed,
    PromptScores,
    SamplingParams,
    Started,
    Submit,
    TokenEvent,
    Tokens,
    Update,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, seed=1, stop_ids=())


class SteadyCosts:
    """Every step takes the same time, so that drafts always pay."""

    def observe(self, tokens: int, seconds: float) -> None:
        pass

    def of(self, tokens: int) -> float:
        return 1.0 + 0.001 * tokens


def engine_of(model: HashModel | None = None, **fields: Any) -> Engine:
    found = Engine(model or HashModel(), EngineConfig(**{"pages": 64, **fields}))  # type: ignore[arg-type]
    found._costs = SteadyCosts()  # type: ignore[assignment]
    return found


def text(length: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 31 + place * place // 7 + place) % 6 for place in range(length)]


def submit(name: str, *prompts: list[int], params: SamplingParams = GREEDY, **fields: Any) -> Submit:
    return Submit(request=name, prompts=list(prompts), params=params, **fields)


def finish(engine: Engine, limit: int = 10_000) -> list[Update]:
    """Step until nothing is left to do."""
    updates: list[Update] = []
    for _ in range(limit):
        if not engine.has_work:
            engine.scheduler.check_integrity()
            assert engine.stats().pages_used == 0
            return updates
        updates += engine.step()
        engine.scheduler.check_integrity()
    raise AssertionError(f"not done after {limit} steps")


def events_of(updates: list[Update], name: str) -> list[TokenEvent]:
    return [event for one in updates if isinstance(one, Tokens) and one.request == name for event in one.events]


def ids_of(updates: list[Update], name: str, sequence: int = 0) -> list[int]:
    return [event.id for event in events_of(updates, name) if event.sequence == sequence]


def expected(one: Submit, sequence: int = 0) -> list[int]:
    return [event.id for event in written(one, sequence)]


def kinds(updates: list[Update]) -> list[str]:
    return [type(update).__name__ for update in updates]


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_request_is_started_then_written_then_done() -> None:
    engine = engine_of(speculation=False)
    one = submit("a", text(5), params=SamplingParams(temperature=0.0, max_tokens=3, stop_ids=()))
    engine.submit(one)
    assert kinds(engine.step()) == ["Started", "Tokens"]
    assert kinds(engine.step()) == ["Tokens"]
    assert kinds(engine.step()) == ["Tokens", "Done"]
    assert not engine.has_work
    assert engine.step() == []


def test_prompts_are_read_in_pieces_beside_answers() -> None:
    engine = engine_of(max_num_batched_tokens=16, max_num_seqs=4, speculation=False)
    first, second = submit("a", text(4)), submit("b", text(60, 2))
    engine.submit(first)
    engine.step()
    engine.submit(second)
    seen = [kinds(engine.step()) for _ in range(4)]
    assert [len(step) for step in seen] == [2, 1, 1, 2]  # 15 tokens of the prompt each, and one of the answer
    updates = finish(engine)
    assert ids_of(updates, "b")[-5:] == expected(second)[-5:]


def test_finish_reasons_and_parameters() -> None:
    engine = engine_of()
    free = expected(submit("x", text(9)))
    stop = max(set(free), key=free.index)
    first = free.index(stop)
    assert first > 2
    cases = {
        "stop": SamplingParams(temperature=0.0, max_tokens=20, stop_ids=(stop, 10**6)),
        "length": SamplingParams(temperature=0.0, max_tokens=first, stop_ids=(stop,)),
        "ignore": SamplingParams(temperature=0.0, max_tokens=20, stop_ids=(stop,), ignore_eos=True, seed=1),
        "least": SamplingParams(temperature=0.0, max_tokens=20, stop_ids=(stop,), min_tokens=first + 1, seed=1),
        "bias": SamplingParams(temperature=0.0, max_tokens=5, stop_ids=(), logit_bias={10: 100.0}),
    }
    for name, params in cases.items():
        engine.submit(submit(name, text(9), params=params))
    updates = finish(engine)
    assert ids_of(updates, "stop") == free[: first + 1]
    assert [event.finish_reason for event in events_of(updates, "stop")] == [None] * first + ["stop"]
    assert (ids_of(updates, "length"), events_of(updates, "length")[-1].finish_reason) == (free[:first], "length")
    assert stop not in ids_of(updates, "ignore")
    assert len(ids_of(updates, "ignore")) == 20
    assert stop not in ids_of(updates, "least")[: first + 1]
    assert ids_of(updates, "least") == [event.id for event in written(submit("y", text(9), params=cases["least"]), 0)]
    assert ids_of(updates, "bias") == [10] * 5


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_answers_to_one_prompt_share_its_pages_and_differ(prefix_cache: bool) -> None:
    engine = engine_of(prefix_cache=prefix_cache, speculation=False)
    params = SamplingParams(temperature=1.5, max_tokens=12, seed=5, stop_ids=(), logprobs=2)
    one = submit("a", text(200), text(130, 3), params=params, n=3)
    engine.submit(one)
    updates = engine.step()
    while not engine.stats().running == 6:
        updates += engine.step()
    # Three pages full of the first prompt and two of the second, and one or two of its own for each answer.
    assert engine.stats().pages_used == 3 + 2 + 6
    updates += finish(engine)
    for sequence in range(6):
        assert ids_of(updates, "a", sequence) == expected(one, sequence)
    assert len({tuple(ids_of(updates, "a", sequence)) for sequence in range(3)}) == 3
    assert engine.stats().prompt_tokens == 330 + 2 * 8 + 2 * 2  # what is left of the last page, for the two others


def test_a_prefix_is_found_by_requests_of_the_same_scope() -> None:
    engine = engine_of()
    engine.submit(submit("a", text(200), scope="one"))
    first = finish(engine)
    assert first[0] == Started(request="a", cached=(0,))
    for name, scope, prompts, found in (
        ("b", "one", [text(200)], (192,)),
        ("c", "two", [text(200)], (0,)),
        ("d", "one", [text(192), text(3), text(150)], (128, 0, 128)),  # the last token is always computed
    ):
        one = submit(name, *prompts, scope=scope)
        engine.submit(one)
        updates = finish(engine)
        assert updates[0] == Started(request=name, cached=found)
        assert [ids_of(updates, name, at) for at in range(len(prompts))] == [
            expected(one, at) for at in range(len(prompts))
        ]
    assert engine.stats().cached_tokens == 192 + 256


def test_scores_of_a_prompt() -> None:
    engine = engine_of(max_num_batched_tokens=64)
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=3, logprobs=2, stop_ids=())
    prompt = text(150)
    for name in ("a", "b"):  # the second finds all pages, and still is scored
        engine.submit(submit(name, prompt, [5], params=params, n=2))
        updates = finish(engine)
        scores = {one.prompt: one.tokens for one in updates if isinstance(one, PromptScores)}
        assert [token.id for token in scores[0]] == prompt
        assert [(token.id, token.logprob) for token in scores[1]] == [(5, None)]
        states = states_of(prompt)
        for place, token in enumerate(scores[0][1:], 1):
            row = row_of(states[place - 1], prompt[place - 1])
            logprobs = choosing.log_softmax(row)
            assert token.logprob == logprobs[token.id]
            order = np.argsort(-row, kind="stable")[:3].tolist()
            assert [(c.id, c.logprob) for c in token.top] == [(id, logprobs[id]) for id in order]
        told = kinds(updates)
        assert told.index("PromptScores") < told.index("Tokens")
        assert ids_of(updates, name) == [event.id for event in written(submit("x", prompt, params=GREEDY), 0)][:4]


def test_a_prompt_can_be_scored_without_an_answer() -> None:
    engine = engine_of()
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine.submit(submit("a", text(70), [4], params=params, n=2))
    updates = finish(engine)
    assert Counter(kinds(updates)) == {"Started": 1, "PromptScores": 2, "Done": 1}


@pytest.mark.parametrize("prompt_too", [False, True])
@pytest.mark.parametrize("pages", [64, 5])
def test_routing_covers_every_token_once(prompt_too: bool, pages: int) -> None:
    """Also for tokens that are computed twice, after a preemption, and for drafts."""
    engine = engine_of(pages=pages, max_num_batched_tokens=64)
    one = submit(
        "r", text(130), params=SamplingParams(temperature=0.0, max_tokens=80, seed=1, stop_ids=()), routing=True
    )
    if prompt_too:
        one = Submit(**{name: getattr(one, name) for name in one.__struct_fields__} | {"routing_prompt": True})
    engine.submit(submit("before", text(130)))
    engine.submit(one)
    engine.submit(submit("after", text(100, 4)))
    updates = finish(engine)
    parts = [event.routing for event in events_of(updates, "r") if event.routing is not None]
    ids = text(130) + ids_of(updates, "r")
    assert ids_of(updates, "r") == expected(one)
    first = 0 if prompt_too else 130
    for part in parts:
        assert part.first == first
        first += len(part.experts) // (LAYERS * 2)
    assert first == len(ids) - 1
    experts = np.frombuffer(b"".join(part.experts for part in parts), np.uint8).reshape(-1, LAYERS, 2)
    weights = np.frombuffer(b"".join(part.weights for part in parts), "<f2").reshape(-1, LAYERS, 2)
    for state, picks, shares in zip(
        states_of(ids[:-1])[-len(experts) :], experts.tolist(), weights.tolist(), strict=True
    ):
        plain = picks_of(state)
        assert picks == [[(pick + layer) % EXPERTS for pick in plain] for layer in range(LAYERS)]
        assert shares == [[pick / 8 for pick in plain]] * LAYERS


# --- what is refused, and what goes wrong -----------------------------------------------------------------------------


def failed(updates: list[Update]) -> Failed:
    (found,) = [update for update in updates if isinstance(update, Failed)]
    return found


@pytest.mark.parametrize(
    ("one", "code", "param"),
    [
        (submit("a"), "invalid_value", "prompt"),
        (submit("a", [3], []), "invalid_value", "prompt"),
        (submit("a", [V]), "invalid_tokens", "prompt"),
        (submit("a", [3], n=0), "invalid_value", "n"),
        (submit("a", [3] * 1010), "context_length_exceeded", "prompt"),
        (submit("a", [3] * 250, params=SamplingParams(max_tokens=8)), "request_exceeds_cache", "prompt"),
        (submit("a", [3], params=SamplingParams(logit_bias={V: 1.0})), "invalid_value", "logit_bias"),
        (submit("a", [3], constraint=Constraint(text="x")), "invalid_value", "constraint"),
    ],
)
def test_what_can_never_run_fails_at_once(one: Submit, code: str, param: str) -> None:
    engine = engine_of(pages=4)
    engine.submit(one)
    found = failed(engine.step())
    assert (found.request, found.code, found.param) == ("a", code, param)
    assert not engine.has_work
    fits = submit("b", [3] * 250, params=SamplingParams(max_tokens=7, temperature=0.0, seed=1, stop_ids=()))
    engine.submit(fits)
    assert ids_of(finish(engine), "b") == expected(fits)


def test_names_are_used_once_at_a_time() -> None:
    engine = engine_of()
    engine.submit(submit("a", [3]))
    with pytest.raises(ValueError, match="'a' is not done"):
        engine.submit(submit("a", [4]))
    finish(engine)
    engine.submit(submit("a", [4]))


@pytest.mark.parametrize("when", range(6))
def test_abort_in_every_state(when: int) -> None:
    engine = engine_of(pages=8, max_num_batched_tokens=64, max_num_seqs=3)
    others = [submit(f"o{number}", text(90, number)) for number in range(3)]
    for one in others[:2]:
        engine.submit(one)
    engine.submit(submit("a", text(200), n=2))
    engine.submit(others[2])
    updates = [update for _ in range(when) for update in engine.step()]
    engine.abort("a")
    engine.scheduler.check_integrity()
    engine.abort("a")
    engine.abort("never")
    rest = finish(engine)
    assert events_of(rest, "a") == []
    for one in others:
        assert ids_of(updates + rest, one.request) == expected(one)


def test_one_sequence_of_a_request_can_be_aborted() -> None:
    engine = engine_of(speculation=False)
    one = submit("a", text(10), text(20), params=GREEDY, n=2)
    engine.submit(one)
    updates = engine.step() + engine.step()
    engine.abort("a", 1)
    engine.abort("a", 77)
    updates += finish(engine)
    assert [len(ids_of(updates, "a", sequence)) for sequence in range(4)] == [20, 1, 20, 20]
    assert kinds(updates).count("Done") == 1
    engine.submit(submit("b", text(10)))
    engine.step()
    engine.abort("b", 0)
    assert engine.is_open("b")
    assert engine.step() == [Done(request="b")]
    assert not engine.is_open("b")


def test_damaged_logits_end_one_request_only() -> None:
    engine = engine_of(HashModel(poison=True), speculation=False)
    good = submit("good", text(100))
    engine.submit(good)
    engine.submit(submit("bad", [*text(100, 2), NAN_TOKEN], n=2))
    updates = engine.step()
    assert failed(updates).code == "numerical_error"
    assert "position 101" in failed(updates).message
    updates += finish(engine)
    assert ids_of(updates, "good") == expected(good)
    assert len(engine.pages._dirty) == 2
    engine.submit(submit("scores", [3, NAN_TOKEN, 4, 5], params=SamplingParams(max_tokens=1, prompt_logprobs=0)))
    assert failed(finish(engine)).code == "numerical_error"


def test_an_exception_of_the_model_ends_all_and_frees_all() -> None:
    model = HashModel()
    engine = engine_of(model)
    engine.submit(submit("a", text(100)))
    engine.submit(submit("b", text(50), n=3))
    engine.step()
    model.raising = MemoryError()
    with pytest.raises(MemoryError):
        engine.step()
    assert (engine.has_work, engine.stats().pages_used) == (False, 0)
    model.raising = None
    one = submit("a", text(100))
    engine.submit(one)
    assert ids_of(finish(engine), "a") == expected(one)


class Alternate:
    """Only even ids at even places, only odd ones at odd places; ends after ``length`` tokens."""

    def __init__(self, length: int, fault: str = "") -> None:
        self.length, self.fault, self.ids = length, fault, []  # type: ignore[var-annotated]

    @property
    def finished(self) -> bool:
        return len(self.ids) == self.length

    def mask(self, out: np.ndarray) -> None:
        if self.fault == "mask" and self.ids:
            raise RuntimeError("secret")
        out[:] = 0 if self.fault == "empty" and self.ids else sum(1 << id for id in self.allowed())

    def allowed(self) -> list[int]:
        return [EOS] if self.finished else [id for id in range(3, V) if id % 2 == len(self.ids) % 2]

    def advance(self, id: int) -> None:
        assert id in self.allowed()
        assert not self.finished
        if self.fault == "advance" and self.ids:
            raise RuntimeError("secret")
        self.ids.append(id)


class Alternating:
    """A grammar."""

    def matcher(self, constraint: Constraint) -> Alternate:
        if constraint.text == "broken":
            raise RequestError("no such rule", code="grammar_failed")
        return Alternate(9, constraint.text or "")


def constrained(**fields: Any) -> Engine:
    found = Engine(HashModel(), EngineConfig(**{"pages": 64, **fields}), Alternating())  # type: ignore[arg-type]
    found._costs = SteadyCosts()  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("speculation", [True, False])
@pytest.mark.parametrize("stop_ids", [None, ()])
def test_a_constraint_is_kept_to_its_end(speculation: bool, stop_ids: Any) -> None:
    engine = constrained(speculation=speculation)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30, stop_ids=stop_ids)
    engine.submit(submit("a", text(30), params=params, n=2, constraint=Constraint(text="")))
    engine.submit(submit("b", text(30), params=GREEDY))
    updates = finish(engine)
    for sequence in range(2):
        ids = ids_of(updates, "a", sequence)
        assert [id % 2 for id in ids] == [0, 1] * 4 + [0, 0]
        assert ids[-1] == EOS
    assert {event.finish_reason for event in events_of(updates, "a")} == {None, "stop"}
    assert ids_of(updates, "b") == expected(submit("b", text(30)))


@pytest.mark.parametrize("fault", ["broken", "mask", "advance", "empty"])
def test_a_failing_grammar_ends_its_request_only(fault: str) -> None:
    engine = constrained()
    other = submit("b", text(30))
    engine.submit(submit("a", text(30), constraint=Constraint(text=fault)))
    engine.submit(other)
    updates = finish(engine)
    found = failed(updates)
    assert (found.request, found.code) == ("a", "grammar_failed")
    assert "secret" not in found.message
    assert ids_of(updates, "b") == expected(other)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"pages": 0}, "pages is 0"),
        ({"pages": 3, "cache_bytes": 5}, "both given"),
        ({"cache_bytes": 511}, "a page of 64 tokens takes 512"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens is 8; expected at least 9"),
    ],
)
def test_wrong_sizes(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Engine(HashModel(), EngineConfig(**fields))  # type: ignore[arg-type]


def test_the_size_of_the_cache() -> None:
    def pages(free: int = 1 << 40, **fields: Any) -> int:
        return EngineConfig(**fields).page_count(512, 1000, free)

    assert pages() == 4 * 16
    assert pages(free=20 * 512) == 10
    assert pages(cache_bytes=1000 * 512) == 1000
    assert pages(pages=7) == 7


# --- preemption and fairness ------------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_writes_the_same() -> None:
    engine = engine_of(pages=8, speculation=False)
    requests = [
        submit(
            f"{number}",
            text(100, number),
            params=SamplingParams(temperature=1.0, seed=number, max_tokens=150, stop_ids=()),
        )
        for number in range(4)
    ]
    for one in requests:
        engine.submit(one)
    updates = finish(engine)
    assert engine.stats().preemptions > 0
    for one in requests:
        assert ids_of(updates, one.request) == expected(one)
    done = [update.request for update in updates if isinstance(update, Done)]
    assert done == sorted(done)


def test_priority_comes_before_age() -> None:
    engine = engine_of(max_num_seqs=1, max_num_batched_tokens=512)
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0)):
        engine.submit(submit(name, text(5), priority=priority))
    updates = finish(engine)
    assert [update.request for update in updates if isinstance(update, Done)] == ["c", "a", "d", "b"]


def test_a_large_request_is_passed_over_eight_times_at_most() -> None:
    engine = engine_of(pages=8, max_num_seqs=8, speculation=False)
    brief = SamplingParams(temperature=0.0, max_tokens=30, stop_ids=())
    engine.submit(submit("first", text(200), params=SamplingParams(temperature=0.0, max_tokens=50, stop_ids=())))
    engine.step()
    engine.submit(submit("large", text(430), params=brief))
    for number in range(40):
        engine.submit(submit(f"s{number}", text(30, number), params=brief))
    updates = finish(engine)
    order = [update.request for update in updates if isinstance(update, Started)]
    assert order.index("large") == MOST_PASSED


# --- state machine ----------------------------------------------------------------------------------------------------


class CheckedScheduler(Scheduler):
    """Checks each plan."""

    def plan(self) -> Plan:
        work = bool(self.waiting or self.running)
        plan = super().plan()
        assert bool(plan.pieces) == work
        assert sum(piece.count for piece in plan.pieces) <= self.config.max_num_batched_tokens
        assert all(piece.count > 0 for piece in plan.pieces)
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
    run_machine(EngineMachine, 60, 15)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_requests_at_length() -> None:
    """At least 200,000 steps of the engine."""
    EngineMachine.steps = 0
    run_machine(EngineMachine, 1200, 40)
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


class TooManyTokens(CheckedScheduler):
    """The budget is not kept."""

    def _piece(self, sequence: Any, room: int) -> Any:
        return super()._piece(sequence, room + 1)


@pytest.mark.parametrize(
    "fault",
    [
        PagesAreFreedTooLate,
        PreemptedKeepsItsPlace,
        RejectedDraftsStay,
        OldestIsPreempted,
        SiblingsDoNotWait,
        TooManyTokens,
    ],
)
def test_the_machine_sees_a_planted_fault(fault: type[Scheduler]) -> None:
    machine = type("Faulty", (EngineMachine,), {"scheduler": fault})
    with pytest.raises(Exception):  # noqa: B017 - whatever notices first
        run_machine(machine, 300, 20)
