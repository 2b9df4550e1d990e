"""The expert operation for speed: rows sorted by expert, one matrix product per expert, own backward pass.

Shape letters as in ``reference.py``; N is the number of assignments (T * A) with every expert's rows padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Assignment", "assign", "experts", "row_multiple"]

# oneDNN compiles a primitive for every new row count (milliseconds, however small the product), so small matrices pay
# to pad to few different counts; for large ones the padding itself costs more than the compilation: at 512 tokens of
# two 8x7B layers, new prompts each time, multiples of 1, 8 and 16 gave 224, 218 and 214 tokens/s.
_LARGE_MATRIX = 1 << 22


def row_multiple(weight_numel: int) -> int:
    """Rows per expert are padded to a multiple of this, for a weight matrix of that many elements."""
    return 64 if weight_numel < _LARGE_MATRIX else 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where every (token, choice) goes: ``rows_N`` token of each sorted row (-1 padding), ``places_TA`` sorted row of
    each choice, ``bounds`` the row range [start, end) of each expert, padding included."""

    rows_N: Tensor
    places_TA: Tensor
    bounds: tuple[tuple[int, int], ...]


def assign(picks_TA: Tensor, experts: int, multiple: int) -> Assignment:
    """Sort assignments by expert (stable) and pad each one's rows to ``multiple``, or up to 32 to a power of two.

    A ``multiple`` of 1 pads nothing.
    """
    tokens, choices = picks_TA.shape
    flat = picks_TA.reshape(-1)
    counts = torch.bincount(flat, minlength=experts).tolist()
    padded = [_padded(count, multiple) for count in counts]
    ends = torch.tensor(padded).cumsum(0)
    starts = ends - torch.tensor(padded)
    shift = (starts - (torch.tensor(counts).cumsum(0) - torch.tensor(counts))).to(flat.device)
    order = torch.argsort(flat, stable=True)
    places = torch.arange(flat.numel(), device=flat.device) + shift[flat[order]]
    rows_N = torch.full((int(ends[-1]),), -1, dtype=torch.int64, device=flat.device)
    rows_N[places] = order // choices
    places_TA = torch.empty_like(flat).index_put_((order,), places).view(tokens, choices)
    return Assignment(rows_N, places_TA, tuple(zip(starts.tolist(), ends.tolist(), strict=True)))


def _padded(count: int, multiple: int) -> int:
    if multiple > 1 and count <= 32:
        return 1 << (count - 1).bit_length() if count else 0
    return -(-count // multiple) * multiple


class _Experts(torch.autograd.Function):
    """Saves the sorted input and the gate/up products; recomputes SwiGLU; weights enter after the down product."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, plan: Assignment
    ) -> Tensor:
        sorted_ND = _sorted_rows(x_TD, plan)
        # Without a backward pass the products of one expert are not needed any more when the next one's are made.
        keep = any(ctx.needs_input_grad)
        rows = sorted_ND.shape[0] if keep else max(end - start for start, end in plan.bounds)
        products_NF = x_TD.new_empty((rows, gate_up_E2FD.shape[1]))
        out_ND = torch.empty_like(sorted_ND)
        for expert, (start, end) in enumerate(plan.bounds):
            if start < end:
                made_NF = products_NF[start:end] if keep else products_NF[: end - start]
                torch.mm(sorted_ND[start:end], gate_up_E2FD[expert].t(), out=made_NF)
                torch.mm(_swiglu(made_NF), down_EDF[expert].t(), out=out_ND[start:end])
        ctx.save_for_backward(sorted_ND, products_NF, out_ND, weights_TA, gate_up_E2FD, down_EDF)
        ctx.plan = plan
        return _combine(out_ND, weights_TA, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        sorted_ND, products_NF, out_ND, weights_TA, gate_up_E2FD, down_EDF = ctx.saved_tensors
        plan: Assignment = ctx.plan
        grad_TD = grads[0]
        choices = weights_TA.shape[1]
        grad_weights_TA = torch.stack(
            [(out_ND.index_select(0, plan.places_TA[:, a]).float() * grad_TD.float()).sum(-1) for a in range(choices)],
            dim=1,
        )
        row_weight_N = weights_TA.new_zeros(plan.rows_N.shape[0])
        row_weight_N[plan.places_TA.reshape(-1)] = weights_TA.reshape(-1)
        grad_out_ND = _sorted_rows(grad_TD, plan).mul_(row_weight_N[:, None].to(grad_TD.dtype))
        grad_sorted_ND = torch.empty_like(sorted_ND)
        # An expert without tokens gets zeros, not None: optimizers and collectives then treat all experts alike.
        grad_gate_up = torch.zeros_like(gate_up_E2FD)
        grad_down = torch.zeros_like(down_EDF)
        for expert, (start, end) in enumerate(plan.bounds):
            if start < end:
                _expert_backward(
                    sorted_ND[start:end],
                    products_NF[start:end],
                    grad_out_ND[start:end],
                    (gate_up_E2FD[expert], down_EDF[expert]),
                    (grad_sorted_ND[start:end], grad_gate_up[expert], grad_down[expert]),
                )
        grad_x_TD = sum(grad_sorted_ND.index_select(0, plan.places_TA[:, a]).float() for a in range(choices))
        assert isinstance(grad_x_TD, Tensor)
        return grad_x_TD.to(grad_TD.dtype), grad_weights_TA, grad_gate_up, grad_down, None


def _swiglu(products_NF: Tensor) -> Tensor:
    gate, up = products_NF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _expert_backward(
    x: Tensor,
    products: Tensor,
    grad_out: Tensor,
    weights: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    gate_up, down = weights
    grad_x, grad_gate_up, grad_down = grads
    gate, up = products.chunk(2, dim=-1)
    grad_products = torch.empty_like(products)
    grad_gate, grad_up = grad_products.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate)
    grad_hidden = grad_out @ down
    torch.mul(grad_hidden, activated, out=grad_up)
    torch.mm(grad_out.t(), activated.mul_(up), out=grad_down)
    torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate, grad_input=grad_gate)
    torch.mm(grad_products.t(), x, out=grad_gate_up)
    torch.mm(grad_products, gate_up, out=grad_x)


def _sorted_rows(x_TD: Tensor, plan: Assignment) -> Tensor:
    # Padding rows repeat token 0; only the weight gradients read what becomes of them, and there they must be zero.
    sorted_ND = x_TD.index_select(0, plan.rows_N.clamp_min(0))
    return sorted_ND.index_fill_(0, torch.nonzero(plan.rows_N < 0)[:, 0], 0)


def _combine(out_ND: Tensor, weights_TA: Tensor, plan: Assignment) -> Tensor:
    total_TD = out_ND.index_select(0, plan.places_TA[:, 0]).float().mul_(weights_TA[:, :1])
    for choice in range(1, weights_TA.shape[1]):
        rows_TD = out_ND.index_select(0, plan.places_TA[:, choice]).float()
        total_TD += rows_TD.mul_(weights_TA[:, choice : choice + 1])
    return total_TD.to(out_ND.dtype)


def experts(x_TD: Tensor, picks_TA: Tensor, weights_TA: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Weighted sum of the chosen experts: same contract as ``reference.experts``, every weight matrix read once."""
    count, width = gate_up_E2FD.shape[0], gate_up_E2FD[0].numel()
    plan = assign(picks_TA, count, row_multiple(width))
    out: Tensor = _Experts.apply(x_TD, weights_TA.float(), gate_up_E2FD, down_EDF, plan)  # type: ignore[no-untyped-call]
    return out
