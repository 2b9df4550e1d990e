"""Packed weights as the compiled kernels read them: panels of 16 rows (``native/include/mixtral/panels.h``).

A matrix in panels holds the same bits as the blocks or groups that it was made of, in another order, and gives them
back. Q3_K, Q4_K and Q5_K grow by 4, 3 and 2 %, as their 6-bit scales get a byte each, and 3-bit integers take 4 bits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixtral.errors import ConfigError
from mixtral.ops.memory import empty
from mixtral.ops.native import level, module, threads
from mixtral.quant.bits import pack_bits, unpack_bits
from mixtral.quant.formats import FORMATS
from mixtral.quant.packed import Blocks, Groups, Packed
from mixtral.quant.recode import as_groups

__all__ = ["ROWS", "Panels", "expert_set", "run_experts", "to_panels"]

ROWS = 16
_KINDS = {"Q2_K": 0, "Q3_K": 1, "Q4_K": 2, "Q5_K": 3, "Q6_K": 4}
_G4, _G8 = 5, 6
_GROUPS = (256, 128, 64, 32)


class Panels(Packed):
    """A matrix [O, I] in panels: uint8 ``data``. ``source`` is what the values are, for taking them out again."""

    data: Tensor

    def __init__(self, label: str, kind: int, shape: tuple[int, int], group: int, data: Tensor, bits: int) -> None:
        super().__init__()
        self.label, self.kind, self.shape, self.group, self.bits = label, kind, shape, group, bits
        self.register_buffer("data", data)
        self._matrix: Any = None

    @property
    def matrix(self) -> Any:
        """The compiled module's view of the data."""
        if self._matrix is None:
            self._matrix = module().PackedMatrix(self.kind, *self.shape, self.group, self.data.numpy())
        return self._matrix

    def _apply(self, *args: Any, **kwargs: Any) -> Panels:
        """What ``to`` and its like call: the view is of the old memory afterwards."""
        self._matrix = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def decode_rows(self, start: int, out: Tensor) -> None:
        """As in ``Packed``."""
        first, last = start // ROWS, -(-(start + len(out)) // ROWS)
        whole = self.unpacked(first, last).decode(out.dtype)
        out.copy_(whole[start - first * ROWS : start - first * ROWS + len(out)])

    def pick_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """As in ``Packed``."""
        return self.unpacked(0, -(-self.shape[0] // ROWS)).pick_rows(rows, dtype)

    def unpacked(self, first: int = 0, last: int | None = None) -> Packed:
        """The rows of panels ``first`` to ``last`` as blocks or groups."""
        count = -(-self.shape[0] // ROWS)
        last = count if last is None else last
        size = len(self.data) // count
        rows = min(self.shape[0], last * ROWS) - first * ROWS
        columns = self.shape[1]
        part = self.data[first * size : last * size].cpu().numpy()
        matrix = module().PackedMatrix(self.kind, rows, columns, self.group, part)
        if self.kind < _G4:
            blocks = torch.empty((rows, columns // 256 * FORMATS[self.label].bytes), dtype=torch.uint8)
            matrix.unpack_blocks(blocks.numpy(), threads())
            return Blocks(self.label, blocks)
        codes = torch.empty((rows, columns), dtype=torch.uint8)
        scales = torch.empty((rows, columns // self.group), dtype=torch.float16)
        zeros = torch.empty(scales.shape, dtype=torch.uint8)
        matrix.unpack_groups(codes.numpy(), scales.view(torch.uint16).numpy(), zeros.numpy(), threads())
        return Groups(self.bits, pack_bits(codes, self.bits), scales, zeros=zeros)

    def multiply(self, x_TD: Tensor) -> Tensor:
        """``x @ weight.T`` [T, O] in the dtype of ``x``: activations are rounded to int8 in blocks of 256 columns."""
        x = x_TD.detach().float().contiguous()
        out = torch.empty((len(x), self.shape[0]))
        module().project(x.numpy(), [self.matrix], out.numpy(), threads(), level=level())
        return out.to(x_TD.dtype)


def to_panels(packed: Packed) -> Panels | None:
    """The same matrix in panels; None where there are no kernels for its format, mixed columns, or float32 scales.

    Raises:
        ConfigError: the compiled module is missing.
    """
    native = module()
    if isinstance(packed, Blocks) and packed.label in _KINDS:
        kind = _KINDS[packed.label]
        panels = _empty(native, packed.label, kind, packed.shape, 0, 0)
        panels.matrix.pack_blocks(packed.data.numpy(), threads())
        return panels
    groups = packed if isinstance(packed, Groups) else as_groups(packed, 8 if packed.label == "Q8_0" else 4, 32)
    if groups is None or groups.order is not None:
        return None
    scales = groups.scales.half()
    group = next((size for size in _GROUPS if groups.group % size == 0), None)
    if group is None or not torch.equal(scales.to(groups.scale_dtype), groups.scales):
        return None
    times = groups.group // group
    zeros = groups.zeros
    if zeros is None:
        zeros = torch.full(scales.shape, 1 << (groups.bits - 1), dtype=torch.uint8)
    panels = _empty(native, packed.label, _G4 if groups.bits <= 4 else _G8, groups.shape, group, groups.bits)
    panels.matrix.pack_groups(
        unpack_bits(groups.codes, groups.bits).contiguous().numpy(),
        scales.repeat_interleave(times, 1).view(torch.uint16).numpy(),
        zeros.repeat_interleave(times, 1).contiguous().numpy(),
        threads(),
    )
    return panels


def _empty(native: ModuleType, label: str, kind: int, shape: tuple[int, int], group: int, bits: int) -> Panels:
    data = empty((native.panel_bytes(kind, *shape, group),), torch.uint8)
    return Panels(label, kind, shape, group, data, bits)


def expert_set(gate: list[Any], up: list[Any], down: list[Any]) -> Any:
    """The experts of a layer out of compiled views of their matrices, for ``run_experts``.

    Raises:
        ConfigError: the matrices do not fit together.
    """
    try:
        return module().ExpertSet(gate, up, down)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def run_experts(experts: Any, x_TD: Tensor, picks_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Weighted sum of the chosen experts [T, D] in the dtype of ``x``, summed in float32 in order of choice."""
    x = x_TD.detach().float().contiguous()
    out = torch.empty_like(x)
    picks, shares = picks_TA.contiguous(), weights_TA.float().contiguous()
    module().experts(x.numpy(), picks.numpy(), shares.numpy(), experts, out.numpy(), threads(), level())
    return out.to(x_TD.dtype)
