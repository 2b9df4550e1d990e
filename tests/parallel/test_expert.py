"""Rows that travel to their experts and back: the layer and all its gradients are those of one process."""

from __future__ import annotations

import pytest
from pool import Ranks

CASES = {
    "even": ([16, 16], [0, 0]),
    "uneven": ([40, 3], [0, 1]),
    "one rank's experts get nothing": ([11, 8], [2, 2]),
    "a rank without tokens": ([9, 0], [0, 0]),
    "no tokens at all": ([0, 0], [0, 0]),
}


@pytest.mark.parametrize(("tokens", "first"), CASES.values(), ids=CASES)
def test_split_experts(two: Ranks, tokens: list[int], first: list[int]) -> None:
    for errors in two("jobs:experts", "dp=2,ep=2", tokens, first):
        assert {name: error for name, error in errors.items() if not error <= 2e-5} == {}
