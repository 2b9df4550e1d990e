"""What an engine tells about requests, what it refuses, what a fault costs: over a model that sees every wrong page."""

from __future__ import annotations

from collections import Counter
from typing import Any

import choosing
import numpy as np
import pytest
from driving import GREEDY, engine_of, events_of, expected, failed, finish, ids_of, kinds, submit, text
from hash_model import EOS, EXPERTS, LAYERS, NAN_TOKEN, HashModel, V, picks_of, row_of, states_of, written

from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.engine.scheduler import MOST_PASSED
from mixtral.errors import ConfigError, RequestError
from mixtral.wire import (
    Constraint,
    Done,
    PromptScores,
    SamplingParams,
    Started,
    Submit,
)

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


def test_a_step_that_writes_answers_reads_less_of_prompts() -> None:
    engine = engine_of(max_num_batched_tokens=64, max_tokens_beside_answers=20, speculation=False)
    run, plan = engine._runner.run, []
    engine._runner.run = lambda pieces: plan.append([piece.count for piece in pieces]) or run(pieces)
    engine.submit(submit("a", text(100)))
    engine.step()
    engine.step()
    assert plan == [[64], [36]]  # nobody waits for a token yet
    engine.submit(submit("b", text(45, 2)))
    for _ in range(3):
        engine.step()
    assert plan[2:] == [[1, 19], [1, 19], [1, 7]]
    for number in range(14):
        engine.submit(submit(f"{number}", text(1, 3 + number), params=SamplingParams(temperature=0.0, max_tokens=40)))
    engine.step()
    plan.clear()
    late = submit("late", text(25, 90))
    engine.submit(late)
    engine.step()
    assert plan[0] == [1] * 16 + [10]  # half of them, however many answers are written
    assert ids_of(finish(engine), "late") == expected(late)


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
    while engine.stats().running != 6:
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


@pytest.mark.parametrize("when", range(1, 6))
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_paused_request_holds_nothing_and_goes_on_with_the_same(when: int, prefix_cache: bool) -> None:
    engine = engine_of(pages=8, max_num_batched_tokens=64, max_num_seqs=3, prefix_cache=prefix_cache)
    slow, other = submit("slow", text(150), n=2), submit("other", text(90, 1))
    for one in (slow, other):
        engine.submit(one)
    updates = [update for _ in range(when) for update in engine.step()]
    engine.pause("slow", on=True)
    engine.pause("slow", on=True)
    engine.pause("unknown", on=True)
    steps = 0
    while engine.has_work:
        updates += engine.step()
        engine.scheduler.check_integrity()
        steps += 1
    assert steps < 50
    assert ids_of(updates, "other") == expected(other)
    assert (engine.stats().pages_used, engine.stats().running, engine.is_open("slow")) == (0, 0, True)
    assert engine.step() == []
    engine.pause("slow", on=False)
    updates += finish(engine)
    for sequence in range(2):
        assert ids_of(updates, "slow", sequence) == expected(slow, sequence)
    assert engine.stats().preemptions == 0


def test_a_paused_request_can_be_aborted() -> None:
    engine = engine_of()
    engine.submit(submit("a", text(10)))
    engine.step()
    engine.pause("a", on=True)
    engine.abort("a")
    assert not engine.has_work
    one = submit("a", text(10))
    engine.submit(one)
    assert ids_of(finish(engine), "a") == expected(one)


def test_a_step_says_first_what_it_works_on() -> None:
    engine = engine_of(max_num_seqs=2)
    for name in "abc":
        engine.submit(submit(name, text(5)))
    told: list[set[str]] = []
    engine.step(told.append)
    engine.pause("a", on=True)
    engine.step(told.append)
    assert told == [{"a", "b"}, {"b", "c"}]


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
    return engine_of(grammar=Alternating(), **fields)


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
        ({"max_tokens_beside_answers": 1}, "max_tokens_beside_answers is 1; expected at least 2"),
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
