"""Perplexity and divergence against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mixtral.evaluate import divergence
from mixtral.evaluate.divergence import compare

P, Q = np.array([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]), np.array([[0.25, 0.75], [0.9, 0.1], [0.8, 0.2]])


@pytest.mark.parametrize("rows", [1, 2, 256])
def test_numbers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_ROWS", rows)
    # Logits are log-probabilities up to a constant, which may be large.
    found = compare(np.log(P) + 1000, (np.log(Q) - 1000).astype(np.float32), [1, 0, 1])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    last = 0.3 * math.log(0.3 / 0.8) + 0.7 * math.log(0.7 / 0.2)
    assert found.kl_mean == pytest.approx((first + last) / 3, abs=1e-4)
    assert found.kl_99 == pytest.approx(first + 0.98 * (last - first), abs=1e-4)
    assert found.same_top == pytest.approx(1 / 3)
    assert found.perplexity == pytest.approx(((0.5 * 0.1) ** -0.5, (0.25 * 0.1) ** -0.5), abs=1e-3)


def test_a_model_does_not_differ_from_itself() -> None:
    found = compare(np.log(P), np.log(P), [0, 1, 0])
    assert (found.kl_mean, found.kl_99, found.same_top) == (0, 0, 1)
    assert found.perplexity[0] == found.perplexity[1]


def test_shapes() -> None:
    for first, second, ids in [(P, Q, [1, 0]), (P[:1], Q[:1], [1]), (P, Q[:2], [1, 0, 1])]:
        with pytest.raises(ValueError, match="expected"):
            compare(first, second, ids)
