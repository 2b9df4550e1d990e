"""Function calls: reading the JSON list that a model writes after ``[TOOL_CALLS]``, and call ids of 9 characters."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mixtral.errors import MessagesError
from mixtral.tokenizer.tokenizer import Tokenizer

__all__ = ["FUNCTION_NAME", "ToolCall", "map_call_ids", "parse_calls"]

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # always with fullmatch: "$" would let a newline through
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_SPACE = re.compile(r"[ \t\r\n]*")
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


def parse_calls(tokenizer: Tokenizer, ids: Sequence[int], *, salt: str = "") -> tuple[str, list[ToolCall]]:
    """The content before ``[TOOL_CALLS]`` and the calls after it, from the ids of one assistant turn.

    Without that control token (and always in v1) everything is content. Calls without an id of 9 letters and digits get
    one that depends on ``salt``, the call and its place alone. ``arguments`` keep the model's own spelling.

    Raises:
        MessagesError: what follows ``[TOOL_CALLS]`` is no list of calls; the message shows the text.
    """
    if tokenizer.version == "v1" or (control := tokenizer.control_id("[TOOL_CALLS]")) not in ids:
        return tokenizer.decode(ids), []
    place = list(ids).index(control)
    return tokenizer.decode(ids[:place]), _read_list(tokenizer.decode(ids[place + 1 :]), salt)


def _read_list(text: str, salt: str) -> list[ToolCall]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(text, f"not valid JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise _broken(text, "not a list with at least one call")
    taken: set[str] = set()
    calls = []
    for place, (entry, written) in enumerate(zip(entries, _written_members(text, len(entries)), strict=True)):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise _broken(text, f"call {place} has no name")
        if not FUNCTION_NAME.fullmatch(entry["name"]):
            raise _broken(text, f"the name of call {place} has other characters than letters, digits, _ and -")
        arguments = entry.get("arguments", {})
        if not isinstance(arguments, dict | str):
            raise _broken(text, f"the arguments of call {place} are not a JSON object")
        spelled = arguments if isinstance(arguments, str) else written.get("arguments", "{}")
        id = entry.get("id")
        if not isinstance(id, str) or not _CALL_ID.fullmatch(id) or id in taken:
            id = _free_id("\x1f".join((salt, str(place), entry["name"], spelled)), taken)
        taken.add(id)
        calls.append(ToolCall(id, entry["name"], spelled))
    return calls


def _written_members(text: str, count: int) -> list[dict[str, str]]:
    """For each object in a valid JSON list: key -> the characters of its value. Other entries give an empty mapping."""
    decoder = json.JSONDecoder()

    def skip(place: int) -> int:
        match = _SPACE.match(text, place)
        return match.end() if match else place

    def value_end(place: int) -> tuple[Any, int]:
        value, end = decoder.raw_decode(text, place)
        return value, skip(end)

    found = []
    place = skip(0)
    for _ in range(count):
        place = skip(place + 1)  # past "[" or ","
        entry, after = value_end(place)
        members: dict[str, str] = {}
        if isinstance(entry, dict) and entry:
            while text[place] != "}":
                key, colon = value_end(skip(place + 1))
                start = skip(colon + 1)
                end = decoder.raw_decode(text, start)[1]
                members[key] = text[start:end]
                place = skip(end)
        found.append(members)
        place = after
    return found


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


def _broken(text: str, reason: str) -> MessagesError:
    shown = text if len(text) <= 200 else text[:200] + "..."
    return MessagesError(
        f'the text after [TOOL_CALLS] is {reason}; expected [{{"name": ..., "arguments": {{...}}}}], got {shown!r}',
        code="invalid_tool_calls",
    )
