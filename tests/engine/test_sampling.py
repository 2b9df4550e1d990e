"""Sampling against a brute-force float64 version and transformers' processors; its promises on order and seeds."""

from __future__ import annotations

import math
from typing import Any

import choosing
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as peers

from mixtral.engine.sampling import History, NoTokenError, _draw, choose, distribution, log_softmax, score, uniform
from mixtral.errors import NumericalError
from mixtral.wire import SamplingParams

V = 50


def row(seed: int, size: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size)


def history(prompt: list[int] = [], output: list[int] = []) -> History:  # noqa: B006
    made = History(prompt, V)
    for id in output:
        made.add(id)
    return made


def brute_force(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> dict[int, float]:
    """The definition, one id at a time: {id: probability} of what may be drawn."""
    values = {i: float(v) for i, v in enumerate(logits)}
    for i in values:
        if i in prompt or i in output:
            factor = params.repetition_penalty
            values[i] = values[i] * factor if values[i] < 0 else values[i] / factor
        if i in output:
            values[i] -= params.presence_penalty + params.frequency_penalty * output.count(i)
    ranked = sorted(values, key=lambda i: (-values[i], i))
    if params.temperature < 1e-3:
        return {ranked[0]: 1.0}
    if params.top_k:
        ranked = ranked[: params.top_k]
    weights = {i: math.exp((values[i] - values[ranked[0]]) / params.temperature) for i in ranked}
    total = math.fsum(weights.values())
    kept, mass = [], 0.0
    for i in ranked:
        if kept and mass >= params.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= params.min_p * weights[kept[0]]]
    total = math.fsum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.5},
        {"top_p": 0.0},
        {"top_p": 0.999, "temperature": 1.7},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6, "temperature": 0.0},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7},
        {
            "temperature": 0.8,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
        },
    ],
)
@pytest.mark.parametrize("seed", range(6))
def test_distribution_equals_brute_force(fields: dict[str, float], seed: int) -> None:
    logits = row(seed)
    prompt, output = [1, 2, 3, 3, 9], [2, 7, 7, 7, 11]
    params = SamplingParams(**fields)
    ids, probs = distribution(logits, params, history(prompt, output))
    expected = brute_force(logits, params, prompt, output)
    assert ids.tolist() == sorted(expected)
    assert probs == pytest.approx([expected[i] for i in sorted(expected)], rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fields", "peer"),
    [
        ({"top_k": 7}, peers.TopKLogitsWarper(7)),
        ({"top_p": 0.8}, peers.TopPLogitsWarper(0.8)),
        ({"top_p": 0.05}, peers.TopPLogitsWarper(0.05)),
        ({"min_p": 0.07}, peers.MinPLogitsWarper(0.07)),
        ({"temperature": 0.4}, peers.TemperatureLogitsWarper(0.4)),
        ({"repetition_penalty": 1.4}, peers.RepetitionPenaltyLogitsProcessor(1.4)),
    ],
)
def test_each_step_equals_transformers(fields: dict[str, float], peer: peers.LogitsProcessor, seed: int) -> None:
    logits, prompt, output = row(seed), [4, 5, 5], [6, 6]
    scores = peer(torch.tensor([prompt + output]), torch.tensor(logits)[None].double())
    expected = torch.softmax(scores[0], dim=-1).numpy()
    ids, probs = distribution(logits, SamplingParams(**fields), history(prompt, output))
    assert ids.tolist() == np.flatnonzero(expected).tolist()
    assert probs == pytest.approx(expected[ids], rel=1e-9)


def test_order_of_steps_matters_and_is_the_documented_one() -> None:
    # After top_k the probabilities are 2/3 and 1/3, so top_p 0.6 keeps one id; before top_k it would keep two.
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2]))
    ids, _ = distribution(logits, SamplingParams(top_k=2, top_p=0.6), History([], 4))
    assert ids.tolist() == [0]
    # Temperature comes before top_p: at 2.0 the row is flatter and more ids are needed for the same mass.
    hot, _ = distribution(row(1), SamplingParams(temperature=2.0, top_p=0.8), history())
    cold, _ = distribution(row(1), SamplingParams(temperature=0.5, top_p=0.8), history())
    assert len(hot) > len(cold)


def test_ties_take_the_lowest_id() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0, 2.0])
    greedy = SamplingParams(temperature=0.0)
    assert choose(logits, greedy, History([], 5), seed=0, sequence=0, position=0).id == 1
    assert choose(logits, SamplingParams(top_k=1), History([], 5), seed=9, sequence=0, position=0).id == 1
    assert distribution(logits, SamplingParams(top_k=2), History([], 5))[0].tolist() == [1, 3]
    just_below = SamplingParams(temperature=9.9e-4)
    assert {choose(logits, just_below, History([], 5), seed=s, sequence=0, position=0).id for s in range(8)} == {1}


def test_presence_and_frequency_ignore_the_prompt() -> None:
    logits = np.zeros(V)
    params = SamplingParams(presence_penalty=2.0, frequency_penalty=2.0)
    ids, probs = distribution(logits, params, history(prompt=[3, 3, 3], output=[8]))
    assert probs[3] == probs[0]
    assert probs[8] == pytest.approx(probs[0] * math.exp(-4))
    assert len(ids) == V


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = row(3)
    params = SamplingParams(temperature=0.3, repetition_penalty=1.8, top_k=4, logprobs=6)
    choice = choose(logits, params, history(prompt=list(range(25))), seed=1, sequence=0, position=5)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float32), dim=-1)
    assert choice.logprob == pytest.approx(expected[choice.id].item(), abs=1e-5)
    assert [c.id for c in choice.top] == torch.topk(expected, 6).indices.tolist()
    assert [c.logprob for c in choice.top] == pytest.approx(torch.topk(expected, 6).values.tolist(), abs=1e-5)
    assert choose(logits, SamplingParams(logprobs=0), history(), seed=1, sequence=0, position=5).top == ()
    assert choose(logits, SamplingParams(), history(), seed=1, sequence=0, position=5).logprob is None


def test_log_softmax_survives_large_logits() -> None:
    values = log_softmax(np.array([1e4, 0.0, -1e4]))
    assert values.dtype == np.float32
    assert values.tolist() == [0.0, -1e4, -2e4]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_an_error(value: float) -> None:
    logits = row(0)
    logits[17] = value
    with pytest.raises(NumericalError, match=r"token 17 at position 4"):
        choose(logits, SamplingParams(), history(), seed=0, sequence=0, position=4)


def test_uniform_is_keyed_by_seed_sequence_and_position() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    numbers = {uniform(s, q, p) for s in (-(2**63), -1, 0, 1, 2**63 - 1) for q in range(6) for p in range(50)}
    assert len(numbers) == 5 * 6 * 50
    assert all(0 <= number < 1 for number in numbers)


def test_uniform_is_frozen() -> None:
    """The numbers behind published seeds never change."""
    assert uniform(0, 0, 0) == 0.5387560232666208
    assert uniform(1234, 1, 77) == 0.14851760839522088


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    for position in range(200):
        number = uniform(7, 0, position)
        expected = 0 if number < 0.5 else 1 if number < 0.8 else 2
        assert choose(logits, SamplingParams(), History([], 3), seed=7, sequence=0, position=position).id == expected


def test_full_vocabulary_top_p_equals_brute_force() -> None:
    logits = row(5, 32768)
    params = SamplingParams(temperature=0.9, top_p=0.95)
    ids, probs = distribution(logits, params, History([], 32768))
    expected = brute_force(logits, params, [], [])
    assert ids.tolist() == sorted(expected)
    assert probs.sum() == pytest.approx(1)


# --- the fast steps against the plain ones ----------------------------------------------------------------------------

SIZES = (50, 2048, 32768)
FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_p": 0.99, "temperature": 1.8},
    {"top_p": 0.0},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.95, "temperature": 0.8},
    {"top_k": 256},
    {"top_k": 700},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 300, "top_p": 0.97, "min_p": 0.01, "temperature": 1.5},
    {"repetition_penalty": 1.3, "temperature": 0.0},
    {"repetition_penalty": 0.7, "presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"logit_bias": {3: 9.0, 7: -100.0, 11: 100.0, 49: 0.5}, "top_k": 5},
    {"logit_bias": {0: 5.0}, "temperature": 0.0},
]


def rows(size: int, seed: int) -> list[np.ndarray]:
    """Float32 logits: spread out, peaked, with many ties, almost flat."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 3, size)
    shared[size // 3 :] = shared[0]  # as the ids that were not trained have
    found = [
        rng.normal(0, 2, size),
        rng.normal(0, 9, size),
        rng.integers(-3, 4, size),
        rng.normal(0, 0.01, size),
        shared,
    ]
    return [one.astype(np.float32) for one in found]


@pytest.mark.parametrize("fields", FIELDS, ids=repr)
@pytest.mark.parametrize("size", SIZES)
def test_the_choice_is_that_of_the_definition(fields: dict[str, Any], size: int) -> None:
    params = SamplingParams(**fields)
    prompt, output = [1, 2, 3, 3, 9, 30], [2, 7, 7, 7, 11, 30]
    past = History(prompt, size)
    for id in output:
        past.add(id)
    for number, logits in enumerate(rows(size, 5)):
        ids, probs = distribution(logits, params, past)
        expected_ids, expected_probs = choosing.kept(logits, params, prompt, output)
        assert ids.tolist() == expected_ids.tolist()
        assert probs == pytest.approx(expected_probs, rel=1e-12)
        for position in range(4):
            draw = {"seed": 17 * number, "sequence": 2, "position": position}
            found = choose(logits, params, past, **draw)
            assert found.id == choosing.choose(logits, params, prompt, output, **draw)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_k": 4}, {"top_p": 0.8}, {"logit_bias": {5: 100.0}}])
@pytest.mark.parametrize("share", [0.00005, 0.01, 0.5, 0.999])
def test_mask_and_banned_ids(fields: dict[str, Any], share: float) -> None:
    size = 32768 + 5
    rng, params = np.random.default_rng(int(share * 1e5)), SamplingParams(**fields)
    for logits in rows(size, 6):
        allowed = rng.random(size) < share
        allowed[[20000, size - 1]] = True
        banned = [size - 1, 7, 10**6]
        words = np.zeros(-(-size // 32), dtype=np.uint32)
        for id in np.flatnonzero(allowed).tolist():
            words[id // 32] |= np.uint32(1 << id % 32)
        words[-1] |= np.uint32(1 << 31)  # no id of the vocabulary
        allowed[banned[:2]] = False
        for position in range(4):
            draw = {"seed": 3, "sequence": 0, "position": position}
            found = choose(logits, params, None, mask=words, banned=banned, **draw).id
            assert found == choosing.choose(logits, params, [], [], allowed=allowed, **draw)
            assert allowed[found]
            only_banned = choose(logits, params, None, banned=banned, **draw).id
            assert only_banned == choosing.choose(
                logits, params, [], [], allowed=~np.isin(np.arange(size), banned), **draw
            )


def test_a_mask_without_ids_is_an_error() -> None:
    with pytest.raises(NoTokenError):
        choose(row(0), SamplingParams(), None, seed=0, sequence=0, position=0, mask=np.zeros(2, np.uint32))
    with pytest.raises(NoTokenError):
        choose(row(0, 2), SamplingParams(), None, seed=0, sequence=0, position=0, banned=[0, 1])


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_scores_are_those_of_the_whole_row(count: int) -> None:
    for logits in rows(32768, 7):
        expected = choosing.log_softmax(logits)
        logprob, top = score(logits, 123, count)
        order = np.argsort(-logits.astype(np.float64), kind="stable")[:count]
        assert logprob == expected[123]
        assert [(one.id, one.logprob) for one in top] == [(id, expected[id]) for id in order.tolist()]


def test_a_draw_falls_on_what_weighs_something() -> None:
    """Also at the ends of the range, and where rounding moves it over the end of a block."""
    for size in (1, 127, 128, 129, 1000):
        weights = np.zeros(size)
        weights[size // 2] = 1e-300
        for number in (0.0, 0.5, 1.0 - 2**-53):
            assert _draw(weights, number) == size // 2
    weights = np.full(1000, 0.1)
    reached = np.cumsum(weights)
    for number in np.random.default_rng(0).random(3000).tolist():
        place = _draw(weights, number)
        before = reached[place] - weights[place]
        assert before - 1e-9 <= number * reached[-1] <= reached[place] + 1e-9
