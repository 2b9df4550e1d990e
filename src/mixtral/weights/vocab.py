"""Shared vocabulary rows of the embedded model, and the respelling of the ids that share one.

The embedded model was trained on R of its V token ids; all others share one more row on each side. ``row_of_id`` [V]
int32 gives each id its row: the trained ids in ascending order 0..R-1, every other id R. D is the width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from mixtral.errors import CheckpointError

__all__ = ["build_respell", "check_rows", "expand_rows", "row_map", "share_rows", "trained_ids"]


def row_map(trained: Iterable[int], vocab_size: int) -> Tensor:
    """``row_of_id`` [V] int32 for a set of trained ids.

    Raises:
        CheckpointError: an id is outside the vocabulary.
    """
    ids = sorted(set(trained))
    if ids and not 0 <= ids[0] <= ids[-1] < vocab_size:
        raise CheckpointError(f"trained ids {ids[0]}..{ids[-1]} do not fit a vocabulary of {vocab_size}")
    rows = torch.full((vocab_size,), len(ids), dtype=torch.int32)
    rows[torch.tensor(ids, dtype=torch.int64)] = torch.arange(len(ids), dtype=torch.int32)
    return rows


def check_rows(row_of_id: Tensor, vocab_size: int) -> int:
    """The number of rows that a valid ``row_of_id`` uses: R + 1, or R if every id is trained.

    Raises:
        CheckpointError: it is not [V] int32, or not in the order that the module docstring gives.
    """
    if row_of_id.dtype != torch.int32 or tuple(row_of_id.shape) != (vocab_size,):
        raise CheckpointError(f"row_of_id is {row_of_id.dtype} {list(row_of_id.shape)}; expected int32 [{vocab_size}]")
    top = int(row_of_id.max())
    # With one id in the last row, sharing it or having it alone is the same thing.
    if not torch.equal(row_of_id, row_map(trained_ids(row_of_id), vocab_size)):
        raise CheckpointError(
            "row_of_id: trained ids must have the rows 0, 1, 2, ... in order, all others the row after"
        )
    return top + 1


def trained_ids(row_of_id: Tensor) -> list[int]:
    """The ids that have a row of their own; a last row that only one id has is taken for the shared one."""
    return torch.nonzero(row_of_id != row_of_id.max()).flatten().tolist()


def expand_rows(rows: Tensor, row_of_id: Tensor) -> Tensor:
    """Shared rows [R+1, D] -> an ordinary [V, D] table, in which the unseen ids have equal rows."""
    return rows[row_of_id.to(device=rows.device, dtype=torch.int64)]


def share_rows(table: Tensor, row_of_id: Tensor) -> Tensor:
    """An ordinary [V, D] table -> shared rows [R+1, D].

    Raises:
        CheckpointError: ids that should share a row have different values.
    """
    index = row_of_id.to(device=table.device, dtype=torch.int64)
    first = torch.full((int(index.max()) + 1,), len(index), device=table.device, dtype=torch.int64)
    first.scatter_reduce_(0, index, torch.arange(len(index), device=table.device), "amin")
    rows = table[first]
    different = torch.nonzero((rows[index] != table).any(-1)).flatten()
    if len(different):
        told = different[:5].tolist()
        raise CheckpointError(f"{len(different)} ids do not have the values of the row that they share: {told}")
    return rows


def build_respell(surfaces: Sequence[bytes], kept: AbstractSet[int]) -> dict[int, tuple[int, ...]]:
    """For each text id outside ``kept``: the shortest sequence of kept ids whose surfaces join to the same bytes.

    ``surfaces`` gives each id its bytes, control ids none (they have no text and get no entry). Among sequences of
    equal length the one with the longer first piece wins, and so on for the rest; byte pieces serve characters not
    kept. Of kept ids with equal surface the highest is taken: byte pieces come before text pieces in every Mixtral
    vocabulary.

    Raises:
        CheckpointError: an id cannot be spelled with the kept ids.
    """
    by_surface = {surfaces[i]: i for i in sorted(kept) if surfaces[i]}
    longest = max(map(len, by_surface), default=0)
    respell: dict[int, tuple[int, ...]] = {}
    for i, surface in enumerate(surfaces):
        if i in kept or not surface:
            continue
        spelled = _shortest(surface, by_surface, longest)
        if spelled is None:
            raise CheckpointError(f"token {i} {surface!r} cannot be spelled with the {len(kept)} kept tokens")
        respell[i] = spelled
    return respell


def _shortest(surface: bytes, by_surface: dict[bytes, int], longest: int) -> tuple[int, ...] | None:
    # best[i]: the spelling of surface[i:], built from the end.
    best: list[tuple[int, ...] | None] = [None] * len(surface) + [()]
    for start in range(len(surface) - 1, -1, -1):
        for stop in range(min(len(surface), start + longest), start, -1):
            piece, rest = by_surface.get(surface[start:stop]), best[stop]
            if piece is None or rest is None:
                continue
            current = best[start]
            if current is None or len(rest) + 1 < len(current):
                best[start] = (piece, *rest)
    return best[0]
