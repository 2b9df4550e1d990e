"""From a checked request to token ids, and from the engine's updates to an answer, streamed or whole."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mixtral.errors import MixtralError
from mixtral.grammar import Source
from mixtral.server.admission import Admission, AdmittedRun
from mixtral.server.answer import Answer, Calls, Piece, echo, joined
from mixtral.server.engine import Engine, Facts
from mixtral.server.errors import ApiError
from mixtral.server.fields import combination
from mixtral.server.formats import Grammar, check_continued, constraint
from mixtral.server.protocol import ChatRequest, CompletionRequest, Options
from mixtral.server.replies import ChatReply, CompletionReply, Reply, usage
from mixtral.server.routing import Collected, Telemetry
from mixtral.server.sse import DONE, WAIT, Frames, frame
from mixtral.tokenizer import encode_chat
from mixtral.wire import Constraint, Done, PromptScores, PromptToken, SamplingParams, Started, Submit, Tokens

__all__ = ["Prepared", "Work", "begin", "collect", "prepare_chat", "prepare_completion", "stream"]

_CHAT_TOKENS = 4096
_COMPLETION_TOKENS = 16


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag="prepared", forbid_unknown_fields=True):
    """A checked request as plain data: a message for the engine, and what its answers need, see ``Answer``.

    ``sources`` are grammars that must be tried before. ``echoes`` are prompts that come first in their answers, whose
    text then begins at the character in ``offsets``. ``users`` are the names that the log shows as a hash.
    """

    chat: bool
    submit: Submit
    sources: list[Source]
    stop: tuple[str, ...] = ()
    calls: Calls = "text"
    continues: bool
    salt: str = ""
    offsets: list[int]
    echoes: list[str | list[int]]
    telemetry: Telemetry
    stream: bool
    include_usage: bool
    users: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Work:
    """A request that is ready for the engine: a message for it, and one growing answer per sequence.

    ``echoes`` are prompts that come first in their answers; ``scores`` collects their tokens. ``charge`` is told of
    tokens as they are read and made.
    """

    submit: Submit
    answers: list[Answer]
    reply: Reply
    routing: Collected
    include_usage: bool = False
    echoes: Sequence[str | list[int]] = ()
    scores: dict[int, Sequence[PromptToken]] = field(default_factory=dict)
    charge: Callable[[int], None] = field(default=lambda tokens: None)

    def usage(self, started: Started) -> dict[str, Any]:
        """Token counts so far."""
        made = sum(answer.completion_tokens for answer in self.answers)
        return usage(sum(map(len, self.submit.prompts)), made, sum(started.cached))


def begin(engine: Engine, prepared: Prepared) -> Work:
    """Work for an engine. Takes little time."""
    submit = prepared.submit
    make = ChatReply if prepared.chat else CompletionReply
    return Work(
        submit=submit,
        answers=[
            Answer(
                engine.tokenizer,
                stop=prepared.stop,
                calls=prepared.calls,
                continues=prepared.continues,
                offset=offset,
                salt=f"{prepared.salt}\x1f{choice}",
            )
            for offset in prepared.offsets
            for choice in range(submit.n)
        ],
        reply=make(engine, submit.adapter or engine.name, logprobs=submit.params.logprobs is not None),
        routing=Collected(prepared.telemetry, layers=engine.layers, experts=engine.experts),
        include_usage=prepared.include_usage,
        echoes=prepared.echoes,
    )


def prepare_chat(facts: Facts, request: ChatRequest, grammar: Grammar | None, holder: str) -> Prepared:
    """Encode a conversation, for the ``holder`` of a key. Raises ApiError or MixtralError, which name the field."""
    options, tokenizer, form = request.options, facts.tokenizer, request.form
    ids = encode_chat(tokenizer, request.messages, form.tools or None, max_tokens=facts.context).ids
    room = min(facts.context, facts.cache_tokens) - len(ids)
    params = _params(facts, options, [ids], min(max(room, 1), _CHAT_TOKENS), "messages")
    continues = request.messages[-1]["role"] == "assistant"
    if continues:
        check_continued(form)
    limits, sources = constraint(form, tokenizer, grammar, continues=continues)
    return Prepared(
        chat=True,
        submit=_submit(facts, [ids], params, options, limits, holder),
        sources=sources,
        stop=options.stop,
        calls="offered" if form.offers_calls else "refused",
        continues=continues,
        salt=hashlib.sha256(repr(ids).encode()).hexdigest(),
        offsets=[0],
        echoes=[],
        telemetry=options.telemetry,
        stream=options.stream,
        include_usage=options.include_usage,
        users=options.users,
    )


def prepare_completion(facts: Facts, request: CompletionRequest, grammar: Grammar | None, holder: str) -> Prepared:
    """Encode prompts, each with BOS if it is text; as ``prepare_chat``."""
    options, tokenizer = request.options, facts.tokenizer
    prompts = [_encode(facts, prompt) for prompt in request.prompts]
    params = _params(facts, options, prompts, _COMPLETION_TOKENS, "prompt")
    limits: Constraint | None = None
    sources: list[Source] = []
    if request.form.text is not None:
        limits, sources = constraint(request.form, tokenizer, grammar, continues=True)
    offsets = [0] * len(prompts)
    if request.echo:
        offsets = [len(echo(tokenizer, prompt, ()).text) for prompt in request.prompts]
    return Prepared(
        chat=False,
        submit=_submit(facts, prompts, params, options, limits, holder),
        sources=sources,
        stop=options.stop,
        continues=True,
        offsets=offsets,
        echoes=[*request.prompts] if request.echo else [],
        telemetry=options.telemetry,
        stream=options.stream,
        include_usage=options.include_usage,
        users=options.users,
    )


def _submit(
    facts: Facts,
    prompts: list[list[int]],
    params: SamplingParams,
    options: Options,
    limits: Constraint | None,
    holder: str,
) -> Submit:
    # Cached prefixes are those of the same key, model and prompt_cache_key.
    scope = "\x1f".join((holder, options.model, options.cache_key))
    return Submit(
        request=uuid.uuid4().hex,
        prompts=prompts,
        params=params,
        n=options.n,
        constraint=limits,
        scope=hashlib.sha256(scope.encode()).hexdigest(),
        priority=options.priority,
        routing=options.telemetry.mode != "none",
        routing_prompt=options.telemetry.prompt,
        adapter=None if options.model == facts.name else options.model,
    )


async def collect(door: Admission, work: Work) -> dict[str, Any]:
    """The whole body of an answer. Raises ApiError, or what the engine raises."""
    found: list[list[Piece]] = [[] for _ in work.answers]
    async with door.run(work.submit) as run:
        started = await _start(run, work)
        async for pieces in _pieces(run, work):
            for index, piece in pieces:
                found[index].append(piece)
    for place, prompt in enumerate(work.echoes):
        scored = work.scores.get(place, ()) if work.submit.params.logprobs is not None else ()
        for index in range(place * work.submit.n, (place + 1) * work.submit.n):
            found[index].insert(0, echo(door.tokenizer, prompt, scored))
    choices = [work.reply.choice(index, joined(pieces)) for index, pieces in enumerate(found)]
    routing = work.routing.take(range(len(found)), last=True)
    return {**work.reply.whole_head, "choices": choices, "usage": work.usage(started), **routing}


async def stream(door: Admission, work: Work) -> AsyncGenerator[bytes, None]:
    """The frames of an answer, the first of them (perhaps empty) as soon as the request leaves the queue."""
    head = work.reply.head
    frames = Frames(head, {"usage": None} if work.include_usage else {})
    async with door.run(work.submit) as run:
        started = await _start(run, work)
        openings = [work.reply.opening(index) for index in range(len(work.answers))]
        yield b"".join(frames.event(opening) for opening in openings if opening)
        async for pieces in _pieces(run, work):
            if not pieces:
                yield WAIT
                continue
            events = [frames.event(choice, extra) for choice, extra in _events(work, pieces)]
            if events:
                yield b"".join(events)
    if work.include_usage:
        yield frame(head | {"choices": [], "usage": work.usage(started)})
    yield DONE


def _events(work: Work, pieces: list[tuple[int, Piece]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The choice of each event, with what stands beside it. Routing comes with the first event of its answer."""
    for index, piece in pieces:
        changes = work.reply.changes(index, piece)
        for place, choice in enumerate(changes):
            last = place == len(changes) - 1 and piece.finish_reason is not None
            yield choice, work.routing.take([index], last=last)


async def _start(run: AdmittedRun, work: Work) -> Started:
    """Wait until the request leaves the queue."""
    async for update in run:
        if isinstance(update, Started):
            work.charge(sum(map(len, work.submit.prompts)))
            return update
    raise MixtralError("the engine ended before it began; expected the update Started")


async def _pieces(run: AdmittedRun, work: Work) -> AsyncGenerator[list[tuple[int, Piece]], None]:
    """Index and piece of every answer that an update changes, until all are finished; nothing for a pause."""
    async for update in run:
        if update is None:
            yield []
        elif isinstance(update, PromptScores):
            work.scores[update.prompt] = update.tokens
        elif isinstance(update, Tokens):
            work.charge(len(update.events))
            pieces = _read(update, work)
            over = all(answer.finished for answer in work.answers)
            if not over:
                _stop(run, update, pieces)
            if pieces:
                yield pieces
            if over:
                return
        elif isinstance(update, Done):
            if work.submit.params.max_tokens:
                break
            yield [(index, answer.end()) for index, answer in enumerate(work.answers)]
            return
    raise MixtralError(
        "the engine ended before all answers were finished; expected an event with a finish_reason for each"
    )


def _read(update: Tokens, work: Work) -> list[tuple[int, Piece]]:
    """What an update adds to each answer; several tokens of one answer are one piece."""
    found: dict[int, list[Piece]] = {}
    for event in update.events:
        answer = work.answers[event.sequence]
        if answer.finished:
            continue  # it found its stop string before
        if event.routing is not None:
            work.routing.add(event.sequence, event.routing)
        found.setdefault(event.sequence, []).append(answer.push(event))
    return [(index, joined(pieces)) for index, pieces in found.items()]


def _stop(run: AdmittedRun, update: Tokens, pieces: Sequence[tuple[int, Piece]]) -> None:
    """Let the engine end what is finished here, by a stop string, and not there."""
    ended = {event.sequence for event in update.events if event.finish_reason is not None}
    for index, piece in pieces:
        if piece.finish_reason is not None and index not in ended:
            run.abort(index)


def _encode(facts: Facts, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    fewest = facts.tokenizer.fewest_tokens(prompt)
    if fewest > facts.context:
        message = (
            f"the prompt needs at least {fewest} tokens; the context of this model is {facts.context} tokens. "
            "Shorten the prompt."
        )
        raise ApiError(400, "context_length_exceeded", message, param="prompt")
    return facts.tokenizer.encode(prompt, bos=True)


def _params(
    facts: Facts, options: Options, prompts: Sequence[Sequence[int]], default: int, param: str
) -> SamplingParams:
    """Sampling parameters with ``max_tokens``, if the longest prompt and its answer fit. Raises ApiError."""
    longest = max(map(len, prompts))
    max_tokens = default if options.max_tokens is None else options.max_tokens
    total = longest + max_tokens
    if total > facts.context:
        message = (
            f"prompt {longest} + max_tokens {max_tokens} = {total} tokens; the context of "
            f"this model is {facts.context} tokens. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, "context_length_exceeded", message, param=param)
    if total > facts.cache_tokens:
        message = (
            f"prompt {longest} + max_tokens {max_tokens} = {total} tokens; the cache of this server holds "
            f"{facts.cache_tokens} tokens. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, "request_exceeds_cache", message, param=param)
    if options.sampling.get("min_tokens", 0) > max_tokens:
        least = options.sampling["min_tokens"]
        raise combination("min_tokens", f"min_tokens is {least}; expected at most max_tokens, which is {max_tokens}")
    reported = len(prompts) * options.n * max_tokens
    options.telemetry.check(reported + (sum(map(len, prompts)) if options.telemetry.prompt else 0))
    return SamplingParams(max_tokens=max_tokens, **options.sampling)
