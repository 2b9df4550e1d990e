"""Copying as such: lists of words that nobody knows to repeat, values to look up by their keys, and letters of words.

Every skill of the desk copies names, codes and numbers out of what was said. Here that is all there is to do, with
words of any pieces, so it is learnt for all of them and not for those that the town knows.
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from importlib import resources
from typing import Any

from mixtral.desk import world
from mixtral.desk.invented import invented_word, pieced_word
from mixtral.desk.source import SPLITS, Document, Source, Split
from mixtral.desk.world import LANGUAGES, draw

__all__ = ["SUITES", "copies"]

SUITES: tuple[str, ...] = ("copies/lists", "copies/pairs", "copies/letters")
_LETTERS = "abcdefghijklmnopqrstuvwxyzäöüéèñç"
_BETWEEN = (", ", " ", "; ", "\n", " / ")
_PAIRS = ((": ", "\n"), (" = ", ", "), (" - ", "\n"), (": ", "; "))


def copies(seed: int, split: Split, number: int) -> Document:
    """A list to repeat, keys whose values are asked for, or words to spell; ``answer`` is ``{"contains": [...]}``.

    Some are to be written as JSON, or are JSON and to be written without it: a word in quotes has other tokens. Which
    letters a token has is nowhere to be seen, so some words are to be spelled, or put together from their letters.
    """
    source = Source("copies", seed, split, number)
    language = source.pick(LANGUAGES)
    place = source.below(10)
    return (_list if place < 4 else _table if place < 8 else _letters)(source, split, language)


def _list(source: Source, split: Split, language: str) -> Document:
    words = _words(source, split, source.between(3, 24))
    plain, quoted = source.pick(_BETWEEN).join(words), json.dumps(words, ensure_ascii=False)
    match source.below(10):
        case 0 | 1 | 2 | 3:
            kind, given, reply = "as_json", plain, quoted
        case 4:
            kind, given, reply = "no_json", quoted, ", ".join(words)
        case _:
            kind, given, reply = "repeat", plain, plain
    asked = source.pick(_phrases()[language][kind])
    return _document("copies/lists", language, f"{asked} {given}", reply)


def _table(source: Source, split: Split, language: str) -> Document:
    words = _words(source, split, 2 * source.between(3, 14))
    keys, values = words[: len(words) // 2], words[len(words) // 2 :]
    middle, between = source.pick(_PAIRS)
    table = between.join(f"{key}{middle}{value}" for key, value in zip(keys, values, strict=True))
    places = source.sample(range(len(keys)), source.between(1, min(6, len(keys))))
    asked = [keys[place] for place in places]
    if source.chance(30):
        question = f"{', '.join(asked)}: JSON?"
        reply = json.dumps({keys[place]: values[place] for place in places}, ensure_ascii=False)
    else:
        question, reply = ", ".join(asked) + "?", ", ".join(values[place] for place in places)
    parts = [table, question] if source.chance(70) else [question, table]
    return _document("copies/pairs", language, "\n\n".join(parts), reply)


def _letters(source: Source, split: Split, language: str) -> Document:
    words = _words(source, split, source.between(1, 6))
    spelled, whole = ", ".join("-".join(word) for word in words), ", ".join(words)
    quoted = json.dumps(words, ensure_ascii=False)
    kind, given, reply = source.pick(
        (
            ("spell", whole, spelled),
            ("spell", quoted, spelled),
            ("join", spelled, whole),
            ("join_json", spelled, quoted),
        )
    )
    asked = source.pick(_phrases()[language][kind])
    return _document("copies/letters", language, f"{asked} {given}", reply)


def _words(source: Source, split: Split, count: int) -> list[str]:
    """Different words, none with white space or punctuation in it; in a third of the documents easy ones alone."""
    found: list[str] = []
    kinds = 4 if source.chance(33) else 10
    while len(found) < count:
        word = _word(source, split, source.below(kinds))
        if word not in found and word not in _of_others(split):
            found.append(word)
    return found


@cache
def _of_others(split: Split) -> frozenset[str]:
    """Values of the other splits that are no numbers: pieces could be put together to one of them."""
    others = [other for other in SPLITS if other != split]
    items = (item for name in world.INVENTORIES for other in others for item in world.items(name, other))
    return frozenset(item for item in items if not item.isdigit())


def _word(source: Source, split: Split, kind: int) -> str:
    if kind < 2:
        return str(source.below(1000))
    if kind < 4:
        return draw(source.pick(("first_name", "last_name", "city", "room")), source, split)
    if kind < 6:
        word = "".join(source.pick(_LETTERS) for _ in range(source.between(2, 5)))
    elif kind < 7:
        word = invented_word(source)
    else:
        return pieced_word(source)
    return word.capitalize() if source.chance(50) else word


def _document(suite: str, language: str, question: str, reply: str) -> Document:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": reply})
    return Document("copies", suite, language, messages=messages, answer={"contains": [reply]})


@cache
def _phrases() -> dict[str, Any]:
    text = resources.files("mixtral.desk").joinpath("phrases/notes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
