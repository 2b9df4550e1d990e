"""Layers over packed matrices, with the calls of the dense ones; and tables in which many token ids share a row.

``decoded`` gives the numbers as the parameters of the dense layer, by their names in it. On the CPU, matrices in panels
go through the compiled kernels. All others are decoded in parts: at most one matrix of one expert at a time, or
``PANEL_VALUES`` values of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.ops.reference import swiglu
from mixtral.quant.packed import Packed
from mixtral.quant.panels import Panels, expert_set, run_experts

__all__ = ["PackedEmbedding", "PackedExperts", "PackedLinear", "SharedEmbedding", "SharedHead"]

PANEL_VALUES = 1 << 22


class PackedLinear(nn.Module):
    """A packed matrix [O, D] without bias; what is decoded has the dtype of the input."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x_TD: Tensor) -> Tensor:
        """``x @ weight.T``: [T, O]."""
        return _product(x_TD, self.packed)

    def decoded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``weight`` [O, D]."""
        return {"weight": self.packed.decode(dtype)}


class PackedEmbedding(nn.Module):
    """One packed row per token id, [V, D], decoded to ``dtype``, which is that of all activations."""

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.dtype = packed, dtype

    def forward(self, tokens_T: Tensor) -> Tensor:
        """The rows of the ids: [T, D]."""
        return self.packed.pick_rows(tokens_T, self.dtype)

    def decoded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``weight`` [V, D]."""
        return {"weight": self.packed.decode(dtype)}


class SharedEmbedding(nn.Module):
    """A table of fewer rows than there are ids, [R, D], and the row of each id, int64 [V]."""

    table: Tensor
    row_of_id: Tensor

    def __init__(self, table: Tensor, row_of_id: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("row_of_id", row_of_id)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """The rows of the ids: [T, D]."""
        return self.table[self.row_of_id[tokens_T]]

    def decoded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``weight`` [V, D]."""
        return {"weight": self.table.to(dtype)[self.row_of_id]}


class SharedHead(nn.Module):
    """A packed head of fewer rows than there are ids, [R, D]: each is multiplied once, for all ids that share it.

    ``row_of_id``, int64 [V], gives some ids rows of their own, 0, 1, 2, ... in order, and all others the last row.
    """

    row_of_id: Tensor

    def __init__(self, packed: Packed, row_of_id: Tensor) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("row_of_id", row_of_id)
        self._own = torch.nonzero(row_of_id != packed.shape[0] - 1).flatten().numpy()

    def forward(self, x_TD: Tensor) -> Tensor:
        """The scores of all ids: [T, V]."""
        scores_TR = _product(x_TD, self.packed)
        if scores_TR.device.type != "cpu" or scores_TR.dtype != torch.float32:
            return scores_TR[:, self.row_of_id]
        out_TV = torch.empty((len(scores_TR), len(self.row_of_id)))
        # Filling a row and writing over it is several times as fast as looking every id up.
        for out_V, scores_R in zip(out_TV.numpy(), scores_TR.numpy(), strict=True):
            out_V.fill(scores_R[-1])
            out_V[self._own] = scores_R[:-1]
        return out_TV

    def decoded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``weight`` [V, D]."""
        return {"weight": self.packed.decode(dtype)[self.row_of_id]}


class PackedExperts(nn.Module):
    """E SwiGLU networks of three packed matrices each: gate and up [F, D], down [D, F]. Formats may differ."""

    def __init__(self, gate: Sequence[Packed], up: Sequence[Packed], down: Sequence[Packed]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.ModuleList(gate), nn.ModuleList(up), nn.ModuleList(down)
        self._in_panels = all(isinstance(one, Panels) for one in (*gate, *up, *down))
        self._set: Any = None

    def forward(self, x_TD: Tensor, route: ops.Route) -> Tensor:
        """Weighted sum of the chosen experts: [T, D]. Products are summed in float32 in order of choice."""
        if self._in_panels and x_TD.device.type == "cpu":
            return run_experts(self.compiled(), x_TD, route.picks_TA, route.weights_TA)
        out_TAD = x_TD.new_zeros((*route.picks_TA.shape, x_TD.shape[-1]))
        for expert, (gate, up, down) in enumerate(self.matrices()):
            tokens, places = torch.nonzero(route.picks_TA == expert, as_tuple=True)
            if tokens.numel():
                rows = x_TD[tokens]
                hidden = swiglu(torch.cat((_product(rows, gate), _product(rows, up)), -1))
                out_TAD[tokens, places] = _product(hidden, down)
        return (out_TAD.float() * route.weights_TA[..., None]).sum(1).to(x_TD.dtype)

    def decoded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F]."""
        parts = [
            (torch.cat((gate.decode(dtype), up.decode(dtype))), down.decode(dtype))
            for gate, up, down in self.matrices()
        ]
        gate_up, down = zip(*parts, strict=True)
        return {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack(down)}

    def compiled(self) -> Any:
        """All experts for one call of the compiled kernels; None if any of them has none."""
        if self._set is None and self._in_panels:
            columns = zip(*self.matrices(), strict=True)
            self._set = expert_set(*([cast(Panels, one).matrix for one in matrices] for matrices in columns))
        return self._set

    def _apply(self, *args: Any, **kwargs: Any) -> PackedExperts:
        """What ``to`` and its like call: the compiled view is of the old memory afterwards."""
        self._set = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def matrices(self) -> Iterator[tuple[Packed, Packed, Packed]]:
        """Gate, up and down of every expert."""
        for three in zip(self.gate, self.up, self.down, strict=True):
            yield cast("tuple[Packed, Packed, Packed]", three)


def _product(x_TD: Tensor, packed: Packed) -> Tensor:
    """``x @ weight.T`` [T, O] with a panel of rows of the weight decoded at a time."""
    if isinstance(packed, Panels) and x_TD.device.type == "cpu":
        return packed.multiply(x_TD)
    rows, width = packed.shape
    step = max(1, PANEL_VALUES // width)
    if step >= rows:
        return ops.linear(x_TD, packed.decode(x_TD.dtype))
    out_TO = x_TD.new_empty((len(x_TD), rows))
    panel = x_TD.new_empty((step, width))
    for start in range(0, rows, step):
        part = panel[: rows - start]
        packed.decode_rows(start, part)
        out_TO[:, start : start + step] = ops.linear(x_TD, part)
    return out_TO
