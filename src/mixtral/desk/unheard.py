"""Things that nobody ever heard of: "book_gralin", "Book a gralin", "I would like to book a gralin for two people".

The desk has some twenty things, and a model that has learnt by heart what can be done with each of them says of
everything else that there is no function for it. So in part of the training documents things have invented words, the
same in the functions and in what the guest says: whether a function fits can then only be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mixtral.desk.invented import invented_word, pieced_word
from mixtral.desk.renamed import with_names
from mixtral.desk.source import Document, Source

__all__ = ["unheard"]

_STAYS = {"museum", "restaurant"}
"""Of these the guest speaks elsewhere too, by their names."""


def unheard(document: Document, source: Source, nouns: Mapping[str, str]) -> Document:
    """The document with invented words for part of its things, the same one wherever the thing is named.

    ``nouns`` has the word of the document's language for every thing, by its name in the functions.
    """
    asked = next(message["content"] for message in document.messages if message["role"] == "user")
    names = [tool["function"]["name"] for tool in document.tools]
    words: dict[str, str] = {}
    for thing, noun in nouns.items():
        if thing in _STAYS or not (any(thing in name.split("_") for name in names) or _found(noun).search(asked)):
            continue
        if source.chance(75):
            words[thing] = _fresh(source, {*words.values(), *nouns, asked})
    functions = {name: "_".join(words.get(part, part) for part in name.split("_")) for name in names}
    changed = with_names(document, functions, {name: {} for name in names})
    return replace(
        changed,
        tools=tuple(_described(tool, words) for tool in changed.tools),
        messages=tuple(_said(message, words, nouns) for message in changed.messages),
    )


def _fresh(source: Source, taken: set[str]) -> str:
    """A word in small letters that names of functions may have."""
    while True:
        word = (pieced_word(source) if source.chance(50) else invented_word(source)).lower()
        if word.isascii() and word.isalpha() and not any(word in other for other in taken):
            return word


def _found(noun: str) -> re.Pattern[str]:
    """The word, but not in "room 12", which is a place and not to be booked."""
    return re.compile(rf"\b{re.escape(noun)}\b(?! [0-9])")


def _described(tool: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """A function whose description names the thing of its own name, and not the room that a dish is brought to."""
    function = tool["function"]
    text: str = function["description"]
    for thing, word in words.items():
        if word in function["name"].split("_"):
            text = _found(thing).sub(word, text)
    return {**tool, "function": {**function, "description": text}}


def _said(message: Mapping[str, Any], words: Mapping[str, str], nouns: Mapping[str, str]) -> dict[str, Any]:
    """What the guest says; a German noun keeps its capital. The word is not looked for in what was put there."""
    if message["role"] != "user":
        return dict(message)
    things = {nouns[thing]: word for thing, word in words.items()}
    if not things:
        return dict(message)
    either = re.compile("|".join(_found(noun).pattern for noun in sorted(things)))
    text = either.sub(lambda at: _like(at.group(), things[at.group()]), message["content"])
    return {**message, "content": text}


def _like(noun: str, word: str) -> str:
    return word.capitalize() if noun[0].isupper() else word
