"""The cross entropy over split head rows is that over the whole head."""

from __future__ import annotations

import pytest
from pool import Ranks


@pytest.mark.parametrize(("rows", "tokens"), [(97, 50), (2, 5), (3, 1), (40, 300)])
def test_split_rows_give_the_same_loss_and_gradients(two: Ranks, rows: int, tokens: int) -> None:
    for errors in two("jobs:head", "tp=2", rows, tokens):
        assert max(errors) <= 1e-4 if tokens == 300 else max(errors) <= 1e-5


@pytest.mark.slow
def test_a_rank_may_have_no_rows(four: Ranks) -> None:
    for errors in four("jobs:head", "tp=4", 5, 20):
        assert max(errors) <= 1e-5
