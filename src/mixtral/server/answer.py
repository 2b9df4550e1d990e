"""Token events of one answer -> text, calls and log-probabilities. Streamed or not, the same pieces come out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from mixtral.errors import MessagesError
from mixtral.server.errors import ApiError
from mixtral.tokenizer import CallDelta, CallReader, TextStream, Tokenizer
from mixtral.wire import PromptToken, TokenEvent

__all__ = ["Answer", "Calls", "Finish", "Piece", "Spelling", "TokenText", "echo", "joined"]

Finish = Literal["stop", "length", "tool_calls"]
Calls = Literal["offered", "refused", "text"]


class TokenText(msgspec.Struct, frozen=True):
    """One token of the answer: its bytes, the character of the answer at which it begins, and its event."""

    surface: bytes
    offset: int
    event: TokenEvent | PromptToken


class Piece(msgspec.Struct, frozen=True):
    """What became certain with one event. ``tokens`` is empty unless log-probabilities were asked for."""

    text: str = ""
    tokens: tuple[TokenText, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    finish_reason: Finish | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one answer that follow each other, as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(call for piece in pieces for call in piece.calls),
        pieces[-1].finish_reason,
    )


def echo(tokenizer: Tokenizer, prompt: str | Sequence[int], scored: Sequence[PromptToken]) -> Piece:
    """A prompt as the beginning of its answer. ``scored`` lists its tokens, or none of them."""
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    spelling = Spelling(tokenizer, drops_space=True)
    return Piece(text, tuple(spelling.add(token) for token in scored))


@dataclass(slots=True)
class Spelling:
    """Bytes and characters of the tokens of one text, and where each begins."""

    tokenizer: Tokenizer
    drops_space: bool
    bytes: int = 0
    characters: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def add(self, event: TokenEvent | PromptToken) -> TokenText:
        """The next token."""
        surface = self.tokenizer.token_bytes(event.id)
        token = TokenText(surface, self.characters, event)
        if surface:
            dropped = int(self.drops_space and event.id != 0 and surface.startswith(b" "))
            self.drops_space = False
            self.bytes += len(surface) - dropped
            self.characters += len(self._decoder.decode(surface)) - dropped
        return token


class Answer:
    """The growing answer to one prompt.

    ``calls`` says what ``[TOOL_CALLS]`` means: "offered" reads function calls from what follows, "refused" is an error
    (the request allows no calls, and calls must never be shown as text), "text" is for raw completions.
    ``continues``: the answer goes on with the prompt's last word or line, so its leading space is kept; ``offset``
    characters of it come before. ``salt`` makes the ids of calls. Control tokens have no text; their log-probabilities
    are listed in raw completions only.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        calls: Calls = "text",
        continues: bool = False,
        offset: int = 0,
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
        self._reader: CallReader | None = None
        self._call_text = TextStream(tokenizer)
        self._scored = False  # log-probabilities come with the tokens
        self._tokens: list[tuple[int, TokenText]] = []  # not yet given out; with the byte at which each begins
        self._spelling = Spelling(tokenizer, drops_space=not continues, characters=offset)
        self._sent = 0

    def push(self, event: TokenEvent) -> Piece:
        """What this event adds. Events after the finish add nothing.

        Raises:
            ApiError: 500 for calls that cannot be read or were not asked for.
        """
        if self.finished:
            return Piece()
        self.completion_tokens += 1
        if self._reader is not None or event.id == self._control:
            return self._push_call(event)
        text = self._text.push(event.id)
        self._note(event)
        finish: Finish | None = "stop" if self._text.stopped else event.finish_reason
        if finish and not self._text.stopped:
            text += self._text.finish()
            finish = "stop" if self._text.stopped else finish
        self.finished = finish is not None
        return Piece(text, self._release(text, last=finish is not None), finish_reason=finish)

    def end(self) -> Piece:
        """The end of an answer of no tokens."""
        self.finished = True
        return Piece(finish_reason="length")

    def _push_call(self, event: TokenEvent) -> Piece:
        if self._calls == "refused":
            message = "the model answered with a function call, but the request allows none; offer tools, or ask again"
            raise ApiError(500, "unexpected_tool_calls", message, headers={"x-should-retry": "false"})
        text = ""
        if self._reader is None:
            text = self._text.finish()
            if self._text.stopped:
                self.finished = True
                return Piece(text, self._release(text, last=True), finish_reason="stop")
            self._reader = CallReader(salt=self._salt)
        self._note(event)
        calls = self._read_calls(self._reader, event)
        self.finished = event.finish_reason is not None
        finish: Finish | None = "tool_calls" if event.finish_reason == "stop" else event.finish_reason
        return Piece(text, self._release(text, last=True), tuple(calls), finish)

    def _read_calls(self, reader: CallReader, event: TokenEvent) -> list[CallDelta]:
        written = self._call_text.push(event.id)
        if event.finish_reason == "stop":
            written += self._call_text.finish()
        try:
            deltas = reader.push(written)
            if event.finish_reason == "stop":
                reader.finish()
        except MessagesError as error:
            message = f"the model wrote function calls that cannot be read: {error}"
            raise ApiError(500, "invalid_tool_calls", message, headers={"x-should-retry": "false"}) from error
        return deltas

    def _note(self, event: TokenEvent) -> None:
        """Keep a token until the text it belongs to is given out."""
        if event.logprob is None:
            return
        self._scored = True
        if self._calls == "text" or self._tokenizer.token_bytes(event.id):
            start = self._spelling.bytes
            self._tokens.append((start, self._spelling.add(event)))

    def _release(self, text: str, *, last: bool) -> tuple[TokenText, ...]:
        """The tokens whose text has begun; at the end all of them, unless a stop string cut their text away."""
        if not self._scored:
            return ()
        self._sent += len(text.encode())
        everything = last and not self._text.stopped
        count = sum(1 for start, _ in self._tokens if everything or start < self._sent)
        out, self._tokens = self._tokens[:count], self._tokens[count:]
        return tuple(token for _, token in out)
