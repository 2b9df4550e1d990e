"""Answers in the OpenAI format: whole bodies and stream events, as plain dictionaries."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from mixtral.server.answer import Finish, Piece, TokenText
from mixtral.tokenizer import Tokenizer

__all__ = ["ChatReply", "CompletionReply", "Reply", "usage"]


class Reply(Protocol):
    """The wire format of one route."""

    def opening(self) -> list[dict[str, Any]]:
        """Choices of the first event, or none."""
        ...

    def changes(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the events for one piece, one event each."""
        ...

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The choice in a whole body."""
        ...

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One stream event."""
        ...

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The whole body."""
        ...


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts: all ids of the prompts, and every sampled token, end tokens included."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class ChatReply:
    """``chat.completion`` and ``chat.completion.chunk`` objects of one answer."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self) -> list[dict[str, Any]]:
        return [self._change(0, {"role": "assistant", "content": ""}, ())]

    def changes(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        made = []
        tokens = piece.tokens
        if piece.text:
            made.append(self._change(index, {"content": piece.text}, tokens))
            tokens = ()
        for place, call in enumerate(piece.calls):
            head = {"index": place, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
            rest = {"index": place, "function": {"arguments": call.arguments}}
            made.append(self._change(index, {"tool_calls": [head]}, ()))
            made.append(self._change(index, {"tool_calls": [rest]}, ()))
        if piece.finish_reason or tokens:
            made.append(self._change(index, {}, tokens, piece.finish_reason))
        return made

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for piece in pieces
            for call in piece.calls
        ]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        tokens = [token for piece in pieces for token in piece.tokens]
        return {
            "index": index,
            "message": message,
            "logprobs": self._listed(tokens) if self._logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion", "choices": choices}

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
    """``text_completion`` objects of one or more answers."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self) -> list[dict[str, Any]]:
        return []

    def changes(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.tokens or piece.finish_reason):
            return []
        return [self._choice(index, piece.text, piece.tokens, piece.finish_reason)]

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        return self._choice(index, text, tokens, pieces[-1].finish_reason)

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def _choice(self, index: int, text: str, tokens: Sequence[TokenText], finish: Finish | None) -> dict[str, Any]:
        listed = self._listed(tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": listed, "finish_reason": finish}

    def _listed(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {
            "tokens": [_readable(token.surface) for token in tokens],
            "token_logprobs": [_finite(token.event.logprob) for token in tokens],
            "top_logprobs": [
                {_readable(self._tokenizer.token_bytes(c.id)): _finite(c.logprob) for c in token.event.top}
                for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }


def _readable(surface: bytes) -> str:
    return surface.decode("utf-8", "replace")


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; the OpenAI API writes -9999."""
    return -9999.0 if logprob is None or not math.isfinite(logprob) else logprob
