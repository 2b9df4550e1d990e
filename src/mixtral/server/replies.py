"""Answers in the OpenAI format: whole bodies and stream events, as plain dictionaries."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from mixtral.server.answer import Finish, Piece, TokenText
from mixtral.server.engine import Engine
from mixtral.tokenizer import CallDelta, Tokenizer
from mixtral.wire import Candidate

__all__ = ["ChatReply", "CompletionReply", "Reply", "usage"]


class Reply(Protocol):
    """The wire format of one route. ``head`` is in every event of a stream, ``whole_head`` in a whole body."""

    head: dict[str, Any]
    whole_head: dict[str, Any]

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first event's choice, if there is one."""
        ...

    def changes(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the events for one piece, one event each."""
        ...

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice in a whole body."""
        ...


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Token counts: all ids of the prompts, and every sampled token of every choice, end tokens included."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _head(prefix: str, engine: Engine, model: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": engine.fingerprint,
    }


class ChatReply:
    """``chat.completion`` and ``chat.completion.chunk`` objects of one answer of ``model``."""

    def __init__(self, engine: Engine, model: str, *, logprobs: bool) -> None:
        self.head = _head("chatcmpl", engine, model, "chat.completion.chunk")
        self.whole_head = self.head | {"object": "chat.completion"}
        self._tokenizer = engine.tokenizer
        self._logprobs = logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._change(index, {"role": "assistant", "content": ""}, ())

    def changes(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        made = []
        tokens = piece.tokens
        if piece.text:
            made.append(self._change(index, {"content": piece.text}, tokens))
            tokens = ()
        for call in piece.calls:
            made.append(self._change(index, {"tool_calls": [_call_change(call)]}, tokens))
            tokens = ()
        if piece.finish_reason or tokens:
            made.append(self._change(index, {}, tokens, piece.finish_reason))
        return made

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        calls = _calls(piece.calls)
        content = piece.text if piece.text or not calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._listed(piece.tokens) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _change(
        self, index: int, delta: dict[str, Any], tokens: Sequence[TokenText], finish: Finish | None = None
    ) -> dict[str, Any]:
        listed = self._listed(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": listed, "finish_reason": finish}

    def _listed(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        content = [
            self._token(token.surface, token.event.logprob)
            | {"top_logprobs": [self._token(self._tokenizer.token_bytes(c.id), c.logprob) for c in token.event.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, surface: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _readable(surface), "bytes": list(surface), "logprob": _finite(logprob)}


class CompletionReply:
    """``text_completion`` objects of one or more answers of ``model``."""

    def __init__(self, engine: Engine, model: str, *, logprobs: bool) -> None:
        self.head = self.whole_head = _head("cmpl", engine, model, "text_completion")
        self._tokenizer = engine.tokenizer
        self._logprobs = logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def changes(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.tokens or piece.finish_reason):
            return []
        return [self.choice(index, piece)]

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        listed = self._listed(piece.tokens) if self._logprobs else None
        return {"index": index, "text": piece.text, "logprobs": listed, "finish_reason": piece.finish_reason}

    def _listed(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.event.id) for token in tokens],
            "token_logprobs": [None if t.event.logprob is None else _finite(t.event.logprob) for t in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: TokenText) -> dict[str, float] | None:
        """The most likely tokens and the one that was chosen; of tokens that look alike, the likeliest."""
        if token.event.logprob is None:
            return None
        found: dict[str, float] = {}
        for candidate in (*token.event.top, Candidate(token.event.id, token.event.logprob)):
            found.setdefault(self._name(candidate.id), _finite(candidate.logprob))
        return found

    def _name(self, id: int) -> str:
        return _name(self._tokenizer, id)


def _name(tokenizer: Tokenizer, id: int) -> str:
    """The text of a token; control tokens have none and are shown by their name."""
    return _readable(tokenizer.token_bytes(id)) or tokenizer.piece(id)


def _call_change(call: CallDelta) -> dict[str, Any]:
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _calls(deltas: Sequence[CallDelta]) -> list[dict[str, Any]]:
    """Whole calls. Arguments are the model's own text, cut off where the answer was."""
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        arguments.setdefault(delta.index, []).append(delta.arguments)
    return [
        {
            "id": delta.id,
            "type": "function",
            "function": {"name": delta.name, "arguments": "".join(arguments[delta.index])},
        }
        for delta in deltas
        if delta.name
    ]


def _readable(surface: bytes) -> str:
    return surface.decode("utf-8", "replace")


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; the OpenAI API writes -9999."""
    return -9999.0 if logprob is None or not math.isfinite(logprob) else logprob
