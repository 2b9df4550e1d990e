"""The matrices of a checkpoint, whatever they are stored in: as numbers of any dtype, or packed as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixtral.files.read import Entry, ShardReader, damaged
from mixtral.quant.decode import all_finite
from mixtral.quant.packed import Blocks, Packed
from mixtral.weights.integer import CodedEntry, read_groups
from mixtral.weights.names import Piece

__all__ = ["MatrixReader"]


class MatrixReader(ShardReader):
    """A ``ShardReader`` that also reads matrices made of several tensors. A context manager."""

    def read(self, entry: Entry, target: Tensor, *, first: int = 0) -> None:
        """As in ``ShardReader``; of an integer matrix the whole is read."""
        if not isinstance(entry, CodedEntry):
            super().read(entry, target, first=first)
            return
        read_groups(self, entry).decode_rows(0, target)
        self.check_finite(entry, target)

    def piece(self, entry: Entry, piece: Piece, target: Tensor) -> None:
        """Copy a piece of a tensor, in our order, into ``target``: contiguous, of any dtype, on any device."""
        if piece.order == "same":
            self.read(entry, target, first=piece.first)
            return
        values = torch.empty(piece.shape, dtype=target.dtype, device=target.device)
        self.read(entry, values, first=piece.first)
        target.copy_(piece.to_ours(values))

    def packed(self, entry: Entry, piece: Piece) -> Packed:
        """A piece, in our order, as it is stored; a matrix of floats becomes blocks of one value.

        Raises:
            CheckpointError: the parts of an integer matrix do not fit together, or a scale is refused.
        """
        if isinstance(entry, CodedEntry):
            return read_groups(self, entry)
        found = _blocks(entry, piece, self.raw(entry, first=piece.first, count=math.prod(piece.shape)))
        if self.finite and not all_finite(found.data, found.label):
            raise damaged(entry.name)
        return found

    @contextmanager
    def borrowed(self, entry: Entry, piece: Piece) -> Iterator[Packed]:
        """As ``packed``, but blocks may be memory of the file, which is theirs only inside this context, and their
        scales may be anything: who packs them in another way looks at them."""
        if isinstance(entry, CodedEntry):
            yield read_groups(self, entry)
            return
        with self.raw_view(entry, first=piece.first, count=math.prod(piece.shape)) as values:
            yield _blocks(entry, piece, values)


def _blocks(entry: Entry, piece: Piece, data: Tensor) -> Blocks:
    return Blocks(entry.dtype, piece.to_ours(data.view(piece.shape[0], -1)).contiguous())
