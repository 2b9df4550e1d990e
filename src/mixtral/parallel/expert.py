"""Expert parallelism: every rank has some experts, and rows travel to the ranks of the experts they chose and back.

No token is dropped and nothing is padded, so how much travels differs from rank to rank and from step to step; a rank
may get nothing. T tokens, D width, F expert hidden size, E experts, A experts per token, N rows of this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixtral import ops
from mixtral.config import MixtralConfig
from mixtral.model.moe import Experts

__all__ = ["SplitExperts", "exchange"]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = (send, receive), group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.counts
        return _all_to_all(grads[0], receive, send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first ``send[0]`` rows to rank 0 of the group, the next to rank 1, ...; what came, in order of rank.

    ``receive`` counts what the others send here. The gradient takes the way back.
    """
    out: Tensor = _Exchange.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True)
class _Plan:
    """``order``: the choices, sorted by expert. ``experts_N1``: for which of this rank's experts a row that came is."""

    order: Tensor
    inverse: Tensor
    send: list[int]
    receive: list[int]
    experts_N1: Tensor


class SplitExperts(Experts):
    """E/n experts of a layer on each of n ranks, each rank with tokens of its own.

    A row's gradient comes back to its rank; an expert's gradient is the sum over the rows of all ranks of the group.
    ``hidden`` is F, or the slice of it that this rank has.
    """

    def __init__(
        self,
        config: MixtralConfig,
        group: dist.ProcessGroup,
        hidden: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.group, self.count = group, config.num_local_experts
        own, width = config.num_local_experts // group.size(), config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty((own, 2 * hidden, width), device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty((own, width, hidden), device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, route: ops.Route) -> Tensor:
        """Weighted sum of the chosen experts, wherever they are: [T, D]."""
        plan = self._plan(route.picks_TA)
        tokens, choices = route.picks_TA.shape
        each = x_TD[:, None].expand(-1, choices, -1).flatten(0, 1)
        sorted_rows = ops.gather_rows(each, plan.order, plan.inverse)
        came_ND = exchange(sorted_rows, plan.send, plan.receive, self.group)
        # The choices' weights stay with the tokens: they are applied when the rows are back.
        ones_N1 = torch.ones_like(plan.experts_N1, dtype=torch.float32)
        made_ND = ops.experts(came_ND, plan.experts_N1, ones_N1, self.gate_up_proj, self.down_proj)
        back = exchange(made_ND, plan.receive, plan.send, self.group)
        out_TAD = ops.gather_rows(back, plan.inverse, plan.order).view(tokens, choices, x_TD.shape[1])
        return (out_TAD.float() * route.weights_TA[..., None]).sum(1).to(x_TD.dtype)

    @torch.no_grad()
    def _plan(self, picks_TA: Tensor) -> _Plan:
        flat = picks_TA.reshape(-1)
        order = torch.argsort(flat, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        # Row r goes to rank r of the group: how many rows come for each of its experts.
        to_send = torch.bincount(flat, minlength=self.count).view(self.group.size(), -1)
        to_come = torch.empty_like(to_send)
        dist.all_to_all_single(to_come, to_send, group=self.group)
        numbers = torch.arange(to_come.shape[1], device=flat.device).repeat(self.group.size())
        experts_N1 = numbers.repeat_interleave(to_come.reshape(-1))[:, None]
        return _Plan(order, inverse, to_send.sum(1).tolist(), to_come.sum(1).tolist(), experts_N1)
