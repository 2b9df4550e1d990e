"""Loss, gradients and their norm over two and four ranks are those of one process on the same documents."""

from __future__ import annotations

import pytest
from pool import Ranks


def wrong(results: list[tuple[float, dict[str, float], float]], most: float) -> list[str]:
    """What differs by more than ``most``; loss and norm by more than 1e-6."""
    found = set()
    for loss, gradients, norm in results:
        found |= {name for name, error in gradients.items() if not error <= most}
        found |= {name for name, error in {"loss": loss, "norm": norm}.items() if not abs(error) <= 1e-6}
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_data_parallel(two: Ranks, micro_batches: int) -> None:
    assert wrong(two("jobs:parity", "dp=2", None, micro_batches), 1e-6) == []


@pytest.mark.parametrize("favour", [None, 2, 1], ids=["spread", "one rank gets nothing", "one expert gets nearly all"])
def test_expert_parallel(two: Ranks, favour: int | None) -> None:
    assert wrong(two("jobs:parity", "dp=2,ep=2", favour), 2e-5) == []


def test_tensor_parallel(two: Ranks) -> None:
    assert wrong(two("jobs:parity", "tp=2"), 2e-5) == []


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["dp=4", "dp=4,ep=2", "dp=4,ep=4", "dp=2,tp=2", "dp=2,tp=2,ep=2", "tp=2,dp=2,ep=1"])
def test_several_axes(four: Ranks, axes: str) -> None:
    assert wrong(four("jobs:parity", axes), 2e-5) == []


def test_averaged_gradients_would_be_seen(two: Ranks) -> None:
    found = wrong(two("jobs:averaged_gradients", "dp=2"), 1e-6)
    assert "norm" in found
    assert "lm_head.weight" in found
    assert "model.layers.0.self_attn.q_proj.weight" in found


def test_a_part_of_the_routers_gradient_would_be_seen(two: Ranks) -> None:
    for errors in two("jobs:split_router", "tp=2"):
        assert errors["model.layers.0.mlp.gate.weight"] > 1e-2
        assert errors["model.layers.1.mlp.gate.weight"] > 1e-2


@pytest.mark.parametrize(("axes", "share"), [("dp=2", 0.5), ("tp=2", 0.5), ("dp=2,ep=2", 0.5)])
def test_a_rank_holds_its_share(two: Ranks, axes: str, share: float) -> None:
    held = two("jobs:values_of", axes)
    whole = 2 * 97 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * 32 + 4 * 3 * 48 * 32) + 5 * 32
    # Whole on every rank: the routers; over tp also the embedding and the norms.
    copied = 2 * 4 * 32 + (97 * 32 + 5 * 32 if axes == "tp=2" else 0)
    assert sum(held) == whole + copied
    assert max(held) <= share * (whole + copied) + 100
