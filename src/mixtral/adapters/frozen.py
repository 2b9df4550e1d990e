"""Products with packed matrices that gradients can flow through: decoded in panels in both directions, nothing saved.

The numbers are those of the decoded matrix, not those of the compiled kernels, which round activations to int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.quant.modules import PackedExperts
from mixtral.quant.packed import Packed
from mixtral.quant.panels import Panels

__all__ = ["PackedStack", "packed_linear", "stacks_of"]

PANEL_VALUES = 1 << 23
"""Numbers decoded at a time: 16 MB of bfloat16, which stay in the last cache until they are multiplied."""
_WHOLE_ROWS = 128
"""Products over a number of rows that is no multiple of this take up to a half longer (oneDNN, AVX-512)."""


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        out_TO = x_TD.new_empty((len(x_TD), packed.shape[0]))
        _multiply([packed], x_TD, out_TO)
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_TO = grads[0]
        grad_TD = grad_TO.new_empty((len(grad_TO), ctx.packed.shape[1]))
        _multiply_back([ctx.packed], grad_TO, grad_TD)
        return grad_TD, None


def packed_linear(x_TD: Tensor, packed: Packed) -> Tensor:
    """``x @ weight.T`` [T, O] with a packed matrix [O, D]; the matrix itself gets no gradient."""
    out: Tensor = _PackedLinear.apply(x_TD, packed)  # type: ignore[no-untyped-call]
    return out


class PackedStack:
    """The packed matrices of E experts; those of an expert lie one below the other. See ``ops.Stacked``.

    With ``kernels``, those that have compiled ones are multiplied by them, for inference.
    """

    def __init__(self, experts: Sequence[Sequence[Packed]], *, kernels: bool = False) -> None:
        self._experts, self._kernels = experts, kernels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, values out, values in."""
        matrices = self._experts[0]
        return len(self._experts), sum(one.shape[0] for one in matrices), matrices[0].shape[1]

    def multiply(self, expert: int, x_NI: Tensor, out_NO: Tensor) -> None:
        """As in ``ops.Stacked``."""
        if self._kernels and x_NI.device.type == "cpu":
            start = 0
            for one in self._experts[expert]:
                part = out_NO[:, start : start + one.shape[0]]
                part.copy_(one.multiply(x_NI)) if isinstance(one, Panels) else _multiply([one], x_NI, part)
                start += one.shape[0]
        else:
            _multiply(self._experts[expert], x_NI, out_NO)

    def multiply_back(self, expert: int, grad_NO: Tensor, out_NI: Tensor) -> None:
        """As in ``ops.Stacked``."""
        _multiply_back(self._experts[expert], grad_NO, out_NI)


def stacks_of(experts: PackedExperts, *, kernels: bool = False) -> tuple[PackedStack, PackedStack]:
    """Gate and up, and down, of the experts of a layer."""
    parts = list(experts.matrices())
    upper: list[tuple[Packed, ...]] = [(gate, up) for gate, up, _ in parts]
    lower: list[tuple[Packed, ...]] = [(down,) for _, _, down in parts]
    return PackedStack(upper, kernels=kernels), PackedStack(lower, kernels=kernels)


def _panels(matrices: Sequence[Packed], like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of matrices that lie one below the other, some at a time, decoded into one small buffer."""
    width = matrices[0].shape[1]
    step = max(1, min(PANEL_VALUES // width, max(one.shape[0] for one in matrices)))
    if step > _WHOLE_ROWS:
        step -= step % _WHOLE_ROWS
    panel = like.new_empty((step, width))
    above = 0
    for one in matrices:
        rows = one.shape[0]
        for start in range(0, rows, step):
            part = panel[: min(step, rows - start)]
            one.decode_rows(start, part)
            yield slice(above + start, above + start + len(part)), part
        above += rows


def _multiply(matrices: Sequence[Packed], x_NI: Tensor, out_NO: Tensor) -> None:
    for rows, weight in _panels(matrices, x_NI):
        out_NO[:, rows] = x_NI @ weight.t()


def _multiply_back(matrices: Sequence[Packed], grad_NO: Tensor, out_NI: Tensor) -> None:
    wide = torch.promote_types(out_NI.dtype, torch.float32)
    # Panels add to the same sums: in float32 or better, rounded once.
    total = out_NI if out_NI.dtype == wide else torch.empty(out_NI.shape, dtype=wide, device=out_NI.device)
    first = True
    for rows, weight in _panels(matrices, grad_NO):
        part = grad_NO[:, rows] @ weight
        total.copy_(part) if first else total.add_(part)
        first = False
    if total is not out_NI:
        out_NI.copy_(total)
