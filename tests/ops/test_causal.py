"""Blockwise causal attention equals torch's own, forward and backward, at lengths around the block size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.ops import causal

SHAPES = [(1, 1, 1, 1, 2), (3, 4, 2, 7, 6), (2, 6, 2, 33, 8), (5, 8, 4, 16, 32), (2, 2, 2, 40, 4)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    rows, heads, groups, length, size = shape
    made = []
    for seed, count in enumerate((heads, groups, groups)):
        generator = torch.Generator().manual_seed(seed)
        made.append(torch.randn(rows, length, count, size, generator=generator, dtype=torch.float64).to(dtype))
    return [value.transpose(1, 2).requires_grad_() for value in made]  # strided, as the model has them


def both(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Output and three gradients, (ours, torch's in float64) each."""
    leaves = inputs(shape, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = causal.causal_attention(*leaves)
    wanted = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, direction.to(dtype))]
    return list(zip(ours, [wanted.detach(), *torch.autograd.grad(wanted, wide, direction)], strict=True))


@pytest.fixture(params=[(4, 1), (16, 4096), (128, 1 << 21)], ids=["small", "middle", "whole"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "_BLOCK", request.param[0])
    monkeypatch.setattr(causal, "_SCORES", request.param[1])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_torch(shape: tuple[int, ...], dtype: torch.dtype, limit: float) -> None:
    for ours, wanted in both(shape, dtype):
        assert ours.dtype == dtype
        # One token attends to itself alone: gradients of query and key are zero there.
        assert (ours.double() - wanted).norm() <= limit * max(1.0, wanted.norm())


def test_the_real_sizes_cross_blocks_and_rows() -> None:
    shape = (9, 8, 4, 300, 32)
    parts = list(causal._parts(torch.empty(9, 8, 300, 32), torch.empty(9, 4, 300, 32)))
    assert len({part[1].start for part in parts}) == 3
    assert len({part[0].start for part in parts}) > 1
    for ours, wanted in both(shape, torch.float32):
        assert (ours.double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_later_tokens_cannot_be_seen() -> None:
    q, k, v = inputs((1, 2, 1, 200, 4), torch.float32)
    before = causal.causal_attention(q, k, v)
    with torch.no_grad():
        k[:, :, 150:] += 5.0
        v[:, :, 150:] -= 7.0
    after = causal.causal_attention(q, k, v)
    assert torch.equal(before[:, :, :150], after[:, :, :150])
    assert not torch.equal(before[:, :, 150:], after[:, :, 150:])
