"""Ids in, text out: never half a character, and stop strings are found across tokens and cut."""

from __future__ import annotations

from collections.abc import Sequence

from mixtral.errors import RequestError
from mixtral.tokenizer.tokenizer import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """Text of a growing list of ids. All returned pieces joined equal ``tokenizer.decode`` of all ids.

    With ``stop`` strings, the text ends before the first place where one of them begins; text that may still become one
    is held back. ``continues=True`` keeps the leading space of the first token, for ids that continue another text.

    Example: with ``stop=["\\n\\n"]``, the tokens ``Yes`` ``.`` ``\\n`` ``\\n`` ``No`` give ``Yes``, ``.``, nothing,
    nothing (``stopped`` is True from here on), nothing.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), continues: bool = False) -> None:
        for place, text in enumerate(stop):
            if not text:
                raise RequestError(f"stop[{place}] is empty; expected at least one character", param=f"stop[{place}]")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._at_start = not continues
        self._bytes = b""  # of a character that is not complete
        self._held = ""  # text that may be part of a stop string

    def push(self, id: int) -> str:
        """Text that is certain after this id ("" if none). Raises TokenizerError for an id outside the vocabulary."""
        surface = self._tokenizer.token_bytes(id)
        if self._tokenizer.is_byte(id):
            self._bytes += surface
            text, self._bytes = _complete(self._bytes)
            self._at_start = self._at_start and not text
            return self._release(text)
        broken, self._bytes = "\ufffd" * len(self._bytes), b""
        text = surface.decode()
        if broken:
            self._at_start = False
        if surface and self._at_start:
            # SentencePiece drops one space at the start of a text, but not the one of " ⁇ " for <unk>.
            text = text.removeprefix(" ") if id else text
            self._at_start = False
        return self._release(broken + text)

    def finish(self) -> str:
        """What was held back: bytes that never became a character are U+FFFD each. The last call on a stream."""
        text, self._bytes = "\ufffd" * len(self._bytes), b""
        return self._release(text, last=True)

    def _release(self, text: str, *, last: bool = False) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = min((place for word in self._stop if (place := self._held.find(word)) >= 0), default=len(self._held))
        certain = found if last else min(found, self._first_possible())
        if certain == found < len(self._held):
            self.stopped = True
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def _first_possible(self) -> int:
        """The first place of the held text from which its rest is the beginning of a stop string."""
        longest = max(len(word) for word in self._stop) - 1
        for place in range(max(0, len(self._held) - longest), len(self._held)):
            rest = self._held[place:]
            if any(len(rest) < len(word) and word.startswith(rest) for word in self._stop):
                return place
        return len(self._held)


def _complete(waiting: bytes) -> tuple[str, bytes]:
    """The characters at the start of ``waiting`` and the bytes that may still become one; a wrong byte is U+FFFD."""
    text = ""
    while waiting:
        size = _size(waiting[0])
        try:
            text += waiting[:size].decode()
            waiting = waiting[size:]
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and len(waiting) < size:
                break
            text += "\ufffd"
            waiting = waiting[1:]
    return text, waiting


def _size(lead: int) -> int:
    """Length of the UTF-8 sequence that a byte begins (1 for bytes that begin none)."""
    return 4 if 0xF0 <= lead <= 0xF4 else 3 if 0xE0 <= lead <= 0xEF else 2 if 0xC2 <= lead <= 0xDF else 1
