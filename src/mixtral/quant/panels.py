"""Packed weights as the compiled kernels read them: panels of 16 rows (``native/include/mixtral/panels.h``).

A matrix in panels holds the same bits as the blocks or groups that it was made of, in another order, and gives them
back. Q3_K, Q4_K and Q5_K grow by 4, 3 and 2 %, as their 6-bit scales get a byte each, and 3-bit integers take 4 bits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixtral.errors import CheckpointError, ConfigError
from mixtral.ops.memory import empty
from mixtral.ops.native import level, module, threads
from mixtral.quant.bits import pack_bits
from mixtral.quant.formats import FORMATS
from mixtral.quant.packed import Blocks, Groups, Packed

__all__ = ["PANEL_VERSION", "ROWS", "Panels", "expert_set", "run_experts", "to_panels"]

PANEL_VERSION = 1
"""Of the bytes of panels. Whatever changes them, here or in ``native/``, adds one: files of packed weights are then
made anew."""

ROWS = 16
_G4, _G8 = 5, 6
# Blocks -> kind, columns of a group, bits of an integer; of K-quants these are a matter of the kind.
_KINDS = {
    **{f"Q{number + 2}_K": (number, 0, 0) for number in range(5)},
    "Q4_0": (_G4, 32, 4),
    "Q8_0": (_G8, 32, 8),
}
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
        CheckpointError: a scale is not finite.
    """
    native = module()
    if isinstance(packed, Blocks):
        if packed.label not in _KINDS:
            return None
        kind, group, bits = _KINDS[packed.label]
        panels = _empty(native, packed.label, kind, packed.shape, group, bits)
        if not panels.matrix.pack_blocks(packed.data.numpy(), threads()):
            raise CheckpointError("a scale is not finite; the weights are damaged")
        return panels
    if not isinstance(packed, Groups) or packed.order is not None:
        return None
    scales = packed.scales.half()
    of_panels = next((size for size in _GROUPS if packed.group % size == 0), None)
    if of_panels is None or not torch.equal(scales.to(packed.scale_dtype), packed.scales):
        return None
    kind = _G4 if packed.bits <= 4 else _G8
    panels = _empty(native, packed.label, kind, packed.shape, of_panels, packed.bits)
    panels.matrix.pack_groups(
        packed.codes.numpy(),
        packed.bits,
        scales.view(torch.uint16).numpy(),
        None if packed.zeros is None else packed.zeros.contiguous().numpy(),
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
