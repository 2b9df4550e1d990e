"""Tensor parallelism: ranks share a batch, each has some heads and a slice of every expert; two sums per layer.

All ranks of the axis have the same activations outside of attention and experts, to the bit, and the same router, so
they choose the same experts. T tokens, D width, H query heads, G key-value heads, K head size, E experts, A experts per
token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from mixtral import ops
from mixtral.config import MixtralConfig
from mixtral.model import Context
from mixtral.model.mixtral import Attention
from mixtral.model.moe import Experts, MixtureOfExperts, Router

__all__ = ["TensorAttention", "TensorMixture", "enter", "leave"]


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        totals = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for total in totals:
            dist.all_reduce(total, group=ctx.group)
        return (None, *totals)


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def enter(group: dist.ProcessGroup, *values: Tensor) -> tuple[Tensor, ...]:
    """The values, which all ranks have alike, on their way into a computation that every rank does a part of.

    Each rank's gradient is that of its part; going back, the parts are added.
    """
    out: tuple[Tensor, ...] = _Enter.apply(group, *values)  # type: ignore[no-untyped-call]
    return out


def leave(group: dist.ProcessGroup, part: Tensor) -> Tensor:
    """The sum of all ranks' parts, which all of them go on with alike."""
    out: Tensor = _Leave.apply(group, part)  # type: ignore[no-untyped-call]
    return out


class TensorAttention(Attention):
    """Attention of H/n query heads and G/n key-value heads; the output is the sum over the n ranks of the group."""

    def __init__(self, config: MixtralConfig, layer: int, group: dist.ProcessGroup, **options: Any) -> None:
        ranks = group.size()
        part = config.replace(
            num_attention_heads=config.num_attention_heads // ranks,
            num_key_value_heads=config.num_key_value_heads // ranks,
        )
        super().__init__(part, layer, **options)
        self.group = group

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], context: Context) -> Tensor:
        """[T, D], as of all heads."""
        (x_TD,) = enter(self.group, x_TD)
        return leave(self.group, super().forward(x_TD, angles, context))


class TensorMixture(MixtureOfExperts):
    """A whole router, and of every expert a slice of its hidden units; the output is the sum over the ranks."""

    def __init__(self, gate: Router, experts: Experts, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.gate, self.experts, self.group = gate, experts, group

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ops.Route]:
        """The layer's output [T, D] and its routing.

        What reaches the router through the weights of the choices is a part on every rank, and is added up; what
        reaches it through the losses on its logits is whole already.
        """
        route = self.gate(x_TD)
        inside_TD, weights_TA = enter(self.group, x_TD, route.weights_TA)
        part_TD = self.experts(inside_TD, route._replace(weights_TA=weights_TA))
        return leave(self.group, part_TD), route
