"""On compiled kernels, tokens and log-probabilities have the same bits whatever else an engine does and however."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mixtral.compiled import compile_model
from mixtral.config import MixtralConfig
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.engine.runner import Adapters
from mixtral.model import Mixtral, initialise
from mixtral.wire import PromptScores, SamplingParams, Submit, Tokens

KINDS = ("float32", "bfloat16")
PROMPT = [(5 * place + place * place // 11) % 300 + 3 for place in range(150)]
OTHERS = [[7], [(3 * place) % 300 for place in range(70)], PROMPT[:129], [9, 8, 7] * 40]
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, seed=1, logprobs=3, stop_ids=(), frequency_penalty=0.02),
    "sampled": SamplingParams(temperature=0.7, top_p=0.95, max_tokens=40, seed=5, logprobs=3, stop_ids=()),
}
Answer = list[tuple[int, float | None, tuple[Any, ...]]]


class EagerCosts:
    """Drafts always seem to pay."""

    def observe(self, tokens: int, seconds: float) -> None:
        pass

    def of(self, tokens: int) -> float:
        return 1.0 + 0.001 * tokens


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny_config: MixtralConfig) -> Mixtral:
    found = Mixtral(tiny_config, dtype=getattr(torch, request.param))
    initialise(found, seed=1, std=0.25)
    return compile_model(found)


@dataclass
class Way:
    """How an answer is computed: settings of the engine, requests before and beside it, what is done between steps."""

    config: dict[str, Any] = field(default_factory=dict)
    before: int = 0
    beside: int = 0
    late: bool = False  # the others come first
    n: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    between: Callable[[Engine, int], None] = lambda engine, step: None


def preempt(engine: Engine, step: int) -> None:
    """Take the pages of a sequence away; a preemption in nearly every step."""
    if engine.scheduler.running:
        one = engine.scheduler.running[step % len(engine.scheduler.running)]
        one.preemptions = 0  # or it would be pinned
        if step % 4 < 3 or one.left > 1:
            engine.scheduler._preempt(one)


def evict(engine: Engine, step: int) -> None:
    engine.pages.forget()


def poison(engine: Engine, step: int) -> None:
    """Whatever is in a page that belongs to nobody is no number."""
    cache, free = engine._runner._cache, sorted({*engine.pages._free, *engine.pages._idle})
    assert cache is not None
    if free:
        cache.blocks[:, free] = 0xFF  # type: ignore[attr-defined] # NaN in both dtypes


WAYS = {
    "in the default way": Way(),
    "in pieces of 5": Way({"max_num_batched_tokens": 5, "max_num_seqs": 5}),
    "in pieces of 6 beside answers": Way({"max_tokens_beside_answers": 12}, beside=4, late=True),
    "in pieces of 64, on a small cache": Way({"max_num_batched_tokens": 64, "pages": 3}),
    "beside others": Way(beside=4),
    "after others": Way({"max_num_batched_tokens": 100}, beside=4, late=True),
    "after itself": Way(before=2),
    "after itself without a prefix cache": Way({"prefix_cache": False}, before=1),
    "after itself, forgotten": Way(before=1, beside=2, between=evict),
    "without drafts": Way({"speculation": False}, beside=2),
    "preempted, the pages kept": Way({"max_num_batched_tokens": 64}, beside=2, between=preempt),
    "preempted, the pages lost": Way({"max_num_batched_tokens": 512, "prefix_cache": False}, beside=2, between=preempt),
    "on a cache that is too small for all": Way({"pages": 5, "max_num_batched_tokens": 64}, beside=4),
    "on pages that were full of NaN": Way({"prefix_cache": False}, beside=4, before=1, between=poison),
    "on few pages that were full of NaN": Way({"prefix_cache": False, "pages": 5}, beside=4, between=poison),
    "with two more answers": Way(n=3),
    "with three more answers, without a prefix cache": Way({"prefix_cache": False, "max_num_batched_tokens": 64}, n=4),
    "with its routing": Way(beside=1, extra={"routing": True, "routing_prompt": True}),
}


def answers(
    model: Mixtral,
    params: SamplingParams,
    way: Way,
    *,
    adapters: Adapters | None = None,
    adapter: str | None = None,
    theirs: Sequence[str | None] = (None,),
) -> list[Answer]:
    """The answers to the prompt, by number of the choice; with an adapter, and ``theirs`` for the others, in turns."""
    engine = Engine(model, EngineConfig(**{"pages": 40, "max_num_seqs": 5} | way.config), adapters=adapters)
    engine._costs = EagerCosts()  # type: ignore[assignment]
    mine = Submit(request="mine", prompts=[PROMPT], params=params, n=way.n, adapter=adapter, **way.extra)
    for number in range(way.before):
        for each in dict.fromkeys((*theirs, adapter)):
            prompt = PROMPT + [5] * number
            engine.submit(Submit(request=f"before {number}", prompts=[prompt], params=params, adapter=each))
            while engine.has_work:
                engine.step()
    others = [
        Submit(request=f"other {at}", prompts=[OTHERS[at]], params=params, adapter=theirs[at % len(theirs)])
        for at in range(way.beside)
    ]
    for one in [*others, mine] if way.late else [mine, *others]:
        engine.submit(one)
    found: list[Answer] = [[] for _ in range(way.n)]
    for step in range(100_000):
        if not engine.has_work:
            break
        for update in engine.step():
            if isinstance(update, Tokens) and update.request == "mine":
                for event in update.events:
                    found[event.sequence].append((event.id, event.logprob, event.top))
        way.between(engine, step)
    assert not engine.has_work
    assert way.between is not preempt or engine.stats().preemptions > 10
    engine.scheduler.check_integrity()
    return found


@pytest.fixture(scope="module")
def plain(model: Mixtral) -> dict[str, list[Answer]]:
    """What each is compared with: alone, whole prompts, no cache of prefixes, no drafts."""
    config = {"prefix_cache": False, "speculation": False}
    found = {name: answers(model, params, Way(config, n=4)) for name, params in SETTINGS.items()}
    for name, params in SETTINGS.items():
        assert answers(model, params, Way(config)) == found[name][:1]
    assert len({tuple(id for id, _, _ in one) for one in found["sampled"]}) == 4
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_the_same(model: Mixtral, plain: dict[str, list[Answer]], way: str, setting: str) -> None:
    found = answers(model, SETTINGS[setting], WAYS[way])
    assert found == plain[setting][: WAYS[way].n]


def test_a_text_that_repeats_itself_takes_fewer_steps(model: Mixtral) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=150, stop_ids=(), logprobs=1, logit_bias={17: 100.0})
    found, steps = [], []
    for speculation in (False, True):
        engine = Engine(model, EngineConfig(pages=20, speculation=speculation))
        engine._costs = EagerCosts()  # type: ignore[assignment]
        engine.submit(Submit(request="a", prompts=[PROMPT[:20]], params=params))
        updates = []
        while engine.has_work:
            updates += engine.step()
        found.append([event for update in updates if isinstance(update, Tokens) for event in update.events])
        steps.append(engine.stats().steps)
    assert found[0] == found[1]
    assert steps[0] == 150
    assert steps[1] < 100


def test_scores_of_a_prompt_are_the_same_in_pieces(model: Mixtral) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)

    def scores(config: dict[str, Any], before: bool) -> list[Any]:
        engine = Engine(model, EngineConfig(pages=20, **config))
        for name in ("first", "second") if before else ("first",):
            engine.submit(Submit(request=name, prompts=[PROMPT], params=params))
            updates = []
            while engine.has_work:
                updates += engine.step()
        return [update.tokens for update in updates if isinstance(update, PromptScores)]

    whole = scores({}, before=False)
    assert len(whole[0]) == len(PROMPT)
    assert scores({"max_num_batched_tokens": 7, "max_num_seqs": 1}, before=True) == whole


def test_a_bit_too_many_is_seen(model: Mixtral, plain: dict[str, list[Answer]]) -> None:
    """The comparison notices a change of one weight's last bits."""
    changed = copy.deepcopy(SETTINGS["sampled"])
    weight = model.model.layers[0].self_attn.o_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data[0, 0] *= 1.01
        assert answers(model, changed, Way()) != plain["sampled"][:1]
    finally:
        weight.data.copy_(kept)
