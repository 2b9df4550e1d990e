"""The matrices of a model, one at a time and as any layout wants them: from a checkpoint, or from a loaded model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.files.read import DTYPES
from mixtral.model.mixtral import Mixtral
from mixtral.quant.packed import Packed
from mixtral.quant.recode import as_blocks
from mixtral.weights.checkpoint import Checkpoint
from mixtral.weights.integer import CodedEntry, read_groups
from mixtral.weights.names import EMBEDDING, HEAD, Piece
from mixtral.weights.reader import MatrixReader
from mixtral.weights.upgrade import downgrade_rows, upgrade_rows, upgraded

__all__ = ["CheckpointMatrices", "Matrices", "ModelMatrices", "warn_again"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Matrices(Protocol):
    """What a conversion reads. ``config`` is that of the result."""

    config: MixtralConfig

    def formats(self, wanted: Sequence[Piece]) -> set[str]:
        """The dtypes or block formats that these pieces have."""
        ...

    def values(self, wanted: Piece, dtype: torch.dtype) -> Tensor:
        """The values of a piece as a file of its layout has them, in a dtype."""
        ...

    def blocks(self, wanted: Piece) -> Tensor | None:
        """The rows of a piece as bytes, uint8 [rows, bytes], for a file of its layout; None if it has to be encoded."""
        ...

    def packed(self, wanted: Piece) -> Packed | None:
        """A matrix in our order as it is stored; None if it is made of floats, or lies transposed."""
        ...


class CheckpointMatrices:
    """Read from the files of a checkpoint when they are asked for. A context manager."""

    def __init__(self, found: Checkpoint, vocab_size: int | None = None) -> None:
        self.found = found
        self.config = found.config
        if vocab_size is not None and vocab_size != found.config.vocab_size:
            self.config = found.config.replace(vocab_size=upgraded(found.config.vocab_size, vocab_size))
        self._pieces = {piece.key: piece for piece in found.plan}
        self._reader = MatrixReader()

    def __enter__(self) -> CheckpointMatrices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def formats(self, wanted: Sequence[Piece]) -> set[str]:
        """As in ``Matrices``."""
        entries = (self.found.entries[self._pieces[piece.key].name] for piece in wanted)
        return {(isinstance(entry, CodedEntry) and entry.blocks) or entry.dtype for entry in entries}

    def values(self, wanted: Piece, dtype: torch.dtype) -> Tensor:
        """As in ``Matrices``."""
        piece = self._pieces[wanted.key]
        values = torch.empty(piece.shape, dtype=dtype)
        self._reader.read(self.found.entries[piece.name], values, first=piece.first)
        ours = piece.to_ours(values)
        if self._grows(wanted):
            more = self.config.vocab_size > len(ours)
            ours = upgrade_rows(ours, seed=int(wanted.parameter == HEAD)) if more else downgrade_rows(ours)
        return wanted.to_file(ours)

    def blocks(self, wanted: Piece) -> Tensor | None:
        """As in ``Matrices``."""
        piece = self._pieces[wanted.key]
        if self._grows(wanted) or "transposed" in (piece.order, wanted.order):
            return None
        entry = self.found.entries[piece.name]
        if isinstance(entry, CodedEntry):
            rows = as_blocks(read_groups(self._reader, entry), entry.blocks) if entry.blocks else None
            return None if rows is None else wanted.to_file(rows)
        found = self._reader.raw(self.found.entries[piece.name], first=piece.first, count=math.prod(piece.shape))
        rows = found.view(piece.shape[0] if len(piece.shape) > 1 else 1, -1)
        return wanted.to_file(piece.to_ours(rows))

    def packed(self, wanted: Piece) -> Packed | None:
        """As in ``Matrices``."""
        piece = self._pieces[wanted.key]
        entry = self.found.entries[piece.name]
        if self._grows(wanted) or piece.order == "transposed" or entry.dtype in DTYPES:
            return None
        return self._reader.packed(entry, piece)

    def _grows(self, wanted: Piece) -> bool:
        return self.config.vocab_size != self.found.config.vocab_size and wanted.parameter in (EMBEDDING, HEAD)


class ModelMatrices:
    """The parameters of a model in memory."""

    def __init__(self, model: Mixtral) -> None:
        self.config = model.config
        self._parameters = dict(model.named_parameters())

    def formats(self, wanted: Sequence[Piece]) -> set[str]:
        """As in ``Matrices``."""
        return {_NAMES[self._parameters[piece.parameter].dtype] for piece in wanted}

    def values(self, wanted: Piece, dtype: torch.dtype) -> Tensor:
        """As in ``Matrices``."""
        return wanted.to_file(wanted.of(self._parameters[wanted.parameter].detach()).to("cpu", dtype))

    def blocks(self, wanted: Piece) -> Tensor | None:
        """As in ``Matrices``."""
        return None

    def packed(self, wanted: Piece) -> Packed | None:
        """As in ``Matrices``."""
        return None


def warn_again(formats: set[str]) -> None:
    """Say that matrices of these formats, which are quantised already, lose more when they are quantised anew."""
    if formats:
        warnings.warn(
            f"matrices that are quantised already ({', '.join(sorted(formats))}) are quantised anew: the errors of "
            "both add up; the original weights give a better result",
            stacklevel=3,
        )
