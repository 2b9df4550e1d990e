"""Attention over a cache equals its specification, for one query and for many."""

from __future__ import annotations

import pytest
import torch

from mixtral import ops
from mixtral.ops import reference


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("keys", [7, 64, 130])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (8, 2), (6, 2), (5, 1)])
def test_attention(queries: int, keys: int, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(keys + heads)
    q = torch.randn(queries, heads, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, keys, groups, 16, generator=generator, dtype=torch.float64)
    found = ops.attention(q, k, v)
    wanted = reference.attention(q, k, v)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-12


def test_single_queries_of_a_view_that_is_not_contiguous() -> None:
    """Queries come as slices of a batch, keys as slices of a cache."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 4, 8, generator=generator)
    k, v = torch.randn(2, 100, 2, 8, generator=generator)[:, 10:73]
    for row in range(5):
        found = ops.attention(q[row : row + 1], k, v)
        assert torch.allclose(found, reference.attention(q[row : row + 1], k, v), atol=1e-6)
