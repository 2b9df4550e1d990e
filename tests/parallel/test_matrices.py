"""Muon over ranks makes the update of one process: every matrix is whole when it is orthogonalised."""

from __future__ import annotations

import pytest
from pool import Ranks

# The steps compute in bfloat16; batches of another size may round in another order.
CLOSE = 0.02


def most(results: list[dict[str, float]]) -> float:
    return max(error for errors in results for error in errors.values())


@pytest.mark.parametrize("axes", ["dp=2", "tp=2", "dp=2,ep=2"])
def test_the_update_is_that_of_one_process(two: Ranks, axes: str) -> None:
    assert most(two("jobs:muon", axes, 2)) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["dp=4", "dp=2,tp=2", "dp=4,ep=2", "dp=2,tp=2,ep=2", "dp=4,ep=4"])
def test_over_several_axes(four: Ranks, axes: str) -> None:
    assert most(four("jobs:muon", axes, 2)) <= CLOSE
