"""Judges an answer to a document of the desk, for scores and for preference pairs."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from mixtral.desk.source import Document

__all__ = ["check", "is_formed", "languages_of", "number_of"]

_MARKED = re.compile(r"\s*(-?\d{1,18})(?!\d|[.,]\d)")
_INTEGER = re.compile(r"(?<![\w.,])-?\d{1,18}(?!\w|[.,]\d)")


def check(document: Document, text: str, calls: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Whether an answer fulfils everything that ``document.answer`` asks for: number, contains, json, calls, language.

    ``calls`` are ``{"name", "arguments"}`` or in the OpenAI form, arguments as an object or as JSON text. Calls that
    the document does not ask for make any answer wrong. ``contains`` is caseless in chats, and exact elsewhere.

    Raises:
        ValueError: the document asks for nothing that can be judged (a plain text).
    """
    wanted = document.answer
    known = {"number", "contains", "json", "calls", "language"}
    if not known & set(wanted):
        raise ValueError(
            f"a document of skill {document.skill!r} with answer {wanted!r}; expected one of {sorted(known)}"
        )
    if _plain_calls(calls) != _plain_calls(wanted.get("calls", ())):
        return False
    if "number" in wanted and number_of(text) != wanted["number"]:
        return False
    if "json" in wanted and _canonical(text) != json.dumps(wanted["json"], sort_keys=True):
        return False
    caseless = document.skill == "chat"
    if not all(_contains(text, part, caseless=caseless) for part in wanted.get("contains", ())):
        return False
    return "language" not in wanted or wanted["language"] in languages_of(text)


def is_formed(document: Document, text: str, calls: Sequence[Mapping[str, Any]] = ()) -> bool | None:
    """Whether an answer has the form that the document asks for, right or wrong: JSON text; or calls of functions on
    offer with an object as arguments. None if it asks for neither.
    """
    if "json" in document.answer:
        return _canonical(text) is not None
    if not document.answer.get("calls"):
        return None
    offered = {tool["function"]["name"] for tool in document.tools}
    made = _plain_calls(calls)
    return bool(made) and all(
        name in offered and (_canonical(arguments or "") or "").startswith("{") for name, arguments in made
    )


def languages_of(text: str) -> tuple[str, ...]:
    """The languages among en fr de es it with the most function words in ``text``: one, several if equal, or none."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    votes = {language: sum(word in known for word in words) for language, known in _words().items()}
    best = max(votes.values())
    return tuple(language for language, count in votes.items() if count == best) if best else ()


def number_of(text: str) -> int | None:
    """The integer after the last ``####``; in a text without that mark, the last integer."""
    _, mark, rest = text.rpartition("####")
    if mark:
        marked = _MARKED.match(rest)
        return int(marked[1]) if marked else None
    found = _INTEGER.findall(text)
    return int(found[-1]) if found else None


def _contains(text: str, part: str, *, caseless: bool) -> bool:
    """Whether ``part`` is in ``text`` as whole words; any white space equals any other.

    Caseless also takes a final s as an ending, for days: ``Mittwoch``, ``mittwochs``.
    """
    pattern = r"\s+".join(re.escape(word) for word in part.split())
    if caseless:
        return re.search(rf"(?<!\w){pattern}s?(?!\w)", text, re.IGNORECASE) is not None
    return re.search(rf"(?<!\w){pattern}(?!\w)", text) is not None


def _canonical(text: str) -> str | None:
    """JSON text with sorted keys, or None if it is not JSON."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _plain_calls(calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """Names and canonical arguments, sorted: the order of parallel calls does not matter."""
    plain = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        # Arguments that are not JSON stay as they are and equal nothing that a document asks for.
        plain.append((str(function.get("name")), _canonical(text) or text))
    return sorted(plain)


@cache
def _words() -> dict[str, frozenset[str]]:
    text = resources.files("mixtral.desk").joinpath("phrases/languages.toml").read_text(encoding="utf-8")
    return {language: frozenset(words.split()) for language, words in tomllib.loads(text).items()}
