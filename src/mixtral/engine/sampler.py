"""What one sequence carries from token to token: the history of its penalties, its grammar, its drafts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mixtral import faults
from mixtral.engine.request import Sequence
from mixtral.engine.sampling import Choice, History, NoTokenError, choose, is_greedy, needs_history
from mixtral.engine.speculate import Drafter
from mixtral.errors import MatcherError, MixtralError
from mixtral.wire import Constraint, FinishReason

__all__ = ["Grammar", "Matcher", "Sampler"]


class Matcher(Protocol):
    """Where one sequence is in its grammar. Whatever it raises ends the request."""

    @property
    def finished(self) -> bool:
        """Whether only the end of the text may follow."""
        ...

    def mask(self, out: npt.NDArray[np.uint32]) -> None:
        """Set the bits of the ids that may come next, 32 ids to a word, the lowest bit first; clear all others."""
        ...

    def advance(self, id: int) -> None:
        """Take the next token."""
        ...


class Grammar(Protocol):
    """Makes matchers."""

    def matcher(self, constraint: Constraint) -> Matcher:
        """One at the beginning of an answer."""
        ...


class Sampler:
    """Chooses the tokens of one sequence, one after the other."""

    def __init__(
        self, sequence: Sequence, *, seed: int, vocab_size: int, eos: int, grammar: Grammar | None, speculate: bool
    ) -> None:
        submit = sequence.request.submit
        self._sequence, self._seed, self._eos = sequence, seed, eos
        self._params = params = submit.params
        self._stop_ids = frozenset((eos,) if params.stop_ids is None else params.stop_ids)
        self._history = None
        if needs_history(params):
            self._history = History(sequence.tokens, vocab_size)
        self._grammar, self._constraint = grammar, submit.constraint
        self._matcher: Matcher | None = None
        self._mask = None if submit.constraint is None else np.empty(-(-vocab_size // 32), dtype=np.uint32)
        self.drafter = Drafter() if speculate else None
        bound = params.ignore_eos or params.min_tokens > 0 or submit.constraint is not None
        self.plain = is_greedy(params) and not bound and params.logprobs is None
        """Whether the choice is the largest logit and nothing else is wanted."""

    def choose(self, row_V: npt.NDArray[np.float32], sampled: int) -> Choice:
        """The next token, when ``sampled`` are chosen already.

        Raises:
            NumericalError: a logit is NaN or infinite.
            MatcherError: the grammar failed or leaves no token.
        """
        sequence, params = self._sequence, self._params
        banned: Iterable[int] = ()
        if params.ignore_eos or sampled < params.min_tokens:
            banned = self._stop_ids
        mask = self._next_mask()
        try:
            choice = choose(
                row_V,
                params,
                self._history,
                seed=self._seed,
                sequence=sequence.index,
                position=sequence.prompt_length + sampled,
                mask=mask,
                banned=banned,
            )
        except NoTokenError:
            raise MatcherError("the constraint and the ids that may not be chosen leave no token") from None
        if self._history is not None:
            self._history.add(choice.id)
        return choice

    def reason(self, id: int, sampled: int) -> FinishReason | None:
        """Why the answer ends with its token ``id``, number ``sampled``; takes the token into the grammar if not.

        Raises:
            MatcherError: the grammar failed.
        """
        ended = id in self._stop_ids
        if self._matcher is not None and not ended:
            ended = id == self._eos or self._matcher.finished
        if ended:
            return "stop"
        if sampled == self._params.max_tokens:
            return "length"
        if self._matcher is not None:
            try:
                self._matcher.advance(id)
            except Exception as error:
                raise _failed(error) from error
        return None

    def _next_mask(self) -> npt.NDArray[np.uint32] | None:
        if self._mask is None or self._constraint is None:
            return None
        try:
            if self._matcher is None:
                if self._grammar is None:
                    raise MatcherError("this engine has no grammars")
                self._matcher = self._grammar.matcher(self._constraint)
            if faults.matchers_fail():
                raise MatcherError("a failpoint")
            self._matcher.mask(self._mask)
        except Exception as error:
            raise _failed(error) from error
        return self._mask


def _failed(error: Exception) -> MatcherError:
    told = str(error) if isinstance(error, MixtralError) else "it is broken"
    return MatcherError(f"the constraint of this request cannot be followed: {told}")
