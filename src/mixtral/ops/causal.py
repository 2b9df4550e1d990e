"""Causal attention of rows of equal length for training on a CPU: blocks that stay in the cache, own backward pass.

torch's fused kernel is slow going backward on a CPU for small heads. Here every block of queries meets only the keys up
to its end, in plain batched products; the backward pass makes the shares again instead of keeping them.

N rows, L tokens, H query heads, G key-value heads, R = H/G, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_attention"]

_BLOCK = 128  # queries that are computed together
_SCORES = 1 << 21  # scores that are computed together: 4 MB in bfloat16


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHLK: Tensor, k_NGLK: Tensor, v_NGLK: Tensor) -> Tensor:
        ctx.save_for_backward(q_NHLK, k_NGLK, v_NGLK)
        out_NHLK = torch.empty_like(q_NHLK)
        for part in _parts(q_NHLK, k_NGLK):
            shares = _shares(part, q_NHLK, k_NGLK)
            _queries(part, out_NHLK).copy_((shares @ _keys(part, v_NGLK)).view(_shape(part, out_NHLK)))
        return out_NHLK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_NHLK, k_NGLK, v_NGLK = ctx.saved_tensors
        grad_q = torch.empty_like(q_NHLK)
        # Several blocks of queries add to the same keys: summed in float32 or better.
        wide = torch.promote_types(k_NGLK.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros(k_NGLK.shape, dtype=wide, device=k_NGLK.device) for _ in range(2))
        scale = q_NHLK.shape[-1] ** -0.5
        for part in _parts(q_NHLK, k_NGLK):
            shares = _shares(part, q_NHLK, k_NGLK)
            keys, groups = _keys(part, k_NGLK), k_NGLK.shape[1]
            queries, grad_out = (_folded(part, value, groups) for value in (q_NHLK, grads[0]))
            _add(part, grad_v, shares.mT @ grad_out)
            grad_shares = grad_out @ _keys(part, v_NGLK).mT
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype).mul_(scale)
            _queries(part, grad_q).copy_((grad_scores @ keys).view(_shape(part, grad_q)))
            _add(part, grad_k, grad_scores.mT @ queries)
        return grad_q, grad_k.to(k_NGLK.dtype), grad_v.to(v_NGLK.dtype)


_Part = tuple[slice, slice]  # rows, and the queries of a block


def _parts(q_NHLK: Tensor, k_NGLK: Tensor) -> Iterator[_Part]:
    rows, heads, length, _ = q_NHLK.shape
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        together = max(1, _SCORES // (heads * (end - start) * end))
        for row in range(0, rows, together):
            yield slice(row, min(row + together, rows)), slice(start, end)


def _queries(part: _Part, x_NHLK: Tensor) -> Tensor:
    return x_NHLK[part[0], :, part[1]]


def _shape(part: _Part, x_NHLK: Tensor) -> torch.Size:
    return _queries(part, x_NHLK).shape


def _folded(part: _Part, x_NHLK: Tensor, groups: int) -> Tensor:
    """Queries of a part, [N * G, R * L, K]: those of one key-value head below each other, so keys need no repeating."""
    queries = _queries(part, x_NHLK)
    return queries.reshape(queries.shape[0] * groups, -1, queries.shape[-1])


def _keys(part: _Part, x_NGLK: Tensor) -> Tensor:
    """Keys or values that a part can see, [N * G, L, K]."""
    return x_NGLK[part[0], :, : part[1].stop].flatten(0, 1)


def _add(part: _Part, total_NGLK: Tensor, grad: Tensor) -> None:
    seen = total_NGLK[part[0], :, : part[1].stop]
    seen += grad.view(seen.shape)


def _shares(part: _Part, q_NHLK: Tensor, k_NGLK: Tensor) -> Tensor:
    """Softmax over the keys up to each query: [N * G, R * L, keys]."""
    groups, (start, end) = k_NGLK.shape[1], (part[1].start, part[1].stop)
    future = torch.full((end - start, end), float("-inf"), dtype=q_NHLK.dtype, device=q_NHLK.device).triu(start + 1)
    queries = _folded(part, q_NHLK, groups)
    bias = future.repeat(q_NHLK.shape[1] // groups, 1)
    scores = torch.baddbmm(bias, queries, _keys(part, k_NGLK).mT, alpha=q_NHLK.shape[-1] ** -0.5)
    return scores.softmax(-1)


def causal_attention(q_NHLK: Tensor, k_NGLK: Tensor, v_NGLK: Tensor) -> Tensor:
    """Causal grouped-query attention of every row over itself: [N, H, L, K]; off the CPU, torch's fused kernel."""
    if q_NHLK.device.type != "cpu":
        return F.scaled_dot_product_attention(q_NHLK, k_NGLK, v_NGLK, is_causal=True, enable_gqa=True)
    out: Tensor = _CausalAttention.apply(q_NHLK, k_NGLK, v_NGLK)  # type: ignore[no-untyped-call]
    return out
