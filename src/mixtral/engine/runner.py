"""Running the model over the pieces of a step.

T tokens of the step; N rows that get logits; D width; V vocabulary; L layers; A experts per token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixtral import faults
from mixtral.engine.pages import PageAllocator, pages_for
from mixtral.engine.scheduler import Piece
from mixtral.model.batch import Batch, Cache
from mixtral.model.mixtral import Mixtral
from mixtral.ops import Route

__all__ = ["Adapters", "Runner", "StepResult"]

_ROWS = 64  # whose logits are made at once when a prompt is scored

Floats = npt.NDArray[np.float32]


class Adapters(Protocol):
    """Adapters beside the base of a model, by name."""

    @property
    def known(self) -> Collection[str]:
        """Their names."""
        ...

    def chosen(self, pieces: Iterable[tuple[str | None, int]]) -> AbstractContextManager[None]:
        """Inside, a batch is computed that consists of these pieces: the adapter of each, and how many rows it has."""
        ...


class StepResult:
    """What a step computed. ``logits_NV`` are float32 rows for the pieces that sample, 1 + their drafts each."""

    def __init__(self, model: Mixtral, hidden_TD: Tensor, routes: tuple[Route, ...], pieces: Sequence[Piece]) -> None:
        self._model, self._hidden_TD, self._routes = model, hidden_TD, routes
        self._picks_LTA: npt.NDArray[np.int64] | None = None
        self._weights_LTA: Floats | None = None
        self.starts: list[int] = []  # of each piece among the T tokens
        rows: list[int] = []
        poisoned: list[int] = []  # on purpose, in tests
        total = 0
        for piece in pieces:
            self.starts.append(total)
            total += piece.count + len(piece.drafts)
            if piece.samples and piece.sequence.request.submit.params.max_tokens:
                if faults.poisons(piece.sequence.request.submit.prompts[piece.sequence.prompt]):
                    poisoned.extend(range(len(rows), len(rows) + 1 + len(piece.drafts)))
                rows.extend(range(total - 1 - len(piece.drafts), total))
        self.rows = len(rows)
        wanted_ND = hidden_TD if len(rows) == total else hidden_TD[rows]
        self.logits_NV: Floats = _host(model.logits(wanted_ND)) if rows else np.empty((0, 0), np.float32)
        if poisoned:
            self.logits_NV[poisoned] = np.nan

    @property
    def picks_LTA(self) -> npt.NDArray[np.int64]:
        """The experts of every token, the larger weight first."""
        if self._picks_LTA is None:
            self._picks_LTA = torch.stack([route.picks_TA for route in self._routes]).cpu().numpy()
        return self._picks_LTA

    @property
    def weights_LTA(self) -> Floats:
        """Their weights."""
        if self._weights_LTA is None:
            self._weights_LTA = _host(torch.stack([route.weights_TA for route in self._routes]))
        return self._weights_LTA

    def routing(self, first: int, last: int) -> tuple[bytes, bytes]:
        """Experts (uint8) and weights (little-endian float16) of tokens ``first .. last`` of the step: [T, L, A]."""
        experts = self.picks_LTA[:, first:last].transpose(1, 0, 2).astype(np.uint8)
        weights = self.weights_LTA[:, first:last].transpose(1, 0, 2).astype("<f2")
        return experts.tobytes(), weights.tobytes()

    def scored_rows(self, first: int, last: int) -> Iterator[tuple[int, Floats]]:
        """The raw logits after each of the tokens ``first .. last`` of the step, few rows at a time."""
        for start in range(first, last, _ROWS):
            with torch.inference_mode():
                rows = _host(self._model.logits(self._hidden_TD[start : min(start + _ROWS, last)]))
            yield from enumerate(rows, start)


class Runner:
    """A model and its cache, which is made at the first step."""

    def __init__(self, model: Mixtral, pages: PageAllocator, adapters: Adapters | None = None) -> None:
        self.model = model
        self._adapters = adapters
        self._pages = pages
        self._cache: Cache | None = None

    def run(self, pieces: Sequence[Piece]) -> StepResult:
        """Run the model over the tokens of all pieces and their drafts, whose pages are there."""
        if self._cache is None:
            if faults.fails("alloc"):
                raise MemoryError("alloc: a failpoint")
            self._cache = self.model.new_cache(self._pages.total)
        if dirty := self._pages.take_dirty():
            self._cache.clear(dirty)
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[tuple[Sequence[int], int, int]] = []
        chosen: list[tuple[str | None, int]] = []
        for piece in pieces:
            sequence, count = piece.sequence, piece.count + len(piece.drafts)
            tokens += sequence.tokens[piece.start : piece.start + piece.count]
            tokens += piece.drafts
            positions += range(piece.start, piece.start + count)
            spans.append((self._pages.pages(sequence.number), piece.start, count))
            chosen.append((sequence.request.submit.adapter, count))
        device = self.model.device
        with torch.inference_mode():
            batch = Batch(
                tokens_T=torch.tensor(tokens, device=device),
                positions_T=torch.tensor(positions, device=device),
                context=self._cache.view(spans),
            )
            with self._with(chosen):
                output = self.model(batch)
            return StepResult(self.model, output.hidden_TD, output.routes, pieces)

    def logits(self, ids: Sequence[int], chunk: int, adapter: str | None = None) -> Tensor:
        """Raw logits after each of the T ids, float32 [T, V], with a cache of its own."""
        pages = PageAllocator(pages_for(len(ids)))
        pages.open(0, (), len(ids))
        cache, found = self.model.new_cache(pages.total), []
        device = self.model.device
        with torch.inference_mode():
            for start in range(0, len(ids), chunk):
                part = list(ids[start : start + chunk])
                batch = Batch(
                    tokens_T=torch.tensor(part, device=device),
                    positions_T=torch.arange(start, start + len(part), device=device),
                    context=cache.view([(pages.pages(0), start, len(part))]),
                )
                with self._with([(adapter, len(part))]):
                    output = self.model(batch)
                found.append(self.model.logits(output.hidden_TD))
            return torch.cat(found)

    def _with(self, chosen: Sequence[tuple[str | None, int]]) -> AbstractContextManager[None]:
        return nullcontext() if self._adapters is None else self._adapters.chosen(chosen)


def _host(values: Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = values.cpu().numpy()
    return found
