"""What the Python API gives back: answers, whole or in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mixtral.tokenizer import ToolCall
from mixtral.wire import Candidate

__all__ = ["ChatCompletion", "ChatDelta", "Completion", "Delta", "TokenLogprob", "Usage"]


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
