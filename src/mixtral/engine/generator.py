"""An engine in this process as an iterator: prompts in, one event per sampled token out.

Several iterators may be open at once; whichever is asked for its next event runs a step, which advances all of them.
The context end: prompt and ``max_tokens`` together fit the context, or the request is refused, so a prompt that fills
the context has no answer. Nothing is ever shifted out; an answer that reaches the context end has reached its
``max_tokens`` and ends with "length".
"""

from __future__ import annotations

import itertools
from collections import abc, deque
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.engine.engine import Engine
from mixtral.errors import MixtralError, NumericalError, RequestError
from mixtral.model.mixtral import Mixtral
from mixtral.wire import Constraint, Done, Failed, SamplingParams, Submit, TokenEvent, Tokens, Update

__all__ = ["Generator"]


class Generator:
    """Generates with one engine. What an iterator holds is freed when it ends or is closed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._updates: dict[str, deque[Update]] = {}
        self._names = itertools.count()

    @property
    def model(self) -> Mixtral:
        """What the engine runs."""
        return self.engine.model

    @property
    def config(self) -> MixtralConfig:
        """The numbers of the model."""
        return self.engine.model.config

    @property
    def pages_in_use(self) -> int:
        """Cache pages that unfinished sequences hold."""
        return self.engine.pages.used

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        dropped: Collection[int] = (),
        *,
        constraint: Constraint | None = None,
        adapter: str | None = None,
    ) -> abc.Generator[TokenEvent, None, None]:
        """One event per sampled token; ``sequence`` is the prompt's place, and its last event has a ``finish_reason``.

        With the same parameters for all, the token at position p of sequence i depends on the logits, the parameters
        and (seed, i, p) alone. With parameters for each, every prompt is generated as if it were alone: i is 0. A
        sequence whose place the caller adds to ``dropped`` gets no more tokens. Every answer keeps to ``constraint``,
        and is that of the model with ``adapter``. Closing the iterator frees all pages.

        Raises:
            RequestError: there is no prompt, or one is empty; or not as many parameters as prompts; or there is a
                ``constraint``, and the engine has no grammars; or it has no such adapter.
            TokenizerError: an id is outside the vocabulary.
            CapacityError: a prompt and its ``max_tokens`` do not fit the context, or not the cache.
            NumericalError: the model put out NaN or infinity (while iterating).
            MixtralError: the constraint could not be followed, ``grammar_failed`` (while iterating).
        """
        asked = [list(prompt) for prompt in prompts]
        if isinstance(params, SamplingParams):
            groups = [(0, self._submission(asked, params, constraint, adapter))]
        elif len(params) != len(asked) or not asked:
            raise RequestError(
                f"got {len(asked)} prompts and {len(params)} parameters; expected one each", param="prompt"
            )
        else:
            each = zip(asked, params, strict=True)
            groups = [
                (place, self._submission([prompt], one, constraint, adapter))
                for place, (prompt, one) in enumerate(each)
            ]
        for _, submit in groups:
            self.engine.check(submit)
        return self._run(groups, dropped)

    def logits(self, ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """Raw logits after each of the T ids: float32 [T, V].

        Raises:
            RequestError, TokenizerError, CapacityError: no ids, an id outside the vocabulary, more than the context.
        """
        return self.engine.logits(list(ids), adapter)

    def _submission(
        self, prompts: list[list[int]], params: SamplingParams, constraint: Constraint | None, adapter: str | None
    ) -> Submit:
        name = f"{next(self._names)}"
        return Submit(request=name, prompts=prompts, params=params, constraint=constraint, adapter=adapter)

    def _run(
        self, groups: Sequence[tuple[int, Submit]], dropped: Collection[int]
    ) -> abc.Generator[TokenEvent, None, None]:
        first = {submit.request: place for place, submit in groups}
        where = {place + at: (one.request, at) for place, one in groups for at in range(len(one.prompts))}
        try:
            for _, submit in groups:
                self.engine.submit(submit)
                self._updates[submit.request] = deque()
            while first:
                for place in [place for place in dropped if place in where]:
                    self.engine.abort(*where.pop(place))
                if not any(self._updates[name] for name in first):
                    self._step(first)
                for name in tuple(first):
                    for event in self._events(name, first):
                        if event.sequence not in dropped:
                            yield event
        finally:
            for name in first:
                self._updates.pop(name, None)
                self.engine.abort(name)

    def _events(self, name: str, first: dict[str, int]) -> Iterator[TokenEvent]:
        """What has come for a request, which leaves ``first`` when it is done."""
        offset, updates = first[name], self._updates[name]
        while updates:
            update = updates.popleft()
            if isinstance(update, Tokens):
                for event in update.events:
                    yield _moved(event, offset) if offset else event
            elif isinstance(update, Done | Failed):
                del first[name], self._updates[name]
                if isinstance(update, Failed):
                    raise _error(update)

    def _step(self, names: Iterable[str]) -> None:
        if not any(self.engine.is_open(name) for name in names):
            raise RuntimeError("the engine was stopped in the middle of a step; this answer cannot go on")
        for update in self.engine.step():
            if (found := self._updates.get(update.request)) is not None:
                found.append(update)


def _moved(event: TokenEvent, offset: int) -> TokenEvent:
    return TokenEvent(
        sequence=event.sequence + offset,
        id=event.id,
        logprob=event.logprob,
        top=event.top,
        finish_reason=event.finish_reason,
    )


def _error(failed: Failed) -> MixtralError:
    kind = NumericalError if failed.code == NumericalError.code else MixtralError
    return kind(failed.message, param=failed.param, code=failed.code)
