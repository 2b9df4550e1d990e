"""An adapter added to the weights: in a model in memory, or while a checkpoint is written, a matrix at a time.

The sum is made in float32 and rounded once to what the weights are stored as. That may lose most of the adapter where
this is coarse: a step of int4 is larger than many additions. So the right base is the unquantised source, quantised
after the sum; ``drifts`` tells how much of the adapter the result holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.adapters.factors import Factors, check_factors, target_of
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.files.read import DTYPES
from mixtral.model.mixtral import Mixtral
from mixtral.quant.packed import Packed
from mixtral.weights.convert import Change
from mixtral.weights.matrices import Matrices
from mixtral.weights.names import Piece, pieces

__all__ = ["Drift", "MergedMatrices", "drifts", "merge_into", "merging"]


@torch.no_grad()
def merge_into(model: Mixtral, factors: Mapping[str, Factors]) -> None:
    """Add an adapter to the weights of a model in memory, one matrix at a time.

    Raises:
        CheckpointError: it does not fit the model, or a weight is packed; nothing was changed.
    """
    check_factors(model.config, factors, source="adapter")
    parameters = dict(model.named_parameters())
    for name in factors:
        if name not in parameters:
            raise CheckpointError(
                f"{name!r} is packed, and a sum would have to be quantised anew; load the model with decode=True, or "
                "use the adapter beside it"
            )
    for name, pair in factors.items():
        weight = parameters[name]
        for expert in range(len(weight)) if weight.dim() == 3 else [None]:
            part = weight if expert is None else weight[expert]
            wide = torch.promote_types(part.dtype, torch.float32)
            part.copy_(part.to(wide) + pair.product(expert).to(part.device, wide))


class MergedMatrices:
    """The matrices of a checkpoint with an adapter added to them; see ``weights.matrices.Matrices``."""

    def __init__(self, base: Matrices, factors: Mapping[str, Factors]) -> None:
        self.config: MixtralConfig = base.config
        self.base, self._factors = base, factors

    def formats(self, wanted: Sequence[Piece]) -> set[str]:
        """As in ``Matrices``: those of the base, in which the sums are stored if nothing else is chosen."""
        return self.base.formats(wanted)

    def values(self, wanted: Piece, dtype: torch.dtype) -> Tensor:
        """As in ``Matrices``."""
        if wanted.parameter not in self._factors:
            return self.base.values(wanted, dtype)
        return self.base.values(wanted, torch.float32).add_(self.added(wanted)).to(dtype)

    def added(self, wanted: Piece) -> Tensor:
        """What is added to a piece that is adapted, as a file of its layout has it: float32."""
        pair = self._factors[wanted.parameter]
        a, b = (pair.a, pair.b) if wanted.expert is None else (pair.a[wanted.expert], pair.b[wanted.expert])
        if wanted.half != "both":
            first, second = b.chunk(2)
            b = first if wanted.half == "gate" else second
        return wanted.to_file(Factors(a.float(), b.float(), pair.scale).product())

    def blocks(self, wanted: Piece) -> Tensor | None:
        """As in ``Matrices``."""
        return None if wanted.parameter in self._factors else self.base.blocks(wanted)

    def packed(self, wanted: Piece) -> Packed | None:
        """As in ``Matrices``."""
        return None if wanted.parameter in self._factors else self.base.packed(wanted)


def merging(factors: Mapping[str, Factors], *, into_packed: bool = False) -> Change:
    """What ``weights.convert`` needs to add an adapter to what it writes.

    Raises, when it is called: CheckpointError: the adapter does not fit; or weights that it changes are quantised, and
    not ``into_packed``.
    """

    def change(base: Matrices) -> MergedMatrices:
        check_factors(base.config, factors, source="adapter")
        merged = MergedMatrices(base, factors)
        packed = merged.formats(_changed(base.config, factors)) - DTYPES.keys()
        if packed and not into_packed:
            raise CheckpointError(
                f"the base is quantised ({', '.join(sorted(packed))}), so a sum with the adapter would be rounded by "
                "its coarse steps, or rest on weights that were. Merge into the unquantised source and quantise the "
                "result; or ask for the merge into quantised weights explicitly"
            )
        return merged

    return change


def _changed(config: MixtralConfig, factors: Mapping[str, Factors]) -> list[Piece]:
    return [piece for piece in pieces(config, "fused") if piece.parameter in factors]


@dataclass(slots=True)
class Drift:
    """Squares of the weights of a target, of what the adapter adds, and of how far the result is from the sum."""

    weights: float = 0.0
    added: float = 0.0
    error: float = 0.0

    @property
    def change(self) -> float:
        """The size of what is added, as a share of that of the weights."""
        return math.sqrt(self.added / self.weights) if self.weights else math.inf

    @property
    def loss(self) -> float:
        """How far the result is from the exact sum, as a share of the size of what is added: from 1 on the rounding is
        as large as the adapter."""
        return math.sqrt(self.error / self.added) if self.added else 0.0


def drifts(base: Matrices, result: Matrices, factors: Mapping[str, Factors]) -> dict[str, Drift]:
    """Compare a checkpoint that an adapter was merged into with the exact sums, by target; a matrix at a time."""
    merged = MergedMatrices(base, factors)
    found: dict[str, Drift] = {}
    for piece in _changed(base.config, factors):
        weights, added = base.values(piece, torch.float32), merged.added(piece)
        stored = result.values(piece, torch.float32)
        drift = found.setdefault(target_of(piece.parameter), Drift())
        drift.weights += float(weights.double().square().sum())
        drift.added += float(added.double().square().sum())
        drift.error += float((stored.double() - (weights.double() + added.double())).square().sum())
    return found
