"""Functions of whole matrices under sharding: the pieces of a matrix meet on one rank, and the results go back.

Muon's Newton-Schulz steps need every matrix whole. Matrices that a rank has whole stay where they are. Of the others,
every rank gets some: one exchange brings the pieces together, one takes the results apart again, both in bfloat16, in
which the steps compute anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral.parallel.mesh import Mesh
from mixtral.parallel.plan import Region, Shapes, region

__all__ = ["Matrices"]


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix that is in pieces: its box in the parameter, who computes it, and the pieces by rank."""

    name: str
    box: Region
    owner: int
    pieces: Mapping[int, Region]


class Matrices:
    """The last two dimensions of the named parameters (gate and up apart), over a mesh.

    ``apply`` must be called by all ranks alike. A batch of parameters keeps all ranks busy if it has at least as many
    matrices as there are ranks; ``batches`` makes such ones.
    """

    def __init__(self, names: Sequence[str], shapes: Shapes, mesh: Mesh) -> None:
        self._mesh, self._names = mesh, tuple(names)
        self._own = {name: region(name, shapes[name], mesh.axes, mesh.place) for name in names}
        turns = itertools.count()
        self._pieces: dict[str, list[_Matrix]] = {}
        for name in names:
            own = self._own[name]
            if own.size[-2:] != own.shape[-2:]:
                holders = [region(name, shapes[name], mesh.axes, place) for place in mesh.axes.places()]
                self._pieces[name] = [_shared(name, box, holders, next(turns)) for box in _matrices(own.shape)]

    def size(self, name: str) -> tuple[int, int]:
        """Rows and columns of the whole matrices of a parameter."""
        rows, columns = self._own[name].shape[-2:]
        return rows, columns

    def batches(self) -> Iterator[tuple[str, ...]]:
        """All names, in batches that are worth an exchange."""
        batch: list[str] = []
        for name in self._names:
            batch.append(name)
            if sum(len(self._pieces.get(other, ())) for other in batch) >= self._mesh.axes.world or not self._pieces:
                yield tuple(batch)
                batch = []
        if batch:
            yield tuple(batch)

    def apply(self, function: Callable[[Tensor], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``function`` of every whole matrix [..., M, N], for a batch: this rank's parts in, its parts of the results
        out, float32. What is in pieces reaches the function, and comes from it, rounded to bfloat16."""
        done = {}
        for name in values.keys() - self._pieces.keys():
            done[name] = function(values[name].reshape(self._own[name].size)).reshape(values[name].shape)
        split = [name for name in values if name in self._pieces]
        if split:
            done |= self._meet(function, {name: values[name] for name in split})
        return done

    def _meet(self, function: Callable[[Tensor], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ranks, rank = range(self._mesh.axes.world), self._mesh.rank
        matrices = [matrix for name in values for matrix in self._pieces[name]]
        # Both ends list what passes between two ranks in the order of the matrices.
        given = [[m for m in matrices if m.owner == other and rank in m.pieces] for other in ranks]
        taken = [[m for m in matrices if m.owner == rank and other in m.pieces] for other in ranks]
        parts = {name: value.reshape(self._own[name].size) for name, value in values.items()}
        there = [[parts[m.name][m.pieces[rank].within(self._own[m.name])] for m in some] for some in given]
        came = _exchange(there, [[m.pieces[other].size for m in taken[other]] for other in ranks], self._mesh.device)
        wholes = {id(m): came[rank][0].new_empty(m.box.size) for m in matrices if m.owner == rank} if any(taken) else {}
        for other in ranks:
            for m, piece in zip(taken[other], came[other], strict=True):
                wholes[id(m)][m.pieces[other].within(m.box)] = piece
        for whole in wholes.values():
            whole.copy_(function(whole.float()))
        back = [[wholes[id(m)][m.pieces[other].within(m.box)] for m in taken[other]] for other in ranks]
        home = _exchange(back, [[m.pieces[rank].size for m in some] for some in given], self._mesh.device)
        results = {name: torch.empty_like(part) for name, part in parts.items()}
        for some, pieces in zip(given, home, strict=True):
            for m, piece in zip(some, pieces, strict=True):
                results[m.name][m.pieces[rank].within(self._own[m.name])] = piece.float()
        return {name: result.reshape(values[name].shape) for name, result in results.items()}


def _matrices(shape: tuple[int, ...]) -> Iterator[Region]:
    lead = shape[:-2]
    for start in itertools.product(*map(range, lead)):
        yield Region(shape, (*start, 0, 0), (*(1,) * len(lead), *shape[-2:]))


def _shared(name: str, box: Region, holders: Sequence[Region], turn: int) -> _Matrix:
    pieces = {rank: piece for rank, held in enumerate(holders) if (piece := held.common(box)) is not None}
    ranks = sorted(pieces)
    return _Matrix(name, box, ranks[turn % len(ranks)], pieces)


def _exchange(
    given: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], device: torch.device
) -> list[list[Tensor]]:
    """Tensors for every rank, in bfloat16; those that came from every rank, of these shapes."""
    flat = [piece.to(torch.bfloat16).reshape(-1) for some in given for piece in some]
    sending = torch.cat(flat) if flat else torch.empty(0, dtype=torch.bfloat16, device=device)
    counts = [[math.prod(shape) for shape in some] for some in shapes]
    coming = sending.new_empty(sum(map(sum, counts)))
    send = [sum(piece.numel() for piece in some) for some in given]
    dist.all_to_all_single(coming, sending, [sum(some) for some in counts], send)
    found = iter(torch.split(coming, [count for some in counts for count in some]))
    return [[next(found).view(shape) for shape in some] for some in shapes]
