"""Attention inside the documents of a training batch, without a mask tensor.

Compiled code does it where there is any. Elsewhere documents are gathered into groups of similar length as right-padded
rows; under causal attention padding on the right cannot reach a real token. Either way the cost is the sum of the
squared document lengths, not of the packed sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mixtral.ops import causal_attention, document_attention, gather_rows, is_compiled

__all__ = ["Documents"]

_SHORTEST = 32


@dataclass(frozen=True, slots=True)
class _Group:
    rows: int
    length: int


class Documents:
    """The context of a batch of whole documents: token t of a document sees the document's tokens 0..t and no other."""

    def __init__(self, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"document lengths are {list(lengths)[:5]}; expected at least one, each at least 1")
        self.lengths, self.total = tuple(lengths), sum(lengths)
        self._device = device
        sizes = torch.tensor(self.lengths)
        starts = sizes.cumsum(0) - sizes
        self.positions_T = (torch.arange(self.total) - starts.repeat_interleave(sizes)).to(device)

    def attend(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Causal attention of every token inside its document: [T, H, K]. The layer does not matter."""
        if is_compiled(q_THK):
            return document_attention(q_THK, k_TGK, v_TGK, self.lengths)
        return self._rows.attend(q_THK, k_TGK, v_TGK)

    @cached_property
    def _rows(self) -> _Rows:
        return _Rows(self.lengths, self._device)


class _Rows:
    """Documents as right-padded rows, those of similar length together."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        total = sum(lengths)
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        by_length: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            by_length.setdefault(_padded(length), []).append(number)
        self._groups = [_Group(len(numbers), length) for length, numbers in sorted(by_length.items())]
        index = torch.full((sum(group.rows * group.length for group in self._groups),), -1, dtype=torch.int64)
        row = 0
        for length, numbers in sorted(by_length.items()):
            for number in numbers:
                index[row : row + lengths[number]] = torch.arange(starts[number], starts[number] + lengths[number])
                row += length
        used = torch.nonzero(index >= 0)[:, 0]
        inverse = torch.empty(total, dtype=torch.int64)
        inverse[index[used]] = used
        self._index, self._inverse = index.to(device), inverse.to(device)

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """As ``Documents.attend``."""
        gathered = [gather_rows(part, self._index, self._inverse) for part in (q_THK, k_TGK, v_TGK)]
        outs, start = [], 0
        for group in self._groups:
            end = start + group.rows * group.length
            q, k, v = (
                part[start:end].view(group.rows, group.length, *part.shape[1:]).transpose(1, 2) for part in gathered
            )
            outs.append(causal_attention(q, k, v).transpose(1, 2).flatten(0, 1))
            start = end
        return gather_rows(torch.cat(outs), self._inverse, self._index)


def _padded(length: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: few shapes, from 32 tokens on at most a third of padding."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size
