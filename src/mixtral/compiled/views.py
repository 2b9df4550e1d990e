"""The compiled module's views of a model's matrices; a view is made anew when the memory behind it has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixtral.model.mixtral import Linear
from mixtral.model.moe import Experts
from mixtral.ops.native import level, module, threads
from mixtral.quant.modules import PackedExperts, PackedLinear
from mixtral.quant.panels import Panels, expert_set

__all__ = ["DenseView", "dense_matrix", "expert_view", "matrix_view", "multiply"]

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class DenseView:
    """The view of a matrix that is an ordinary parameter [O, I], or of part of one."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._views: Any = None

    def of(self, *weights: Tensor, make: Any) -> Any:
        """``make(*weights)``, kept until one of them is another tensor or lies elsewhere."""
        key = tuple((id(weight), weight.data_ptr()) for weight in weights)
        if key != self._key:
            self._views, self._key = make(*weights), key
        return self._views


def dense_matrix(weight: Tensor) -> Any:
    """The view of a matrix of bfloat16, float16 or float32 [O, I], which keeps its memory."""
    data = weight.detach().contiguous()
    return module().DenseMatrix(_KINDS[weight.dtype], *weight.shape, data.view(torch.uint8).reshape(-1).numpy())


def multiply(x_NI: Tensor, matrices: Sequence[Any], out_NO: Tensor) -> Tensor:
    """``x`` times every matrix transposed, side by side, into ``out``; both float32. A row depends on no other one."""
    module().project(x_NI.numpy(), list(matrices), out_NO.numpy(), threads(), level=level())
    return out_NO


def matrix_view(layer: nn.Module, kept: DenseView) -> Any:
    """The matrix of a ``Linear`` or ``PackedLinear``; None if there is no kernel for its format."""
    if isinstance(layer, PackedLinear):
        return layer.packed.matrix if isinstance(layer.packed, Panels) else None
    if isinstance(layer, Linear) and layer.weight.dtype in _KINDS and layer.weight.is_contiguous():
        return kept.of(layer.weight, make=dense_matrix)
    return None


def _experts(gate_up_E2FD: Tensor, down_EDF: Tensor) -> Any:
    halves = [gate_up.chunk(2) for gate_up in gate_up_E2FD]
    gate, up = ([dense_matrix(half[i]) for half in halves] for i in range(2))
    return expert_set(gate, up, [dense_matrix(down) for down in down_EDF])


def expert_view(layer: nn.Module, kept: DenseView) -> Any:
    """The experts of ``Experts`` or ``PackedExperts``; None if there is no kernel for any of their formats."""
    if isinstance(layer, PackedExperts):
        return layer.compiled()
    if isinstance(layer, Experts):
        weights = (layer.gate_up_proj, layer.down_proj)
        if all(weight.dtype in _KINDS and weight.is_contiguous() for weight in weights):
            return kept.of(*weights, make=_experts)
    return None
