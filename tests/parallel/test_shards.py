"""Loss, gradients and their norm over two and four ranks are those of one process on the same documents."""

from __future__ import annotations

import pytest
from pool import Ranks


def agree(results: list[tuple[float, dict[str, float], float]], most: float) -> None:
    for loss, gradients, norm in results:
        assert abs(loss) <= 1e-6
        assert {name: error for name, error in gradients.items() if not error <= most} == {}
        assert abs(norm) <= 1e-6


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_data_parallel(two: Ranks, micro_batches: int) -> None:
    agree(two("jobs:parity", "dp=2", None, micro_batches), 1e-6)


@pytest.mark.parametrize("favour", [None, 2, 1], ids=["spread", "one rank gets nothing", "one expert gets all"])
def test_expert_parallel(two: Ranks, favour: int | None) -> None:
    agree(two("jobs:parity", "dp=2,ep=2", favour), 2e-5)


def test_tensor_parallel(two: Ranks) -> None:
    agree(two("jobs:parity", "tp=2"), 2e-5)


@pytest.mark.parametrize("axes", ["dp=4,ep=2", "dp=4,ep=4", "dp=4", "dp=2,tp=2", "dp=2,tp=2,ep=2"])
@pytest.mark.slow
def test_several_axes(four: Ranks, axes: str) -> None:
    agree(four("jobs:parity", axes), 2e-5)
