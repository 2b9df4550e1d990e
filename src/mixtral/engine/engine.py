"""The engine: requests in, a step at a time, updates of them out. One thread owns it; nothing in it waits.

T tokens of a step; N rows that get logits; V vocabulary; L layers; E experts.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.engine.config import EngineConfig
from mixtral.engine.pages import PAGE_SIZE, PageAllocator
from mixtral.engine.request import Request, Sequence
from mixtral.engine.runner import Adapters, Floats, Runner, StepResult
from mixtral.engine.sampler import Grammar, Sampler
from mixtral.engine.sampling import Choice, score
from mixtral.engine.scheduler import Piece, Plan, Scheduler
from mixtral.engine.speculate import Costs
from mixtral.errors import CapacityError, MixtralError, NumericalError, RequestError, TokenizerError
from mixtral.model.mixtral import Mixtral
from mixtral.ops.memory import available_bytes
from mixtral.wire import (
    Done,
    Failed,
    PromptScores,
    PromptToken,
    Routing,
    Started,
    Stats,
    Submit,
    TokenEvent,
    Tokens,
    Update,
)

__all__ = ["Engine"]


@dataclass(slots=True)
class _Open:
    """A request that is not done, and what its sequences carry along."""

    request: Request
    samplers: list[Sampler]
    scores: list[list[PromptToken]]
    events: list[TokenEvent] = field(default_factory=list)
    routing: dict[int, list[tuple[int, bytes, bytes]]] = field(default_factory=dict)  # by index of the sequence


@dataclass(slots=True)
class _Rows:
    """Rows of logits; of each, whether all is finite and the id of the largest value (the lowest one of several)."""

    logits_NV: Floats
    finite: list[bool]
    likely: list[int]

    def part(self, first: int, last: int) -> _Rows:
        """Some consecutive rows."""
        return _Rows(self.logits_NV[first:last], self.finite[first:last], self.likely[first:last])


class Engine:
    """Runs any number of requests on one model. What a request gets depends on nothing but the request and the model.

    ``submit``, ``abort`` and ``pause`` only note; all work is done in ``step``. An exception that leaves ``step`` (not
    one that belongs to a request) ends all requests; the engine is usable afterwards.
    """

    def __init__(
        self,
        model: Mixtral,
        config: EngineConfig | None = None,
        grammar: Grammar | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.config = config or EngineConfig()
        self._grammar = grammar
        context = model.config.max_position_embeddings
        total = self.config.page_count(model.new_cache(1).nbytes, context, available_bytes(model.device))
        self.pages = PageAllocator(total, publish=self.config.prefix_cache)
        self.scheduler = Scheduler(self.config, self.pages)
        self._runner = Runner(model, self.pages, adapters)
        self._costs = Costs(model.config.num_local_experts, model.config.num_experts_per_tok)
        self._open: dict[str, _Open] = {}
        self._paused: set[str] = set()
        self._early: list[Update] = []  # updates that wait for the next step
        self._next_number = 0
        self._steps, self._seconds = 0, 0.0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._experts_LE = np.zeros((model.config.num_hidden_layers, model.config.num_local_experts), dtype=np.int64)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do or tell anything."""
        return bool(self._early) or len(self._open) > len(self._paused)

    def is_open(self, request: str) -> bool:
        """Whether there will be more updates of a request."""
        return request in self._open or any(update.request == request for update in self._early)

    @property
    def cache_tokens(self) -> int:
        """What the cache has room for: a sequence that stores more is refused."""
        return self.pages.total * PAGE_SIZE

    def check(self, submit: Submit) -> None:
        """Raise what is wrong with a request.

        Raises:
            RequestError: there is no prompt, one is empty, or a parameter or the adapter does not fit this engine.
            TokenizerError: an id is outside the vocabulary.
            CapacityError: a prompt and its answer do not fit the context or the cache.
        """
        if not submit.prompts:
            raise RequestError("got 0 prompts; expected at least one", param="prompt")
        if submit.n < 1:
            raise RequestError(f"n is {submit.n}; expected at least 1", param="n")
        if submit.constraint is not None and self._grammar is None:
            raise RequestError("this engine has no grammars; send no constraint", param="constraint")
        self._check_adapter(submit.adapter)
        vocab_size = self.model.config.vocab_size
        for id in submit.params.logit_bias:
            if not 0 <= id < vocab_size:
                raise RequestError(f"logit_bias names id {id}; expected 0 to {vocab_size - 1}", param="logit_bias")
        for prompt in submit.prompts:
            _check_prompt(prompt, submit.params.max_tokens, self.model.config)
            self.scheduler.check(len(prompt) + max(submit.params.max_tokens - 1, 0))

    def submit(self, submit: Submit) -> None:
        """Queue a request. What is wrong with it (see ``check``) is told as ``Failed`` by the next step.

        Raises:
            ValueError: a request of that name is not done yet.
        """
        if submit.request in self._open:
            raise ValueError(f"request {submit.request!r} is not done; expected another name")
        try:
            self.check(submit)
        except MixtralError as error:
            self._early.append(_failure(submit.request, error))
            return
        request = Request(submit, self._next_number)
        self._next_number += len(request.sequences)
        seed = secrets.randbits(63) if submit.params.seed is None else submit.params.seed
        samplers = [
            Sampler(
                sequence,
                seed=seed,
                vocab_size=self.model.config.vocab_size,
                eos=self.model.config.eos_token_id,
                grammar=self._grammar,
                speculate=self.config.speculation,
            )
            for sequence in request.sequences
        ]
        self._open[submit.request] = _Open(request, samplers, [[] for _ in submit.prompts])
        self.scheduler.add(request)

    def abort(self, request: str, sequence: int | None = None) -> None:
        """Forget a request, or one of its sequences; its pages are free at once. See ``wire.Abort``."""
        found = self._open.get(request)
        if sequence is None:
            self._early = [update for update in self._early if update.request != request]
        if found is None:
            return
        sequences = found.request.sequences
        if sequence is None:
            self._close(request)
        elif not 0 <= sequence < len(sequences):
            return
        for one in sequences if sequence is None else [sequences[sequence]]:
            self.scheduler.finish(one, None)
        if sequence is not None and found.request.finished:
            self._close(request)
            self._early.append(Done(request=request))

    def pause(self, request: str, *, on: bool) -> None:
        """Stop working on a request and free its pages, or go on with it; it gets the same in the end."""
        found = self._open.get(request)
        if found is None:
            return
        self.scheduler.pause(found.request, on=on)
        (self._paused.add if on else self._paused.discard)(request)

    def abort_all(self) -> None:
        """Forget all requests."""
        for request in tuple(self._open):
            self.abort(request)
        self._early.clear()

    def step(self, begin: Callable[[set[str]], None] | None = None) -> list[Update]:
        """Compute one step, and tell what came of it: for each request what is new, in an order that makes sense.

        ``begin`` is told which requests the step works on, before it does.
        """
        updates, self._early = self._early, []
        if len(self._open) == len(self._paused):
            return updates
        begun = time.perf_counter()
        try:
            plan = self.scheduler.plan()
            if begin is not None:
                begin({piece.sequence.request.submit.request for piece in plan.pieces})
            rows = self._speculate(plan)
            result = self._runner.run(plan.pieces)
            for request, cached in plan.started:
                self._cached_tokens += sum(cached)
                updates.append(Started(request=request.submit.request, cached=cached))
            self._settle(plan, result, updates)
        except BaseException:
            self.abort_all()
            raise
        seconds = time.perf_counter() - begun
        if rows:
            self._costs.observe(rows, seconds)
        self._steps += 1
        self._seconds += seconds
        return updates

    def stats(self) -> Stats:
        """Counters since the beginning, and what the engine holds now."""
        waiting = self.scheduler.waiting
        return Stats(
            steps=self._steps,
            step_seconds=self._seconds,
            waiting=len({id(one.request) for one in waiting}),
            waiting_tokens=sum(one.left for one in waiting),
            running=len(self.scheduler.running),
            pages_total=self.pages.total,
            pages_used=self.pages.used,
            pages_cached=self.pages.cached,
            preemptions=self.scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            expert_tokens=self._experts_LE.tolist(),
        )

    def logits(self, ids: list[int], adapter: str | None = None) -> Tensor:
        """Raw logits after each of the T ids: float32 [T, V].

        Raises:
            RequestError, TokenizerError, CapacityError: no ids, an id outside the vocabulary, more than the context; or
                there is no such adapter.
        """
        _check_prompt(ids, 0, self.model.config)
        self._check_adapter(adapter)
        return self._runner.logits(ids, self.config.max_num_batched_tokens, adapter)

    def _check_adapter(self, adapter: str | None) -> None:
        known = () if self.adapters is None else self.adapters.known
        if adapter is not None and adapter not in known:
            expected = f"one of {', '.join(known)}" if known else "none, for this model has none"
            raise RequestError(f"there is no adapter {adapter!r:.140}; expected {expected}", param="adapter")

    def _speculate(self, plan: Plan) -> int:
        """Add drafts to a plan in which all write answers. Gives the tokens of such a step, else 0."""
        pieces = plan.pieces
        if not self.config.speculation or any(not piece.samples or piece.count > 1 for piece in pieces):
            return 0
        rows = len(pieces)
        for piece in pieces:
            sequence = piece.sequence
            found = self._open[sequence.request.submit.request]
            drafter = found.samplers[sequence.index].drafter
            most = sequence.limit - len(sequence.tokens)
            if drafter is None or most < 1:
                continue
            if drafts := drafter.propose(sequence.tokens, most, rows, len(pieces) - 1, self._costs):
                self.scheduler.draft(piece, drafts)
                rows += len(piece.drafts)
        return rows

    def _settle(self, plan: Plan, result: StepResult, updates: list[Update]) -> None:
        """Take over what a step computed, piece by piece. What goes wrong with one ends its request and no other."""
        self._count(result)
        rows = _survey(result.logits_NV)
        row, touched = 0, {}
        for piece, start in zip(plan.pieces, result.starts, strict=True):
            request = piece.sequence.request
            name = request.submit.request
            found = self._open.get(name)
            count = 1 + len(piece.drafts) if piece.samples and request.submit.params.max_tokens else 0
            if found is not None:  # or it failed in a piece before
                touched[name] = found
                try:
                    self._take(found, piece, start, result, rows.part(row, row + count))
                except MixtralError as error:
                    self._fail(found, error, updates)
            row += count
        for name, found in touched.items():
            if name in self._open:
                self._tell(name, found, updates)

    def _take(self, found: _Open, piece: Piece, start: int, result: StepResult, rows: _Rows) -> None:
        sequence = piece.sequence
        request = sequence.request
        if piece.start < sequence.prompt_length:
            self._prompt_tokens += min(piece.start + piece.count, sequence.prompt_length) - piece.start
            if request.submit.params.prompt_logprobs is not None:
                self._score(found, piece, start, result)
        chosen: list[Choice] = []
        if len(rows.logits_NV):
            chosen = self._choose(found.samplers[sequence.index], piece, rows)
        accepted = [one.id for one in chosen[:-1]]
        self.scheduler.computed(piece, accepted)
        if request.submit.routing:
            self._route(found, piece, start, start + piece.count + len(accepted), result)
        if chosen:
            sequence.tokens.append(chosen[-1].id)
            self._note(found, sequence, chosen)
        elif request.ready[sequence.prompt] and not request.submit.params.max_tokens:
            n = request.submit.n
            for one in request.sequences[sequence.prompt * n : (sequence.prompt + 1) * n]:
                self.scheduler.finish(one, None)

    def _choose(self, sampler: Sampler, piece: Piece, rows: _Rows) -> list[Choice]:
        """The tokens that a piece yields: drafts as long as they are what is chosen, and one more."""
        sequence = piece.sequence
        sampled = sequence.sampled
        chosen: list[Choice] = []
        for place, row_V in enumerate(rows.logits_NV):
            if sampler.plain and rows.finite[place]:
                choice = Choice(rows.likely[place])
            else:
                choice = sampler.choose(row_V, sampled)
            sampled += 1
            chosen.append(choice)
            reason = sampler.reason(choice.id, sampled)
            if reason is not None:
                sequence.finish_reason = reason
                break
            if place == len(piece.drafts) or piece.drafts[place] != choice.id:
                break
        if piece.drafts and sampler.drafter is not None:
            sampler.drafter.observe(len(piece.drafts), len(chosen) - 1)
        return chosen

    def _note(self, found: _Open, sequence: Sequence, chosen: list[Choice]) -> None:
        self._output_tokens += len(chosen)
        routing = found.routing.pop(sequence.index, None)
        for choice in chosen:
            last = choice is chosen[-1]
            found.events.append(
                TokenEvent(
                    sequence=sequence.index,
                    id=choice.id,
                    logprob=choice.logprob,
                    top=choice.top,
                    finish_reason=sequence.finish_reason if last else None,
                    routing=_joined(routing) if last and routing else None,
                )
            )
        if sequence.finish_reason is not None:
            self.scheduler.finish(sequence, sequence.finish_reason)

    def _route(self, found: _Open, piece: Piece, start: int, end: int, result: StepResult) -> None:
        """Keep the experts of the tokens ``start .. end`` of the step that were not told yet."""
        sequence = piece.sequence
        skipped = max(0, sequence.routed - piece.start)
        if start + skipped < end:
            first = piece.start + skipped
            experts, weights = result.routing(start + skipped, end)
            found.routing.setdefault(sequence.index, []).append((first, experts, weights))
            sequence.routed = first + end - start - skipped

    def _score(self, found: _Open, piece: Piece, start: int, result: StepResult) -> None:
        """Score the tokens of the prompt that follow those of a piece."""
        sequence = piece.sequence
        scored, count = sequence.request.scored, sequence.request.submit.params.prompt_logprobs
        first = max(piece.start, scored[sequence.prompt] - 1)
        last = min(piece.start + piece.count, sequence.prompt_length - 1)
        offset = piece.start - start
        for place, row_V in result.scored_rows(first - offset, last - offset):
            target = place + offset + 1
            if not np.isfinite(row_V).all():
                raise NumericalError(f"a logit at position {target} of the prompt is not a finite number")
            logprob, top = score(row_V, sequence.tokens[target], count or 0)
            found.scores[sequence.prompt].append(PromptToken(id=sequence.tokens[target], logprob=logprob, top=top))
            scored[sequence.prompt] = target + 1

    def _tell(self, name: str, found: _Open, updates: list[Update]) -> None:
        request = found.request
        if request.submit.params.prompt_logprobs is not None:
            for prompt, tokens in enumerate(found.scores):
                ids = request.submit.prompts[prompt]
                if request.ready[prompt] and len(tokens) == len(ids) - 1:
                    whole = [PromptToken(id=ids[0]), *tokens]
                    updates.append(PromptScores(request=name, prompt=prompt, tokens=whole))
                    tokens.append(whole[0])  # told: as long as the prompt now
        if found.events:
            updates.append(Tokens(request=name, events=found.events))
            found.events = []
        if request.finished:
            self._close(name)
            updates.append(Done(request=name))

    def _fail(self, found: _Open, error: MixtralError, updates: list[Update]) -> None:
        name = found.request.submit.request
        self._close(name)
        for sequence in found.request.sequences:
            self.scheduler.finish(sequence, None, damaged=isinstance(error, NumericalError))
        updates.append(_failure(name, error))

    def _close(self, name: str) -> None:
        del self._open[name]
        self._paused.discard(name)

    def _count(self, result: StepResult) -> None:
        """Add the experts that the tokens of a step went to."""
        layers, experts = self._experts_LE.shape
        places = result.picks_LTA + (np.arange(layers) * experts)[:, None, None]
        self._experts_LE += np.bincount(places.ravel(), minlength=layers * experts).reshape(layers, experts)


def _survey(logits_NV: Floats) -> _Rows:
    if not len(logits_NV):
        return _Rows(logits_NV, [], [])
    likely_N = logits_NV.argmax(1)
    ends_2N = np.stack((logits_NV[np.arange(len(likely_N)), likely_N], logits_NV.min(1)))
    return _Rows(logits_NV, np.isfinite(ends_2N).all(0).tolist(), likely_N.tolist())


def _joined(parts: list[tuple[int, bytes, bytes]]) -> Routing:
    return Routing(
        first=parts[0][0],
        experts=b"".join(experts for _, experts, _ in parts),
        weights=b"".join(weights for _, _, weights in parts),
    )


def _failure(request: str, error: MixtralError) -> Failed:
    return Failed(request=request, code=error.code, message=str(error), param=error.param)


def _check_prompt(prompt: list[int], max_tokens: int, config: MixtralConfig) -> None:
    if not prompt:
        raise RequestError("a prompt is empty; expected at least one token id", param="prompt")
    for id in prompt:
        if isinstance(id, bool) or not isinstance(id, int):
            raise TokenizerError(f"token id is {id!r}; expected an integer", param="prompt")
        if not 0 <= id < config.vocab_size:
            raise TokenizerError(f"token id is {id}; expected 0 to {config.vocab_size - 1}", param="prompt")
    needed, context = len(prompt) + max_tokens, config.max_position_embeddings
    if needed > context:
        raise CapacityError(
            f"request needs {needed} tokens (prompt {len(prompt)} + max_tokens {max_tokens}); the context of this "
            f"model is {context}. Shorten the prompt or lower max_tokens",
            param="prompt",
        )
