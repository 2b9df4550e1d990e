"""What a low-rank pair adds to an expert's product, forward and backward, inside the autograd function of the experts.

N sorted rows, E experts, I values in, O values out, r the rank of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.ops.reference import Pair

__all__ = ["LowRank", "keep_mask"]


def keep_mask(rows: int, width: int, dropout: float, device: torch.device) -> Tensor | None:
    """Which inputs stay, bool [N, I], drawn from torch's default generator; None where all do."""
    return torch.empty((rows, width), dtype=torch.bool, device=device).bernoulli_(1 - dropout) if dropout else None


@dataclass(frozen=True, slots=True)
class LowRank:
    """A pair, and which of its inputs are kept. Rows of an expert are the slice ``rows`` of all."""

    pair: Pair
    keep_NI: Tensor | None
    dropout: float

    def add(self, expert: int, rows: slice, x_NI: Tensor, out_NO: Tensor) -> None:
        """Add ``scale * b (a x)`` to the products of an expert."""
        out_NO.addmm_(self._narrow(expert, self._kept(rows, x_NI)), self.pair.b_EOR[expert].t())

    def back(
        self, expert: int, rows: slice, x_NI: Tensor, grad_NO: Tensor, grad_x_NI: Tensor, grads: Sequence[Tensor]
    ) -> None:
        """Add to the gradient of the input; fill those of a and b, [r, I] and [O, r]."""
        x_NI = self._kept(rows, x_NI)
        grad_a, grad_b = grads
        torch.mm(grad_NO.t(), self._narrow(expert, x_NI), out=grad_b)
        grad_narrow_NR = (grad_NO @ self.pair.b_EOR[expert]).mul_(self.pair.scale)
        torch.mm(grad_narrow_NR.t(), x_NI, out=grad_a)
        if self.keep_NI is None:
            grad_x_NI.addmm_(grad_narrow_NR, self.pair.a_ERI[expert])
        else:
            grad_x_NI.add_(self._kept(rows, grad_narrow_NR @ self.pair.a_ERI[expert]))

    def _narrow(self, expert: int, x_NI: Tensor) -> Tensor:
        return (x_NI @ self.pair.a_ERI[expert].t()).mul_(self.pair.scale)

    def _kept(self, rows: slice, x_NI: Tensor) -> Tensor:
        if self.keep_NI is None:
            return x_NI
        return (x_NI * self.keep_NI[rows]).mul_(1 / (1 - self.dropout))
