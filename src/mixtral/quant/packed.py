"""Quantised matrices as they lie in memory: GGML blocks, or integers in groups with scales. Values are never changed.

A packed matrix is a module without parameters: ``Module.to(device)`` moves it, and nothing can train it by mistake.
Its numbers are kept as bytes, so ``Module.to(dtype)`` cannot round the scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mixtral.errors import CheckpointError
from mixtral.ops.native import available, level, module, threads
from mixtral.quant.bits import unpack_bits
from mixtral.quant.decode import CHUNK_VALUES, decode_into
from mixtral.quant.formats import FORMATS

__all__ = ["Blocks", "Groups", "Packed", "group_label"]

# How the compiled decoder takes what it fills.
_VIEWS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}


class Packed(nn.Module, ABC):
    """A matrix ``shape`` [O, I] that ``decode_rows`` turns into numbers. ``label`` names its format."""

    shape: tuple[int, int]
    label: str

    @abstractmethod
    def decode_rows(self, start: int, out: Tensor) -> None:
        """Fill ``out``, contiguous [R, I] of any float dtype, with rows ``start`` to ``start + R``."""

    @abstractmethod
    def pick_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows by number, int64 [T], as ``dtype`` [T, I]."""

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix in a dtype: computed in float32, rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.decode_rows(0, out)
        return out

    @property
    def size_bytes(self) -> int:
        """Bytes that the matrix takes in memory."""
        return sum(buffer.numel() * buffer.itemsize for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.buffers()).device


class Blocks(Packed):
    """Rows of a GGML format (also ``F32``, ``F16``, ``BF16``): uint8 ``data`` [O, bytes of a row]."""

    data: Tensor

    def __init__(self, name: str, data: Tensor) -> None:
        super().__init__()
        kind = FORMATS[name]
        self.label = name
        self.shape = (data.shape[0], data.shape[1] // kind.bytes * kind.values)
        self.register_buffer("data", data)

    def decode_rows(self, start: int, out: Tensor) -> None:
        """As in ``Packed``."""
        decode_into(self.data[start : start + len(out)], self.label, out)

    def pick_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """As in ``Packed``."""
        out = torch.empty((len(rows), self.shape[1]), dtype=dtype, device=self.device)
        decode_into(self.data[rows], self.label, out)
        return out


class Groups(Packed):
    """Integers with a scale per group of columns: value [o, i] is ``(code - zero) * scale`` of the group of column i.

    ``codes`` uint8 [O, I * bits / 8], packed as in ``bits.py``; ``scales`` [O, G], float16, bfloat16 or float32;
    ``zeros`` uint8 [O, G], or None where all are half of the range; ``order`` int32 [I], the group of every column, or
    None where a group is a run of I / G columns (GPTQ's act-order mixes them).

    Raises:
        CheckpointError: the shapes do not belong together, a scale is not finite, or a group does not exist.
    """

    codes: Tensor
    scale_bytes: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(
        self, bits: int, codes: Tensor, scales: Tensor, *, zeros: Tensor | None = None, order: Tensor | None = None
    ) -> None:
        super().__init__()
        rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
        groups = scales.shape[1]
        if len(scales) != rows or columns % groups or (zeros is not None and zeros.shape != scales.shape):
            raise CheckpointError(
                f"integer matrix [{rows}, {columns}]: scales {list(scales.shape)} and zeros "
                f"{None if zeros is None else list(zeros.shape)} do not fit"
            )
        if not bool(scales.isfinite().all()):
            raise CheckpointError("a scale is not finite; the weights are damaged")
        if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
            zeros = None
        if order is not None:
            if order.shape != (columns,) or int(order.min()) < 0 or int(order.max()) >= groups:
                raise CheckpointError(f"columns are put into groups beyond 0 to {groups - 1}; the weights are damaged")
            if bool((order == torch.arange(columns, device=order.device) // (columns // groups)).all()):
                order = None
        self.bits, self.group, self.shape, self.scale_dtype = bits, columns // groups, (rows, columns), scales.dtype
        self.label = group_label(bits, self.group, zeros=zeros is not None, order=order is not None)
        self.register_buffer("codes", codes.contiguous())
        # Clone gives rows of one value a stride of 1, which contiguous does not.
        self.register_buffer("scale_bytes", scales.clone(memory_format=torch.contiguous_format).view(torch.uint8))
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    @property
    def scales(self) -> Tensor:
        """The scales as numbers: [O, G]."""
        return self.scale_bytes.view(self.scale_dtype)

    def decode_rows(self, start: int, out: Tensor) -> None:
        """As in ``Packed``; by compiled code where it can: the same bits, but 0 for what is below 1.2e-38."""
        compiled = self.order is None and self.group % 8 == 0 and out.dtype in _VIEWS and out.device.type == "cpu"
        if compiled and self.device.type == "cpu" and available():
            some = slice(start, start + len(out))
            module().decode_groups(
                self.codes[some].numpy(),
                self.bits,
                self.scales[some].float().numpy(),
                None if self.zeros is None else self.zeros[some].numpy(),
                out.detach().view(_VIEWS[out.dtype]).numpy(),
                threads(),
                level(),
            )
            return
        step = max(1, CHUNK_VALUES // self.shape[1])
        for low in range(0, len(out), step):
            part = out[low : low + step]
            some = slice(start + low, start + low + len(part))
            zeros = None if self.zeros is None else self.zeros[some]
            part.copy_(self._values(self.codes[some], self.scales[some], zeros))

    def pick_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """As in ``Packed``."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return self._values(self.codes[rows], self.scales[rows], zeros).to(dtype)

    def _values(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """float32 [R, I]. A code is a small integer and a scale has at most 24 bits, so only the product rounds."""
        numbers = unpack_bits(codes, self.bits).float()
        if self.order is not None:
            numbers -= 1 << (self.bits - 1) if zeros is None else zeros.float()[:, self.order]
            return numbers.mul_(scales.float()[:, self.order])
        grouped = numbers.view(len(codes), -1, self.group)
        grouped -= 1 << (self.bits - 1) if zeros is None else zeros.float()[..., None]
        return grouped.mul_(scales.float()[..., None]).view(len(codes), -1)


def group_label(bits: int, group: int, *, zeros: bool, order: bool) -> str:
    """The name of a format, as ``INT4_G128``, with ``_ZEROS`` where groups have zero points and ``_ORDER`` where their
    columns are mixed."""
    return f"INT{bits}_G{group}{'_ZEROS' if zeros else ''}{'_ORDER' if order else ''}"
