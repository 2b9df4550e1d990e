"""What goes into the model and what comes out. T tokens of all sequences flattened, D width, H/G heads, K head size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mixtral.ops import Route

__all__ = ["Batch", "Cache", "Context", "Output"]


class Context(Protocol):
    """What attention may look at: a cache with earlier tokens, or the documents of a training batch."""

    def attend(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Causal attention of every token over its own sequence in this layer: [T, H, K]."""
        ...


class Cache(Protocol):
    """Pages of keys and values of every layer."""

    @property
    def nbytes(self) -> int:
        """Size of all pages."""
        ...

    def clear(self, pages: Sequence[int]) -> None:
        """Overwrite pages with zeros, so that nothing that was in them can be seen."""
        ...

    def view(self, spans: Sequence[tuple[Sequence[int], int, int]]) -> Any:
        """What one batch attends to, for ``Batch.context``. ``spans`` lists, in the order of its tokens, for every
        sequence its page ids, the number of tokens already stored, and the number of tokens in this batch."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences, one after the other: ids and positions, int64 [T] each, and what they attend to."""

    tokens_T: Tensor
    positions_T: Tensor
    context: Context


@dataclass(frozen=True, slots=True)
class Output:
    """Hidden states after the final norm, [T, D], and the routing of every layer."""

    hidden_TD: Tensor
    routes: tuple[Route, ...]
