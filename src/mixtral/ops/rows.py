"""Moving rows by an index that uses every row once: forward and backward are both plain gathers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["gather_rows"]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(source, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _take(grads[0], inverse), None, None


def _take(source: Tensor, index: Tensor) -> Tensor:
    """Rows of ``source``; index -1 gives a row of zeros."""
    rows = source.index_select(0, index.clamp_min(0))
    return rows.index_fill_(0, torch.nonzero(index < 0)[:, 0], 0)


def gather_rows(source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``source[index]`` along dimension 0, with a gather instead of a scatter-add in the backward pass.

    Args:
        source: [N, ...].
        index: int64 [M], the source row of every output row, or -1 for a row of zeros. No source row occurs twice.
        inverse: int64 [N], the output row of every source row, or -1 where it occurs nowhere.
    """
    out: Tensor = _GatherRows.apply(source, index, inverse)  # type: ignore[no-untyped-call]
    return out
