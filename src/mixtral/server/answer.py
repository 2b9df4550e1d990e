"""Token events of one answer -> text, calls and log-probabilities. Streamed or not, the same pieces come out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mixtral.errors import MessagesError
from mixtral.server.errors import ApiError
from mixtral.tokenizer import TextStream, Tokenizer, ToolCall, parse_calls
from mixtral.wire import TokenEvent

__all__ = ["Answer", "Calls", "Finish", "Piece", "TokenText"]

Finish = Literal["stop", "length", "tool_calls"]
Calls = Literal["offered", "refused", "text"]


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of the answer: its bytes, the character of the answer at which it begins, and its event."""

    surface: bytes
    offset: int
    event: TokenEvent


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain with one event. ``tokens`` is empty unless log-probabilities were asked for."""

    text: str = ""
    tokens: tuple[TokenText, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    finish_reason: Finish | None = None


class Answer:
    """The growing answer to one prompt.

    ``calls`` says what ``[TOOL_CALLS]`` means: "offered" collects the rest and reads function calls from it, "refused"
    is an error (the request offers no functions, and calls must never be shown as text), "text" is for raw completions.
    ``continues``: the answer goes on with the prompt's last word or line, so its leading space is kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        calls: Calls = "text",
        continues: bool = False,
        salt: str = "",
    ) -> None:
        self.completion_tokens = 0
        self.finished = False
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, stop=stop, continues=continues)
        self._calls = calls
        self._control = None
        if calls != "text" and tokenizer.version != "v1":
            self._control = tokenizer.control_id("[TOOL_CALLS]")
        self._salt = salt
        self._call_ids: list[int] = []
        self._tokens: list[tuple[int, TokenText]] = []  # not yet given out; with the byte at which each begins
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sent = self._seen = self._characters = 0
        self._drops_space = not continues

    def push(self, event: TokenEvent) -> Piece:
        """What this event adds. Events after the finish add nothing.

        Raises:
            ApiError: 500 for calls that cannot be read or were not asked for.
        """
        if self.finished:
            return Piece()
        self.completion_tokens += 1
        if self._call_ids or event.id == self._control:
            return self._collect_call(event)
        text = self._text.push(event.id)
        if event.logprob is not None:
            self._note(event)
        finish: Finish | None = "stop" if self._text.stopped else event.finish_reason
        if finish and not self._text.stopped:
            text += self._text.finish()
            finish = "stop" if self._text.stopped else finish
        self.finished = finish is not None
        return Piece(text, self._release(text, last=finish is not None), finish_reason=finish)

    def _collect_call(self, event: TokenEvent) -> Piece:
        if self._calls == "refused":
            message = "the model answered with a function call, but the request allows none; offer tools, or ask again"
            raise ApiError(500, "unexpected_tool_calls", message, headers={"x-should-retry": "false"})
        text = "" if self._call_ids else self._text.finish()
        if self._text.stopped:
            self.finished = True
            return Piece(text, self._release(text, last=True), finish_reason="stop")
        self._call_ids.append(event.id)
        if event.logprob is not None:
            self._note(event)
        if event.finish_reason is None:
            return Piece(text, self._release(text, last=False))
        self.finished = True
        calls = self._read_calls(cut=event.finish_reason == "length")
        finish: Finish = "tool_calls" if event.finish_reason == "stop" else "length"
        return Piece(text, self._release(text, last=True), calls, finish)

    def _read_calls(self, *, cut: bool) -> tuple[ToolCall, ...]:
        try:
            return tuple(parse_calls(self._tokenizer, self._call_ids, salt=self._salt)[1])
        except MessagesError as error:
            if cut:  # finish_reason "length" says that something is missing
                return ()
            message = f"the model wrote function calls that cannot be read: {error}"
            raise ApiError(500, "invalid_tool_calls", message, headers={"x-should-retry": "false"}) from error

    def _note(self, event: TokenEvent) -> None:
        """Keep a token until the text it belongs to is given out. Control tokens have no text and are not listed."""
        surface = self._tokenizer.token_bytes(event.id)
        if not surface:
            return
        dropped = int(self._drops_space and event.id != 0 and surface.startswith(b" "))
        self._drops_space = False
        self._tokens.append((self._seen, TokenText(surface, self._characters, event)))
        self._seen += len(surface) - dropped
        self._characters += len(self._decoder.decode(surface)) - dropped

    def _release(self, text: str, *, last: bool) -> tuple[TokenText, ...]:
        """The tokens whose text has begun; at the end all of them, unless a stop string cut their text away."""
        self._sent += len(text.encode())
        everything = last and not self._text.stopped
        count = sum(1 for start, _ in self._tokens if everything or start < self._sent)
        out, self._tokens = self._tokens[:count], self._tokens[count:]
        return tuple(token for _, token in out)
