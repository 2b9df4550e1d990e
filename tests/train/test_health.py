"""Health of the routers: figures of loads that are known, the alarm, and drift from the first choices."""

from __future__ import annotations

import warnings

import pytest
import torch

from mixtral.config import MixtralConfig
from mixtral.model import Mixtral, initialise
from mixtral.train.health import ALARM_STEPS, Probe, RouterHealth, picks_of

EVEN = torch.ones((2, 4))


def lonely(layer: int, expert: int, load: float = 0.0) -> torch.Tensor:
    loads_LE = EVEN.clone()
    loads_LE[layer, expert] = load
    loads_LE[layer, (expert + 1) % 4] += 1 - load
    return loads_LE


def test_even_loads_have_entropy_one_and_nothing_to_tell() -> None:
    found = RouterHealth(2, 4).update(1, EVEN)
    assert found == {
        "load_max": 1.0,
        "load_min": 1.0,
        "entropy": pytest.approx(1.0),
        "max_violation": 0.0,
        "dead": 0,
        "collapsed": 0,
    }


def test_the_figures_of_a_collapsed_layer() -> None:
    """Four experts, two per token: all tokens pick the same two, so those have a load of 2. The other layer is even."""
    loads_LE = EVEN.clone()
    loads_LE[1] = torch.tensor([2.0, 2.0, 0.0, 0.0])
    found = RouterHealth(2, 4).update(1, loads_LE)
    assert found["entropy"] == pytest.approx((1 + 0.5) / 2)
    assert (found["max_violation"], found["dead"], found["load_min"]) == (1, 2, 0)


def test_layers_that_collapse_on_different_experts_are_seen() -> None:
    """Over all layers together these loads are even: an average would call them healthy."""
    loads_LE = 4.0 * torch.eye(4)
    assert loads_LE.mean(0).tolist() == [1.0] * 4
    found = RouterHealth(4, 4).update(1, loads_LE)
    assert (found["entropy"], found["dead"], found["max_violation"]) == (0, 12, 3)


def test_the_alarm_is_about_an_expert_that_starves_for_100_steps_in_a_row() -> None:
    health = RouterHealth(2, 4)
    with warnings.catch_warnings(action="error"):
        for _ in range(ALARM_STEPS - 1):
            assert health.update(1, lonely(1, 2, 0.04))["collapsed"] == 0
    with pytest.warns(
        UserWarning, match="step 100: expert 2 of layer 1 had less than 5% of an even load for 100 steps"
    ) as told:
        assert health.update(100, lonely(1, 2, 0.04))["collapsed"] == 1
    assert len(told) == 1
    with warnings.catch_warnings(action="error"):
        assert health.update(1, lonely(1, 2, 0.04))["collapsed"] == 1
        assert health.update(1, EVEN)["collapsed"] == 0
        for _ in range(ALARM_STEPS - 1):
            health.update(1, lonely(1, 2, 0.04))
    with pytest.warns(UserWarning, match="step 350: expert 2 of layer 1"):
        health.update(350, lonely(1, 2))


def test_a_good_step_between_bad_ones_is_no_alarm() -> None:
    health = RouterHealth(1, 4)
    with warnings.catch_warnings(action="error"):
        for step in range(3 * ALARM_STEPS):
            health.update(step, lonely(0, 0, 0.06 if step % ALARM_STEPS == 99 else 0.0)[:1])


def test_agreement_counts_the_choices_that_are_still_those_of_the_start(
    tiny_model: Mixtral, tiny_config: MixtralConfig
) -> None:
    tokens_T = torch.arange(40)
    probe = Probe(tokens_T, (15, 25))
    probe.begin(tiny_model)
    assert probe.measure(tiny_model) == probe.agreement == 1.0
    start_LTA = probe.start_LTA
    other = Mixtral(tiny_config)
    initialise(other, seed=9, std=0.2)
    now_LTA = picks_of(other, tokens_T, (15, 25))
    same = sum(
        len(set(one.tolist()) & set(two.tolist()))
        for one, two in zip(start_LTA.flatten(0, 1), now_LTA.flatten(0, 1), strict=True)
    )
    assert probe.measure(other) == pytest.approx(same / start_LTA.numel())
    assert 0 < probe.agreement < 1


def test_the_order_of_the_chosen_experts_does_not_matter(tiny_model: Mixtral) -> None:
    probe = Probe(torch.arange(20), (20,))
    probe.begin(tiny_model)
    assert probe.resume({"probe.picks": probe.start_LTA.flip(-1)}, 0.5)
    assert probe.agreement == 0.5
    assert probe.measure(tiny_model) == 1.0


def test_choices_of_another_batch_are_not_taken_over(tiny_model: Mixtral) -> None:
    probe = Probe(torch.arange(20), (20,))
    assert not probe.resume({}, 1.0)
    assert not probe.resume({"probe.picks": torch.zeros((2, 19, 2), dtype=torch.int16)}, 1.0)
