"""From a checked request to token ids, and from the engine's updates to an answer, streamed or whole."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtral.errors import MixtralError
from mixtral.server.admission import Admission, AdmittedRun
from mixtral.server.answer import Answer, Piece, echo, joined
from mixtral.server.engine import Engine
from mixtral.server.errors import ApiError
from mixtral.server.fields import combination
from mixtral.server.formats import Grammar, Source, constraint
from mixtral.server.protocol import ChatRequest, CompletionRequest, Options
from mixtral.server.replies import ChatReply, CompletionReply, Reply, usage
from mixtral.server.routing import Collected
from mixtral.server.sse import DONE, WAIT, Frames, frame
from mixtral.tokenizer import encode_chat
from mixtral.wire import Constraint, Done, PromptScores, PromptToken, SamplingParams, Started, Submit, Tokens

__all__ = ["Work", "collect", "prepare_chat", "prepare_completion", "stream"]

_CHAT_TOKENS = 4096
_COMPLETION_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class Work:
    """A request that is ready for the engine: a message for it, and one growing answer per sequence.

    ``sources`` are grammars that must be tried before. ``echoes`` are prompts that come first in their answers;
    ``scores`` collects their tokens. ``charge`` is told of tokens as they are read and made.
    """

    submit: Submit
    sources: list[Source]
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


def prepare_chat(engine: Engine, request: ChatRequest, grammar: Grammar | None, scope: str) -> Work:
    """Encode a conversation. Raises ApiError or MixtralError, which name the field."""
    options, tokenizer, form = request.options, engine.tokenizer, request.form
    ids = encode_chat(tokenizer, request.messages, form.tools or None, max_tokens=engine.context).ids
    room = min(engine.context, engine.cache_tokens) - len(ids)
    params = _params(engine, options, [ids], min(max(room, 1), _CHAT_TOKENS), "messages")
    continues = request.messages[-1]["role"] == "assistant"
    limits, sources = constraint(form, tokenizer, grammar, continues=continues)
    submit = Submit(
        request=uuid.uuid4().hex,
        prompts=[ids],
        params=params,
        n=options.n,
        constraint=limits,
        scope=scope,
        priority=options.priority,
        routing=options.telemetry.mode != "none",
        routing_prompt=options.telemetry.prompt,
    )
    salt = hashlib.sha256(repr(ids).encode()).hexdigest()
    answers = [
        Answer(
            tokenizer,
            stop=options.stop,
            calls="offered" if form.offers_calls else "refused",
            continues=continues,
            salt=f"{salt}\x1f{choice}",
        )
        for choice in range(options.n)
    ]
    reply = ChatReply(engine, logprobs=params.logprobs is not None)
    return Work(
        submit=submit,
        sources=sources,
        answers=answers,
        reply=reply,
        routing=Collected(options.telemetry, layers=engine.layers, experts=engine.experts),
        include_usage=options.include_usage,
    )


def prepare_completion(engine: Engine, request: CompletionRequest, grammar: Grammar | None, scope: str) -> Work:
    """Encode the prompts, each with BOS if it is text. Raises ApiError or MixtralError, which name the field."""
    options, tokenizer = request.options, engine.tokenizer
    prompts = [_encode(engine, prompt) for prompt in request.prompts]
    params = _params(engine, options, prompts, _COMPLETION_TOKENS, "prompt")
    limits: Constraint | None = None
    sources: list[Source] = []
    if request.form.text is not None:
        limits, sources = constraint(request.form, tokenizer, grammar, continues=True)
    submit = Submit(
        request=uuid.uuid4().hex,
        prompts=prompts,
        params=params,
        n=options.n,
        constraint=limits,
        scope=scope,
        priority=options.priority,
        routing=options.telemetry.mode != "none",
        routing_prompt=options.telemetry.prompt,
    )
    offsets = [0] * len(prompts)
    if request.echo:
        offsets = [len(echo(tokenizer, prompt, ()).text) for prompt in request.prompts]
    answers = [
        Answer(tokenizer, stop=options.stop, continues=True, offset=offset)
        for offset in offsets
        for _ in range(options.n)
    ]
    return Work(
        submit=submit,
        sources=sources,
        answers=answers,
        reply=CompletionReply(engine, logprobs=params.logprobs is not None),
        routing=Collected(options.telemetry, layers=engine.layers, experts=engine.experts),
        include_usage=options.include_usage,
        echoes=request.prompts if request.echo else (),
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
            yield _read(update, work)
            if all(answer.finished for answer in work.answers):
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
        if event.routing is not None and not answer.finished:
            work.routing.add(event.sequence, event.routing)
        found.setdefault(event.sequence, []).append(answer.push(event))
    return [(index, joined(pieces)) for index, pieces in found.items()]


def _encode(engine: Engine, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    fewest = engine.tokenizer.fewest_tokens(prompt)
    if fewest > engine.context:
        message = (
            f"the prompt needs at least {fewest} tokens; the context of this model is {engine.context} tokens. "
            "Shorten the prompt."
        )
        raise ApiError(400, "context_length_exceeded", message, param="prompt")
    return engine.tokenizer.encode(prompt, bos=True)


def _params(
    engine: Engine, options: Options, prompts: Sequence[Sequence[int]], default: int, param: str
) -> SamplingParams:
    """Sampling parameters with ``max_tokens``, if the longest prompt and its answer fit. Raises ApiError."""
    longest = max(map(len, prompts))
    max_tokens = default if options.max_tokens is None else options.max_tokens
    total = longest + max_tokens
    if total > engine.context:
        message = (
            f"prompt {longest} + max_tokens {max_tokens} = {total} tokens; the context of "
            f"this model is {engine.context} tokens. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, "context_length_exceeded", message, param=param)
    if total > engine.cache_tokens:
        message = (
            f"prompt {longest} + max_tokens {max_tokens} = {total} tokens; the cache of this server holds "
            f"{engine.cache_tokens} tokens. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, "request_exceeds_cache", message, param=param)
    if options.sampling.get("min_tokens", 0) > max_tokens:
        least = options.sampling["min_tokens"]
        raise combination("min_tokens", f"min_tokens is {least}; expected at most max_tokens, which is {max_tokens}")
    reported = len(prompts) * options.n * max_tokens
    options.telemetry.check(reported + (sum(map(len, prompts)) if options.telemetry.prompt else 0))
    return SamplingParams(max_tokens=max_tokens, **options.sampling)
