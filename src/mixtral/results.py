"""What the Python API gives back: answers, whole or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mixtral.tokenizer import TextStream, ToolCall
from mixtral.wire import Candidate, SamplingParams, TokenEvent

__all__ = ["ChatCompletion", "ChatDelta", "Completion", "Delta", "TokenLogprob", "Usage", "completion_of", "delta_of"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of the output, its raw log-probability, and the most likely tokens in its place."""

    id: int
    logprob: float
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to the answer of prompt ``sequence``. ``finish_reason`` is set on the last one."""

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: list[TokenLogprob] | None = None
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer. ``ids`` are all sampled tokens, the end token included; ``text`` ends before a stop string.

    ``text`` is empty for a model without tokenizer. The same call with the same ``seed`` gives the same answer; what is
    drawn for a prompt also depends on its place in the list.
    """

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    seed: int
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a conversation (control tokens included) and of its answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What one step added to an assistant turn. Calls come whole, on the last one, where ``finish_reason`` is set."""

    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """A finished assistant turn: text, or calls of the offered functions."""

    content: str
    tool_calls: list[ToolCall]
    finish_reason: Literal["stop", "length", "tool_calls"]
    usage: Usage


def delta_of(event: TokenEvent, text: TextStream | None) -> Delta:
    """Token event -> text that is now certain; a stop string ends the answer."""
    added, finish = "", event.finish_reason
    if text is not None:
        added = text.push(event.id)
        if finish is not None:
            added += text.finish()
        finish = "stop" if text.stopped else finish
    listed = None if event.logprob is None else [TokenLogprob(event.id, event.logprob, event.top)]
    return Delta(added, [event.id], finish, listed, event.sequence)


def completion_of(prompt: Sequence[int], deltas: Sequence[Delta], params: SamplingParams) -> Completion:
    """All deltas of one answer, as a whole. Raises RuntimeError if the last one does not end it."""
    finish = deltas[-1].finish_reason
    if finish is None or params.seed is None:
        raise RuntimeError("the answer has no end")
    logprobs = None if params.logprobs is None else [one for delta in deltas for one in delta.logprobs or ()]
    ids = [id for delta in deltas for id in delta.ids]
    return Completion("".join(delta.text for delta in deltas), ids, finish, len(prompt), params.seed, logprobs)
