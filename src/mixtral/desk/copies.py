"""Copying as such: lists of words that nobody knows to repeat, and values to look up by their keys.

Every skill of the desk copies names, codes and numbers out of what was said. Here that is all there is to do, with
words of any pieces, so it is learnt for all of them and not for those that the town knows.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from mixtral.desk.invented import invented_word
from mixtral.desk.source import Document, Source, Split
from mixtral.desk.world import LANGUAGES, draw

__all__ = ["SUITES", "copies"]

SUITES: tuple[str, ...] = ("copies/lists", "copies/pairs")
_LETTERS = "abcdefghijklmnopqrstuvwxyzäöüéèñç"
_BETWEEN = (", ", " ", "; ", "\n", " / ")
_PAIRS = ((": ", "\n"), (" = ", ", "), (" - ", "\n"), (": ", "; "))


def copies(seed: int, split: Split, number: int) -> Document:
    """A list to repeat, or keys whose values are asked for; ``answer`` is ``{"contains": [...]}``."""
    source = Source("copies", seed, split, number)
    language = source.pick(LANGUAGES)
    if source.chance(50):
        words = _words(source, split, source.between(3, 24))
        between = source.pick(_BETWEEN)
        reply = between.join(words)
        asked = source.pick(_phrases()[language]["repeat"])
        return _document("copies/lists", language, f"{asked} {reply}", reply)
    words = _words(source, split, 2 * source.between(3, 14))
    keys, values = words[: len(words) // 2], words[len(words) // 2 :]
    middle, between = source.pick(_PAIRS)
    table = between.join(f"{key}{middle}{value}" for key, value in zip(keys, values, strict=True))
    places = source.sample(range(len(keys)), source.between(1, min(6, len(keys))))
    question = ", ".join(keys[place] for place in places) + "?"
    parts = [table, question] if source.chance(70) else [question, table]
    return _document("copies/pairs", language, "\n\n".join(parts), ", ".join(values[place] for place in places))


def _words(source: Source, split: Split, count: int) -> list[str]:
    """Different words, none with white space or punctuation in it; in half of the documents easy ones alone."""
    found: list[str] = []
    kinds = 4 if source.chance(50) else 10
    while len(found) < count:
        word = _word(source, split, source.below(kinds))
        if word not in found:
            found.append(word)
    return found


def _word(source: Source, split: Split, kind: int) -> str:
    if kind < 2:
        return str(source.below(1000))
    if kind < 4:
        return draw(source.pick(("first_name", "last_name", "city", "room")), source, split)
    if kind < 6:
        word = "".join(source.pick(_LETTERS) for _ in range(source.between(2, 5)))
    else:
        word = invented_word(source)
    return word.capitalize() if source.chance(50) else word


def _document(suite: str, language: str, question: str, reply: str) -> Document:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": reply})
    return Document("copies", suite, language, messages=messages, answer={"contains": [reply]})


@cache
def _phrases() -> dict[str, Any]:
    text = resources.files("mixtral.desk").joinpath("phrases/notes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
