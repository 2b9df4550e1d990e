"""Starting values: seeded, bounded, the same for every dtype."""

from __future__ import annotations

import math

import pytest
import torch

from mixtral.config import MixtralConfig
from mixtral.model import Mixtral, initialise
from mixtral.weights.names import is_router


def made(config: MixtralConfig, seed: int, std: float = 0.02, dtype: torch.dtype = torch.float32) -> Mixtral:
    model = Mixtral(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialise(model, seed=seed, std=std)
    return model


def test_a_seed_decides_everything(tiny_config: MixtralConfig) -> None:
    """And it neither uses nor moves the global source of random numbers."""
    state = torch.get_rng_state()
    first = made(tiny_config, 7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = made(tiny_config, 7).state_dict(), made(tiny_config, 8).state_dict()
    for name, values in first.items():
        assert torch.equal(values, again[name])
        assert torch.equal(values, other[name]) == name.endswith("norm.weight")


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_bounds_and_spread(std: float, tiny_config: MixtralConfig) -> None:
    """Cut at 3 sigma; what is added to the residual stream is smaller by sqrt(2 L); norms are 1."""
    for name, values in made(tiny_config, 0, std).state_dict().items():
        if name.endswith("norm.weight"):
            assert (values == 1).all()
            continue
        residual = "o_proj" in name or "down_proj" in name
        sigma = std / math.sqrt(2 * tiny_config.num_hidden_layers) if residual else std
        assert values.abs().max() <= 3 * sigma * (1 + 1e-6)
        # A normal distribution cut at 3 sigma has a deviation of 0.9866 sigma.
        error = 5 / math.sqrt(2 * values.numel())
        assert values.std() == pytest.approx(0.9866 * sigma, rel=error)
        assert abs(values.mean()) < 5 * sigma / math.sqrt(values.numel())
        assert values.numel() < 5000 or values.abs().max() > 2.5 * sigma


def test_a_narrow_model_is_the_rounded_wide_one(tiny_config: MixtralConfig) -> None:
    wide, narrow = made(tiny_config, 3), made(tiny_config, 3, dtype=torch.bfloat16)
    for (name, exact), rounded in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(rounded, exact if is_router(name) else exact.bfloat16()), name
