"""Muon over ranks makes the update of one process: every matrix is whole when it is orthogonalised."""

from __future__ import annotations

import pytest
from pool import Ranks

CLOSE = 2e-6


def most(results: list[dict[str, float]]) -> float:
    return max(error for errors in results for error in errors.values())


@pytest.mark.parametrize("axes", ["dp=2", "tp=2", "dp=2,ep=2"])
def test_the_update_is_that_of_one_process(two: Ranks, axes: str) -> None:
    assert most(two("jobs:muon", axes, 2)) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["dp=4", "dp=2,tp=2", "dp=4,ep=2", "dp=2,tp=2,ep=2", "dp=4,ep=4"])
def test_over_several_axes(four: Ranks, axes: str) -> None:
    assert most(four("jobs:muon", axes, 2)) <= CLOSE


@pytest.mark.parametrize("axes", ["dp=2", "tp=2"])
def test_pieces_orthogonalised_apart_would_be_seen(two: Ranks, axes: str) -> None:
    for errors in two("jobs:muon_of_pieces", axes):
        assert errors["model.layers.0.self_attn.q_proj.weight"] > 0.1
