"""The matrices of a model, one at a time and as any layout wants them: from a checkpoint, or from a loaded model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.files.read import DTYPES
from mixtral.model.mixtral import Mixtral
from mixtral.weights.checkpoint import Checkpoint
from mixtral.weights.names import EMBEDDING, HEAD, Piece
from mixtral.weights.reader import MatrixReader
from mixtral.weights.upgrade import downgrade_rows, upgrade_rows, upgraded

__all__ = ["CheckpointMatrices", "Matrices", "ModelMatrices"]

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
        return {self.found.entries[self._pieces[piece.key].name].dtype for piece in wanted}

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
        found = self._reader.raw(self.found.entries[piece.name], first=piece.first, count=math.prod(piece.shape))
        rows = found.view(piece.shape[0] if len(piece.shape) > 1 else 1, -1)
        return wanted.to_file(piece.to_ours(rows))

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
