"""Prompts in, one event per sampled token out: several prompts of any length as one flat batch, on one model.

First all prompts are read, in chunks of at most 512 tokens; then each step decodes a token of each live sequence.
The context end: prompt and ``max_tokens`` together fit the context, or the request is refused, so a prompt that fills
the context has no answer. Nothing is ever shifted out; an answer that reaches the context end has reached its
``max_tokens`` and ends with "length".

T tokens of a forward pass; N sequences that get a token; D width; V vocabulary.
"""

from __future__ import annotations

import secrets
from collections import abc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.engine.pages import PageAllocator, pages_for
from mixtral.engine.sampling import History, choose
from mixtral.errors import CapacityError, RequestError, TokenizerError
from mixtral.model.batch import Batch, Output
from mixtral.model.mixtral import Mixtral
from mixtral.wire import FinishReason, SamplingParams, TokenEvent

__all__ = ["CHUNK", "Generator"]

CHUNK = 512  # tokens of prompts per forward pass


@dataclass(slots=True)
class _Sequence:
    """One prompt and its answer. ``waiting`` are the tokens to feed next, after the ``cached`` ones."""

    index: int
    waiting: list[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    history: History
    cached: int = 0
    sampled: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive tokens of one sequence in a forward pass."""

    sequence: _Sequence
    tokens: list[int]


class Generator:
    """Generates with one model. Calls may not overlap; what a call holds is freed when its iterator ends or closes."""

    def __init__(self, model: Mixtral) -> None:
        self.model = model
        self._open: list[PageAllocator] = []

    @property
    def config(self) -> MixtralConfig:
        """The numbers of the model."""
        return self.model.config

    @property
    def pages_in_use(self) -> int:
        """Cache pages that unfinished sequences hold."""
        return sum(pages.used for pages in self._open)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        dropped: Collection[int] = (),
    ) -> abc.Generator[TokenEvent, None, None]:
        """One event per sampled token; ``sequence`` is the prompt's place, and its last event has a ``finish_reason``.

        The token at position p of sequence i depends on the logits, the parameters and (seed, i, p) alone. A sequence
        whose place the caller adds to ``dropped`` gets no further tokens. Closing the iterator frees all pages.

        Raises:
            RequestError: there is no prompt, or one is empty; or not as many parameters as prompts.
            TokenizerError: an id is outside the vocabulary.
            CapacityError: a prompt and its ``max_tokens`` do not fit the context.
            NumericalError: the model put out NaN or infinity (while iterating).
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if not prompts or len(each) != len(prompts):
            raise RequestError(
                f"got {len(prompts)} prompts and {len(each)} parameters; expected one each", param="prompt"
            )
        drawn = secrets.randbits(63)
        sequences = []
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            self._check(prompt, one.max_tokens)
            history = History(prompt, self.config.vocab_size)
            seed = drawn if one.seed is None else one.seed
            stop_ids = (self.config.eos_token_id,) if one.stop_ids is None else one.stop_ids
            sequences.append(_Sequence(index, list(prompt), one, seed, stop_ids, history))
        return self._run(sequences, dropped)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Raw logits after each of the T ids: float32 [T, V].

        Raises:
            RequestError, TokenizerError, CapacityError: no ids, an id outside the vocabulary, more than the context.
        """
        self._check(ids, 0)
        history = History(ids, self.config.vocab_size)
        sequence = _Sequence(0, list(ids), SamplingParams(max_tokens=1), 0, (), history)
        with torch.inference_mode():
            run = _Run(self.model, [sequence])
            return torch.cat([self.model.logits(run.forward(pieces)) for pieces in _prompt_pieces([sequence])])

    def _check(self, prompt: Sequence[int], max_tokens: int) -> None:
        if not prompt:
            raise RequestError("a prompt is empty; expected at least one token id", param="prompt")
        for id in prompt:
            if isinstance(id, bool) or not isinstance(id, int):
                raise TokenizerError(f"token id is {id!r}; expected an integer", param="prompt")
            if not 0 <= id < self.config.vocab_size:
                raise TokenizerError(f"token id is {id}; expected 0 to {self.config.vocab_size - 1}", param="prompt")
        needed, context = len(prompt) + max_tokens, self.config.max_position_embeddings
        if needed > context:
            raise CapacityError(
                f"request needs {needed} tokens (prompt {len(prompt)} + max_tokens {max_tokens}); the context of this "
                f"model is {context}. Shorten the prompt or lower max_tokens",
                param="prompt",
            )

    def _run(self, sequences: list[_Sequence], dropped: Collection[int]) -> abc.Generator[TokenEvent, None, None]:
        run = _Run(self.model, sequences)
        self._open.append(run.pages)
        try:
            for pieces in _prompt_pieces(sequences):
                yield from run.step(pieces)
            while live := [s for s in sequences if not s.finished]:
                for sequence in live:
                    if sequence.index in dropped:
                        run.finish(sequence)
                yield from run.step([_Piece(s, s.waiting) for s in live if not s.finished])
        finally:
            self._open.remove(run.pages)


class _Run:
    """One call's cache, and the steps over it."""

    def __init__(self, model: Mixtral, sequences: Sequence[_Sequence]) -> None:
        self.model = model
        # The last token of an answer is never fed.
        self.pages = PageAllocator(sum(pages_for(len(s.waiting) + s.params.max_tokens - 1) for s in sequences))
        self.cache = model.new_cache(self.pages.total)

    def step(self, pieces: Sequence[_Piece]) -> Iterator[TokenEvent]:
        """Feed the pieces, and give a token to every sequence that has nothing left to feed."""
        if not pieces:
            return
        with torch.inference_mode():
            hidden_TD = self.forward(pieces)
            ends, rows = 0, []
            for piece in pieces:
                ends += len(piece.tokens)
                if not piece.sequence.waiting:
                    rows.append(ends - 1)
            logits_NV = self.model.logits(hidden_TD[rows]).cpu().numpy() if rows else None
        if logits_NV is None:
            return
        ready = [piece.sequence for piece in pieces if not piece.sequence.waiting]
        # All are chosen before the first is given away: the caller may close the iterator in between.
        yield from [self._choose(sequence, logits_V) for sequence, logits_V in zip(ready, logits_NV, strict=True)]

    def finish(self, sequence: _Sequence) -> None:
        """No more tokens for this sequence; its pages are free."""
        sequence.finished = True
        self.pages.free(sequence.index)

    def forward(self, pieces: Sequence[_Piece]) -> Tensor:
        """Run the model over the pieces and note their tokens as cached; hidden states of all of them, [T, D]."""
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[tuple[Sequence[int], int, int]] = []  # pages, tokens already cached, tokens now
        for piece in pieces:
            sequence, count = piece.sequence, len(piece.tokens)
            owned = self.pages.grow(sequence.index, sequence.cached + count)
            tokens += piece.tokens
            positions += range(sequence.cached, sequence.cached + count)
            spans.append((owned, sequence.cached, count))
            sequence.cached += count
            sequence.waiting = sequence.waiting[count:]
        device = self.model.device
        batch = Batch(
            tokens_T=torch.tensor(tokens, device=device),
            positions_T=torch.tensor(positions, device=device),
            context=self.cache.view(spans),
        )
        output: Output = self.model(batch)
        return output.hidden_TD

    def _choose(self, sequence: _Sequence, logits_V: npt.NDArray[np.float32]) -> TokenEvent:
        choice = choose(
            logits_V,
            sequence.params,
            sequence.history,
            seed=sequence.seed,
            sequence=sequence.index,
            position=sequence.cached,
        )
        sequence.sampled += 1
        sequence.history.add(choice.id)
        sequence.waiting = [choice.id]
        reason: FinishReason | None = None
        if choice.id in sequence.stop_ids:
            reason = "stop"
        elif sequence.sampled == sequence.params.max_tokens:
            reason = "length"
        if reason is not None:
            self.finish(sequence)
        return TokenEvent(
            sequence=sequence.index, id=choice.id, logprob=choice.logprob, top=choice.top, finish_reason=reason
        )


def _prompt_pieces(sequences: Sequence[_Sequence]) -> Iterator[list[_Piece]]:
    """All prompts, cut and packed into chunks of at most 512 tokens, in order."""
    pieces: list[_Piece] = []
    room = CHUNK
    for sequence in sequences:
        prompt = sequence.waiting
        while prompt:
            piece = _Piece(sequence, prompt[:room])
            pieces.append(piece)
            prompt = prompt[room:]
            room -= len(piece.tokens)
            if not room:
                yield pieces
                pieces, room = [], CHUNK
    if pieces:
        yield pieces
