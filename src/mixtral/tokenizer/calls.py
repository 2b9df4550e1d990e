"""Function calls: reading the JSON list that a model writes after ``[TOOL_CALLS]``, and ids of 9 characters."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mixtral.errors import MessagesError
from mixtral.tokenizer.tokenizer import Tokenizer

__all__ = ["FUNCTION_NAME", "CallDelta", "CallReader", "ToolCall", "map_call_ids", "parse_calls"]

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # always with fullmatch: "$" would let a newline through
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_SPACES = " \t\r\n"
# Possessive: each character is looked at once.
_IN_STRING = re.compile(r'[^"\\]*+')
_IN_CONTAINER = re.compile(r'[^"\[\]{}]*+')
_IN_WORD = re.compile(r"[^ \t\r\n,\]}]*+")
_SHOWN = 200  # characters of a broken text in a message
_DIGITS = string.digits + string.ascii_letters


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call: ``id`` of 9 letters and digits, ``arguments`` as JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


def map_call_ids(ids: Iterable[str]) -> dict[str, str]:
    """Foreign call ids (``call_...``, UUIDs) -> 9 letters and digits each, by hash; ids that already fit are left out.

    Injective within one conversation: no two ids share a result, and no result equals an id that already fits. The
    result does not depend on the order of ``ids``.
    """
    distinct = sorted(set(ids))
    taken = {id for id in distinct if _CALL_ID.fullmatch(id)}
    mapped = {}
    for id in distinct:
        if not _CALL_ID.fullmatch(id):
            mapped[id] = _free_id(id, taken)
            taken.add(mapped[id])
    return mapped


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A call that begins (``id`` and ``name`` are set), or more characters of the arguments of call ``index``."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


class CallReader:
    """Reads ``[{"name": ..., "arguments": {...}}, ...]`` piece by piece, each character once.

    However the text is cut, the deltas joined per call are the same: a call begins as soon as its name is complete,
    then its arguments follow as they are written. Members may come in any order; others than these two have no effect.
    Arguments may also be JSON in a string, which comes out decoded and at once; without arguments they are ``{}``.
    The id of a call depends on ``salt`` and the place of the call alone. ``written_ids`` are those the model wrote.
    """

    def __init__(self, *, salt: str = "") -> None:
        self.written_ids: list[str | None] = []
        self._salt = salt
        self._ids: set[str] = set()
        self._shown = ""  # the start of the text, for messages
        self._expect: Callable[[str, int], int] = self._list
        self._out: list[CallDelta] = []
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False
        self._name = self._arguments = ""
        self._members: set[str] = set()

    def push(self, text: str) -> list[CallDelta]:
        """What these characters add. Raises MessagesError where they are no list of calls."""
        self._shown += text[: _SHOWN + 1 - len(self._shown)]
        self._out = []
        place = 0
        while place < len(text):
            place = self._expect(text, place)
        return self._out

    def finish(self) -> None:
        """The text has ended. Raises MessagesError if the list has not."""
        if self._expect != self._end:
            raise self._broken("not valid JSON: it ends too early")

    # Each of these reads at ``place`` and returns the place after that; ``_expect`` is the one whose turn it is.

    def _list(self, text: str, place: int) -> int:
        if text[place] in _SPACES:
            return place + 1
        if text[place] in '{"':
            raise self._broken("not a list")
        if text[place] != "[":
            raise self._broken("not valid JSON")
        self._expect = self._first_call
        return place + 1

    def _first_call(self, text: str, place: int) -> int:
        if text[place] == "]":
            raise self._broken("not a list with at least one call")
        return self._call(text, place)

    def _call(self, text: str, place: int) -> int:
        if text[place] in _SPACES:
            return place + 1
        if text[place] != "{":
            raise self._broken(f"call {len(self.written_ids)} has no name: it is not an object")
        self.written_ids.append(None)
        self._members, self._name, self._arguments = set(), "", ""
        self._expect = self._first_key
        return place + 1

    def _first_key(self, text: str, place: int) -> int:
        return self._close(place) if text[place] == "}" else self._next_key(text, place)

    def _next_key(self, text: str, place: int) -> int:
        if text[place] in _SPACES:
            return place + 1
        if text[place] != '"':
            raise self._broken("not valid JSON: a key is missing")
        self._key = ""
        self._expect = self._inside
        return place

    def _colon(self, text: str, place: int) -> int:
        if text[place] in _SPACES:
            return place + 1
        if text[place] != ":":
            raise self._broken('not valid JSON: a ":" is missing')
        self._expect = self._start
        return place + 1

    def _start(self, text: str, place: int) -> int:
        if text[place] in _SPACES:
            return place + 1
        if text[place] in ",:}]":
            raise self._broken("not valid JSON: a value is missing")
        self._expect = self._inside
        return place

    def _inside(self, text: str, place: int) -> int:
        """Inside a key or a value: a string, a container, or a word that ends before the next mark."""
        start, ended = place, False
        while place < len(text) and not ended:
            if self._escaped:
                self._escaped = False
                place += 1
            elif self._in_string:
                place = _until(_IN_STRING, text, place)
                if place < len(text):
                    self._in_string = text[place] == "\\"
                    self._escaped = self._in_string
                    place += 1
                    ended = not self._in_string and not self._depth
            elif not self._depth and text[place] not in '"[{':
                place = _until(_IN_WORD, text, place)
                ended = place < len(text)
            else:
                place = _until(_IN_CONTAINER, text, place)
                if place < len(text):
                    self._in_string = text[place] == '"'
                    self._depth += (text[place] in "[{") - (text[place] in "]}")
                    place += 1
                    ended = not self._in_string and not self._depth
        self._take(text[start:place])
        if ended:
            self._member()
        return place

    def _after_member(self, text: str, place: int) -> int:
        if text[place] == "}":
            return self._close(place)
        if text[place] not in _SPACES:
            if text[place] != ",":
                raise self._broken('not valid JSON: a "," is missing')
            self._expect = self._next_key
        return place + 1

    def _close(self, place: int) -> int:
        if not self._name:
            raise self._broken(f"call {len(self.written_ids) - 1} has no name")
        if "arguments" not in self._members:
            self._out.append(CallDelta(len(self.written_ids) - 1, "{}"))
        self._expect = self._after_call
        return place + 1

    def _after_call(self, text: str, place: int) -> int:
        if text[place] not in ",]" + _SPACES:
            raise self._broken('not valid JSON: a "," is missing')
        if text[place] not in _SPACES:
            self._expect = self._call if text[place] == "," else self._end
        return place + 1

    def _end(self, text: str, place: int) -> int:
        if text[place] not in _SPACES:
            raise self._broken("not valid JSON: something follows the list")
        return place + 1

    def _take(self, part: str) -> None:
        """More characters of the value. Those of an object of arguments are given out at once if the name is known."""
        self._value.append(part)
        if self._key != "arguments" or self._value[0][:1] != "{":
            return
        if self._name:
            self._out.append(CallDelta(len(self.written_ids) - 1, part))
        else:
            self._arguments += part

    def _member(self) -> None:
        """A key or a value is complete."""
        written, self._value = "".join(self._value), []
        try:
            value = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise self._broken(f"not valid JSON ({error})") from error
        if not self._key:
            if value in self._members:
                raise self._broken(f"call {len(self.written_ids) - 1} has two members of one name")
            self._members.add(value)
            # Keys are told from values by being without one; an empty key is a member like any other.
            self._key = value or "\0"
            self._expect = self._colon
            return
        self._expect = self._after_member
        if self._key == "name":
            self._begin(value)
        elif self._key == "arguments":
            self._argue(value)
        elif self._key == "id":
            self.written_ids[-1] = value if isinstance(value, str) else None

    def _begin(self, name: Any) -> None:
        place = len(self.written_ids) - 1
        if not isinstance(name, str):
            raise self._broken(f"call {place} has no name")
        if not FUNCTION_NAME.fullmatch(name):
            raise self._broken(f"the name of call {place} has other characters than letters, digits, _ and -")
        self._name = name
        id = _free_id(f"{self._salt}\x1f{place}", self._ids)
        self._ids.add(id)
        self._out.append(CallDelta(place, "", id, name))
        if self._arguments:
            self._out.append(CallDelta(place, self._arguments))

    def _argue(self, value: Any) -> None:
        place = len(self.written_ids) - 1
        if not isinstance(value, dict | str):
            raise self._broken(f"the arguments of call {place} are not a JSON object")
        if isinstance(value, str):
            if self._name:
                self._out.append(CallDelta(place, value))
            else:
                self._arguments = value

    def _broken(self, reason: str) -> MessagesError:
        shown = self._shown if len(self._shown) <= _SHOWN else self._shown[:_SHOWN] + "..."
        return MessagesError(
            f'the text after [TOOL_CALLS] is {reason}; expected [{{"name": ..., "arguments": {{...}}}}], got {shown!r}',
            code="invalid_tool_calls",
        )


def parse_calls(tokenizer: Tokenizer, ids: Sequence[int], *, salt: str = "") -> tuple[str, list[ToolCall]]:
    """The content before ``[TOOL_CALLS]`` and the calls after it, from the ids of one assistant turn.

    Without that control token (and always in v1) everything is content. Calls without an id of 9 letters and digits get
    one that depends on ``salt`` and the place of the call alone. ``arguments`` keep the model's own spelling.

    Raises:
        MessagesError: what follows ``[TOOL_CALLS]`` is no list of calls; the message shows the text.
    """
    if tokenizer.version == "v1" or (control := tokenizer.control_id("[TOOL_CALLS]")) not in ids:
        return tokenizer.decode(ids), []
    place = list(ids).index(control)
    reader = CallReader(salt=salt)
    deltas = reader.push(tokenizer.decode(ids[place + 1 :]))
    reader.finish()
    arguments = [""] * len(reader.written_ids)
    for delta in deltas:
        arguments[delta.index] += delta.arguments
    taken: set[str] = set()
    calls = []
    for begun, written in zip((delta for delta in deltas if delta.name), reader.written_ids, strict=True):
        usable = written is not None and _CALL_ID.fullmatch(written) and written not in taken
        id = written if written is not None and usable else _free_id(f"{salt}\x1f{begun.index}", taken)
        taken.add(id)
        calls.append(ToolCall(id, begun.name, arguments[begun.index]))
    return tokenizer.decode(ids[:place]), calls


def _until(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


def _free_id(text: str, taken: set[str]) -> str:
    """9 base-62 characters of a hash of ``text``; the first of its sequence that is not taken."""
    turn = 0
    while True:
        digest = hashlib.sha256(f"{turn}\x1f{text}".encode("utf-8", "surrogatepass")).digest()
        number = int.from_bytes(digest, "big")
        characters = []
        for _ in range(9):
            number, digit = divmod(number, 62)
            characters.append(_DIGITS[digit])
        if (id := "".join(characters)) not in taken:
            return id
        turn += 1
