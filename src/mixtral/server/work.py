"""From a checked request to token ids, and from the engine's events to an answer, streamed or whole."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from mixtral.errors import MixtralError
from mixtral.server.admission import Admission, AdmittedRun
from mixtral.server.answer import Answer, Piece
from mixtral.server.engine import Engine
from mixtral.server.errors import ApiError
from mixtral.server.protocol import ChatRequest, CompletionRequest, Options
from mixtral.server.replies import ChatReply, CompletionReply, Reply, usage
from mixtral.server.sse import DONE, WAIT, frame
from mixtral.tokenizer import encode_chat
from mixtral.wire import Done, SamplingParams, Started, Submit, Tokens

__all__ = ["Work", "collect", "prepare_chat", "prepare_completion", "stream"]

_CHAT_TOKENS = 4096
_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is ready for the engine: one prompt and one growing answer per choice."""

    prompts: list[list[int]]
    params: SamplingParams
    answers: list[Answer]
    reply: Reply
    include_usage: bool

    def submit(self) -> Submit:
        """The message for the engine. Its id is ours, so that no two requests share one."""
        return Submit(request=uuid.uuid4().hex, prompts=self.prompts, params=self.params)

    def usage(self) -> dict[str, int]:
        """Token counts so far."""
        return usage(sum(map(len, self.prompts)), sum(answer.completion_tokens for answer in self.answers))


def prepare_chat(engine: Engine, request: ChatRequest) -> Work:
    """Encode a conversation. Raises MessagesError, or CapacityError or ApiError when it does not fit the context."""
    options, tokenizer = request.options, engine.tokenizer
    ids = encode_chat(tokenizer, request.messages, request.tools or None, max_tokens=engine.context).ids
    most = min(max(engine.context - len(ids), 1), _CHAT_TOKENS)
    params = _with_max_tokens(options, len(ids), most, engine.context, "messages")
    answer = Answer(
        tokenizer,
        stop=options.stop,
        calls="offered" if request.tools else "refused",
        continues=request.messages[-1]["role"] == "assistant",
        salt=hashlib.sha256(repr(ids).encode()).hexdigest(),
    )
    reply = ChatReply(engine.name, tokenizer, logprobs=params.logprobs is not None)
    return Work([ids], params, [answer], reply, options.include_usage)


def prepare_completion(engine: Engine, request: CompletionRequest) -> Work:
    """Encode the prompts, each with BOS if it is text. Raises ApiError when they do not fit."""
    options, tokenizer = request.options, engine.tokenizer
    prompts = [
        tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt) for prompt in request.prompts
    ]
    longest = max(map(len, prompts))
    params = _with_max_tokens(options, longest, _COMPLETION_TOKENS, engine.context, "prompt")
    answers = [Answer(tokenizer, stop=options.stop, continues=True) for _ in prompts]
    reply = CompletionReply(engine.name, tokenizer, logprobs=params.logprobs is not None)
    return Work(prompts, params, answers, reply, options.include_usage)


async def collect(door: Admission, work: Work) -> dict[str, Any]:
    """The whole body of an answer. Raises ApiError, or what the engine raises."""
    pieces: list[list[Piece]] = [[] for _ in work.answers]
    async with door.run(work.submit()) as run:
        await _start(run)
        async for index, piece in _pieces(run, work):
            if index >= 0:
                pieces[index].append(piece)
    choices = [work.reply.choice(index, found) for index, found in enumerate(pieces)]
    return {**work.reply.whole(choices), "usage": work.usage()}


async def stream(door: Admission, work: Work) -> AsyncGenerator[bytes, None]:
    """The frames of an answer, the first of them (perhaps empty) as soon as the request leaves the queue."""
    reply = work.reply
    note = {"usage": None} if work.include_usage else {}
    async with door.run(work.submit()) as run:
        await _start(run)
        opening = reply.opening()
        yield frame(reply.event(opening) | note) if opening else b""
        async for index, piece in _pieces(run, work):
            if index < 0:
                yield WAIT
                continue
            for choice in reply.changes(index, piece):
                yield frame(reply.event([choice]) | note)
    if work.include_usage:
        yield frame(reply.event([]) | {"usage": work.usage()})
    yield DONE


async def _start(run: AdmittedRun) -> Started:
    """Wait until the request leaves the queue."""
    async for update in run:
        if isinstance(update, Started):
            return update
    raise MixtralError("the engine ended before it began; expected the update Started")


async def _pieces(run: AdmittedRun, work: Work) -> AsyncGenerator[tuple[int, Piece], None]:
    """Index and piece of every token until all answers are finished; index -1 for a pause."""
    async for update in run:
        if update is None:
            yield -1, Piece()
        elif isinstance(update, Tokens):
            for event in update.events:
                yield event.sequence, work.answers[event.sequence].push(event)
            if all(answer.finished for answer in work.answers):
                return
        elif isinstance(update, Done):
            break
    raise MixtralError(
        "the engine ended before all answers were finished; expected an event with a finish_reason for each"
    )


def _with_max_tokens(options: Options, prompt_tokens: int, default: int, context: int, param: str) -> SamplingParams:
    max_tokens = default if options.max_tokens is None else options.max_tokens
    if prompt_tokens + max_tokens > context:
        message = (
            f"prompt {prompt_tokens} + max_tokens {max_tokens} = {prompt_tokens + max_tokens} tokens; the context of "
            f"this model is {context} tokens. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, "context_length_exceeded", message, param=param)
    return SamplingParams(max_tokens=max_tokens, **options.sampling)
