"""The expert operation for speed: rows sorted by expert, one matrix product per expert, own backward pass.

Shape letters as in ``reference.py``; N is the number of assignments (T * A) with every expert's rows padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.ops import compiled
from mixtral.ops.lowrank import LowRank, keep_mask
from mixtral.ops.reference import Pair

__all__ = ["Assignment", "Stacked", "assign", "experts", "row_multiple"]

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


class Stacked(Protocol):
    """Matrices of E experts that are multiplied with and get no gradient, however they are stored."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, values out, values in."""
        ...

    def multiply(self, expert: int, x_NI: Tensor, out_NO: Tensor) -> None:
        """``x @ weight.T`` of an expert into ``out``."""
        ...

    def multiply_back(self, expert: int, grad_NO: Tensor, out_NI: Tensor) -> None:
        """``grad @ weight`` of an expert into ``out``."""
        ...


@dataclass(frozen=True, slots=True)
class _Dense:
    weight_EOI: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, out, width = self.weight_EOI.shape
        return experts, out, width

    def multiply(self, expert: int, x_NI: Tensor, out_NO: Tensor) -> None:
        torch.mm(x_NI, self.weight_EOI[expert].t(), out=out_NO)

    def multiply_back(self, expert: int, grad_NO: Tensor, out_NI: Tensor) -> None:
        torch.mm(grad_NO, self.weight_EOI[expert], out=out_NI)


@dataclass(frozen=True, slots=True)
class _Call:
    """What the experts are called with besides tensors that may want gradients."""

    plan: Assignment
    packed: tuple[Stacked | None, Stacked | None]
    scales: tuple[float, float]
    dropout: float
    chosen: tuple[int, ...]

    def sources(self, *dense: Tensor | None) -> list[Stacked]:
        """Gate and up, and down."""
        return [_source(weight, packed) for weight, packed in zip(dense, self.packed, strict=True)]

    def low_rank(self, factors: Sequence[Tensor | None], masks: Sequence[Tensor | None]) -> list[LowRank | None]:
        """What the pairs add to either."""
        found: list[LowRank | None] = []
        for a, b, scale, keep in zip(factors[::2], factors[1::2], self.scales, masks, strict=True):
            found.append(None if a is None or b is None else LowRank(Pair(a, b, scale), keep, self.dropout))
        return found


def _source(weight: Tensor | None, packed: Stacked | None) -> Stacked:
    if packed is not None:
        return packed
    assert weight is not None
    return _Dense(weight)


class _Experts(torch.autograd.Function):
    """Saves the sorted input and the gate/up products; recomputes SwiGLU; weights enter after the down product.

    Tensors: x, weights, gate_up and down (None where they are packed), a and b of either pair (or None), and after the
    call the chosen experts' slices of gate_up, then of down.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TA: Tensor, *rest: Any) -> Tensor:
        dense, factors, call = rest[:2], rest[2:6], rest[6]
        plan: Assignment = call.plan
        gate_up, down = call.sources(*dense)
        sorted_ND = _sorted_rows(x_TD, plan)
        masks = [
            None if a is None else keep_mask(len(sorted_ND), a.shape[-1], call.dropout, x_TD.device)
            for a in factors[::2]
        ]
        low_gate_up, low_down = call.low_rank(factors, masks)
        # Without a backward pass the products of one expert are not needed any more when the next one's are made.
        keep = any(ctx.needs_input_grad)
        rows = sorted_ND.shape[0] if keep else max(end - start for start, end in plan.bounds)
        products_NF = x_TD.new_empty((rows, gate_up.shape[1]))
        out_ND = torch.empty_like(sorted_ND)
        for expert, (start, end) in enumerate(plan.bounds):
            if start == end:
                continue
            some = slice(start, end)
            made_NF = products_NF[some] if keep else products_NF[: end - start]
            gate_up.multiply(expert, sorted_ND[some], made_NF)
            if low_gate_up is not None:
                low_gate_up.add(expert, some, sorted_ND[some], made_NF)
            hidden_NF = _swiglu(made_NF)
            down.multiply(expert, hidden_NF, out_ND[some])
            if low_down is not None:
                low_down.add(expert, some, hidden_NF, out_ND[some])
        ctx.save_for_backward(sorted_ND, products_NF, out_ND, weights_TA, *dense, *factors, *masks)
        ctx.call = call
        return _combine(out_ND, weights_TA, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sorted_ND, products_NF, out_ND, weights_TA, *rest = ctx.saved_tensors
        dense, factors, masks = rest[:2], rest[2:6], rest[6:]
        call: _Call = ctx.call
        plan, grad_TD = call.plan, grads[0]
        grad_out_ND, grad_weights_TA = _combine_back(out_ND, weights_TA, grad_TD, plan)
        grad_sorted_ND = torch.empty_like(sorted_ND)
        # An expert without tokens gets zeros, not None: optimizers and collectives then treat all experts alike.
        wanted = ctx.needs_input_grad[2:4]
        grad_dense = [torch.zeros_like(w) if need else None for w, need in zip(dense, wanted, strict=True)]
        grad_factors = [None if factor is None else torch.zeros_like(factor) for factor in factors]
        sources = call.sources(*dense)
        grad_slices = [grad_TD.new_zeros(source.shape[1:]) for source in sources for _ in call.chosen]
        made = _Grads(grad_dense, grad_factors, dict(zip(call.chosen, _halves(grad_slices), strict=True)))
        lows = call.low_rank(factors, masks)
        for expert, (start, end) in enumerate(plan.bounds):
            if start < end:
                some = slice(start, end)
                inner = _Inner(expert, some, sources, lows, made)
                inner.backward(sorted_ND[some], products_NF[some], grad_out_ND[some], grad_sorted_ND[some])
        grad_x_TD = _combine(grad_sorted_ND, None, plan)
        return grad_x_TD, grad_weights_TA, *grad_dense, *grad_factors, None, *grad_slices


def _halves(slices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    half = len(slices) // 2
    return list(zip(slices[:half], slices[half:], strict=True))


@dataclass(frozen=True, slots=True)
class _Grads:
    """Where gradients go: of the stacked tensors, of the factors of the pairs, of the slices of chosen experts."""

    dense: Sequence[Tensor | None]
    factors: Sequence[Tensor | None]
    slices: Mapping[int, tuple[Tensor, Tensor]]

    def weight(self, expert: int, which: int) -> Tensor | None:
        """That of one matrix; None if nobody wants it."""
        if expert in self.slices:
            return self.slices[expert][which]
        whole = self.dense[which]
        return None if whole is None else whole[expert]

    def pair(self, expert: int, which: int) -> list[Tensor]:
        """Those of a and b."""
        return [factor[expert] for factor in self.factors[2 * which : 2 * which + 2] if factor is not None]


@dataclass(frozen=True, slots=True)
class _Inner:
    """The backward pass of one expert over its rows."""

    expert: int
    rows: slice
    sources: Sequence[Stacked]
    lows: Sequence[LowRank | None]
    grads: _Grads

    def backward(self, x_ND: Tensor, products_NF: Tensor, grad_out_ND: Tensor, grad_x_ND: Tensor) -> None:
        """Fill the gradients of the rows, and of the weights that want one."""
        grad_hidden_NF = products_NF.new_empty((len(products_NF), products_NF.shape[1] // 2))
        self.sources[1].multiply_back(self.expert, grad_out_ND, grad_hidden_NF)
        if self.lows[1] is not None:
            self._low(1, _swiglu(products_NF), grad_out_ND, grad_hidden_NF)
        hidden_NF, grad_products_NF = _swiglu_back(products_NF, grad_hidden_NF)
        grad_down = self.grads.weight(self.expert, 1)
        if grad_down is not None:
            torch.mm(grad_out_ND.t(), hidden_NF, out=grad_down)
        grad_gate_up = self.grads.weight(self.expert, 0)
        if grad_gate_up is not None:
            torch.mm(grad_products_NF.t(), x_ND, out=grad_gate_up)
        self.sources[0].multiply_back(self.expert, grad_products_NF, grad_x_ND)
        self._low(0, x_ND, grad_products_NF, grad_x_ND)

    def _low(self, which: int, x: Tensor, grad_out: Tensor, grad_x: Tensor) -> None:
        low = self.lows[which]
        if low is not None:
            low.back(self.expert, self.rows, x, grad_out, grad_x, self.grads.pair(self.expert, which))


def _swiglu(products_NF: Tensor) -> Tensor:
    if compiled.is_compiled(products_NF):
        hidden_NF = products_NF.new_empty((len(products_NF), products_NF.shape[1] // 2))
        compiled.call("train_gate", products_NF, hidden_NF)
        return hidden_NF
    gate, up = products_NF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _swiglu_back(products_NF: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
    """The result of ``_swiglu`` again, and the gradient of the products; ``grad_NF`` may be overwritten."""
    grad_products_NF = torch.empty_like(products_NF)
    if compiled.is_compiled(products_NF):
        hidden_NF = torch.empty_like(grad_NF)
        compiled.call("train_gate_back", products_NF, grad_NF, hidden_NF, grad_products_NF)
        return hidden_NF, grad_products_NF
    gate, up = products_NF.chunk(2, dim=-1)
    grad_gate, grad_up = grad_products_NF.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate)
    torch.mul(grad_NF, activated, out=grad_up)
    torch.ops.aten.silu_backward(grad_NF.mul_(up), gate, grad_input=grad_gate)
    return activated.mul_(up), grad_products_NF


def _sorted_rows(x_TD: Tensor, plan: Assignment) -> Tensor:
    # Of padding rows only the weight gradients read what becomes of them, and there they must be zero.
    if compiled.is_compiled(x_TD):
        sorted_ND = x_TD.new_empty((len(plan.rows_N), x_TD.shape[1]))
        compiled.call("train_sort", x_TD.contiguous(), plan.rows_N, sorted_ND)
        return sorted_ND
    return x_TD.index_select(0, plan.rows_N.clamp_min(0)).index_fill_(0, _padding(plan), 0)


def _padding(plan: Assignment) -> Tensor:
    return torch.nonzero(plan.rows_N < 0)[:, 0]


def _combine(rows_ND: Tensor, weights_TA: Tensor | None, plan: Assignment) -> Tensor:
    """Of every token the sum of its rows, by their weights."""
    tokens, choices = plan.places_TA.shape
    if compiled.is_compiled(rows_ND):
        out_TD = rows_ND.new_empty((tokens, rows_ND.shape[1]))
        weights = None if weights_TA is None else weights_TA.contiguous()
        compiled.call("train_combine", rows_ND, plan.places_TA, weights, out_TD)
        return out_TD
    total_TD = rows_ND.new_zeros((tokens, rows_ND.shape[1]), dtype=torch.promote_types(rows_ND.dtype, torch.float32))
    for choice in range(choices):
        some_TD = rows_ND.index_select(0, plan.places_TA[:, choice]).to(total_TD.dtype)
        total_TD += some_TD if weights_TA is None else some_TD * weights_TA[:, choice : choice + 1]
    return total_TD.to(rows_ND.dtype)


def _combine_back(rows_ND: Tensor, weights_TA: Tensor, grad_TD: Tensor, plan: Assignment) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights."""
    if compiled.is_compiled(rows_ND, grad_TD):
        grad_ND, grad_weights_TA = torch.empty_like(rows_ND), torch.empty_like(weights_TA)
        grad_ND.index_fill_(0, _padding(plan), 0)
        weights_TA = weights_TA.contiguous()
        arrays = (rows_ND, plan.places_TA, weights_TA, grad_TD.contiguous(), grad_ND, grad_weights_TA)
        compiled.call("train_combine_back", *arrays)
        return grad_ND, grad_weights_TA
    grad_weights_TA = torch.stack(
        [
            (rows_ND.index_select(0, plan.places_TA[:, a]).float() * grad_TD.float()).sum(-1)
            for a in range(weights_TA.shape[1])
        ],
        dim=1,
    )
    row_weight_N = weights_TA.new_zeros(plan.rows_N.shape[0])
    row_weight_N[plan.places_TA.reshape(-1)] = weights_TA.reshape(-1)
    return _sorted_rows(grad_TD, plan).mul_(row_weight_N[:, None].to(grad_TD.dtype)), grad_weights_TA


def experts(
    x_TD: Tensor,
    picks_TA: Tensor,
    weights_TA: Tensor,
    gate_up: Tensor | Stacked,
    down: Tensor | Stacked,
    *,
    pairs: tuple[Pair | None, Pair | None] = (None, None),
    dropout: float = 0.0,
    slices: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts: same contract as ``reference.experts``, every weight matrix read once.

    Args:
        gate_up, down: [E, 2F, D] and [E, D, F], or matrices that are stored otherwise.
        pairs: low-rank additions to either, in the dtype of ``x``; neither they nor their gradients are ever multiplied
            out to the size of a matrix.
        dropout: share of the inputs of the pairs that is left out, drawn anew for every row and expert.
        slices: experts whose matrices get gradients while the stacked tensors do not; both are views of these.
    """
    count, out, width = gate_up.shape
    plan = assign(picks_TA, count, row_multiple(out * width))
    dense, packed = zip(*(_sorted_out(weight) for weight in (gate_up, down)), strict=True)
    factors = [factor for pair in pairs for factor in ((None, None) if pair is None else pair[:2])]
    scales = [0.0 if pair is None else pair.scale for pair in pairs]
    given = slices or {}
    call = _Call(plan, packed, (scales[0], scales[1]), dropout, tuple(given))
    chosen = [given[expert][which] for which in range(2) for expert in given]
    result: Tensor = _Experts.apply(x_TD, weights_TA.float(), *dense, *factors, call, *chosen)  # type: ignore[no-untyped-call]
    return result


def _sorted_out(weight: Tensor | Stacked) -> tuple[Tensor | None, Stacked | None]:
    return (weight, None) if isinstance(weight, Tensor) else (None, weight)
