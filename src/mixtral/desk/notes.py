"""Notes of the day with a question about one or two of them, lists to copy, and short stories of the town.

The value asked for is copied word for word from the notes. In training, long notes are asked about in several turns.
In held-out documents the note that is asked about is made of held-out names and values only; the notes around it are
mixed. Sizes are in characters, at 1.8 to 2.4 per token.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from mixtral.desk.source import Document, Source, Split, split_of
from mixtral.desk.words import forms, price
from mixtral.desk.world import HOTEL, LANGUAGES, TOWN, Language, draw, facts_of

__all__ = ["SUITES", "notes", "story"]

SUITES: tuple[str, ...] = ("notes/short", "notes/512", "notes/1024", "notes/2048", "notes/4096", "notes/copy")
_SIZES = {
    "notes/short": (130, 350),
    "notes/512": (650, 820),
    "notes/1024": (1300, 1800),
    "notes/2048": (3000, 3700),
    "notes/4096": (6000, 7400),
}
_KEYS = ("name", "room", "locker")
_NAMES = ("first_name", "last_name")
_LISTS = ("last_name", "phone", "time", "room", "first_name")


def notes(seed: int, split: Split, number: int) -> Document:
    """One document of notes, or of a list to copy; ``answer`` is ``{"contains": [...]}``."""
    source = Source("notes", seed, split, number)
    language: Language = "en" if source.chance(40) else source.pick(LANGUAGES[1:])
    suite = _suite(source, split)
    if suite == "notes/copy":
        return _copy(source, split, language)
    low, high = _SIZES[suite]
    size = source.between(low, high)
    phrases = _phrases()[language]
    turns = [2 if source.chance(20) else 1 for _ in range(_turns(source, split, size))]
    questions, wanted, lines = [], [], []
    used: set[str] = set()
    crowd = _crowd(source, split)
    for _ in range(sum(turns)):
        template, slots = _fact(source, split, phrases, used, crowd)
        place = 1 + 2 * source.below(len(template) // 2)
        lines.append(_fill(template[0], slots))
        questions.append(_fill(template[place], slots))
        wanted.append(slots[template[place + 1]])
    while len(lines) < 3 or sum(map(len, lines)) < size:
        template, slots = _fact(source, split if source.chance(50) else "train", phrases, used, crowd)
        lines.append(_fill(template[0], slots))
    lines = source.shuffled(lines)
    body = ". ".join(lines) + "." if source.chance(25) else "\n".join(f"- {line}" for line in lines)
    text = f"{source.pick(phrases['head'])}\n{body}\n\n"
    talk, past = [], 0
    for asked in turns:
        these = slice(past, past + asked)
        talk += [text + " ".join(questions[these]), ", ".join(wanted[these])]
        text, past = "", past + asked
    return _document(suite, language, talk, wanted[-turns[-1] :])


def story(seed: int, split: Split, number: int) -> Document:
    """One short plain text about a visitor, made of the facts of the town; skill ``story``, 40 to 120 words."""
    source = Source("story", seed, split, number)
    language = source.pick(LANGUAGES)
    hours = source.pick(facts_of("hours"))
    train, kitchen = source.pick(facts_of("train")), source.pick(facts_of("cuisine"))
    (where,) = (fact for fact in facts_of("where") if fact.subject == hours.subject)
    (ticket,) = (fact for fact in facts_of("ticket") if fact.subject == hours.subject)
    the = forms("place", hours.subject, language)["the"]
    slots = {
        "name": draw("first_name", source, split),
        "town": TOWN,
        "hotel": HOTEL,
        "city": train.subject,
        "the": the,
        "The": the[0].upper() + the[1:],
        "ticket": price(ticket.values["ticket_price"], language),
        "rstreet": kitchen.values["street"],
        "restaurant": kitchen.values["restaurant"],
        **where.values,
        **hours.values,
        **train.values,
    }
    lines = [source.pick(part["line"]) for part in _phrases()[language]["story"]]
    return Document("story", "story", language, text=" ".join(_fill(line, slots) for line in lines))


def _suite(source: Source, split: Split) -> str:
    if split != "train":
        return source.pick(SUITES)
    if source.chance(20):
        return "notes/copy"
    place = source.below(100)  # longer notes than these are never trained
    return "notes/short" if place < 40 else "notes/512" if place < 64 else "notes/1024" if place < 83 else "notes/2048"


def _turns(source: Source, split: Split, size: int) -> int:
    """How often notes of ``size`` characters are asked about: held-out ones once, long ones of training more often."""
    return source.between(1, 1 + size // 300) if split == "train" else 1


def _document(suite: str, language: str, talk: list[str], wanted: list[str]) -> Document:
    """``talk`` is what the user and the assistant say, in turns."""
    messages = tuple({"role": ("user", "assistant")[place % 2], "content": said} for place, said in enumerate(talk))
    return Document("notes", suite, language, messages=messages, answer={"contains": wanted})


def _copy(source: Source, split: Split, language: Language) -> Document:
    """A list to repeat, or the entry after another one."""
    phrases = _phrases()[language]
    inventory = source.pick(_LISTS)
    entries: list[str] = []
    for _ in range(source.between(3, 8)):
        entry = draw(inventory, source, split)
        if entry not in entries:
            entries.append(entry)
    text = ", ".join(entries)
    if len(entries) < 3 or source.chance(50):
        return _document("notes/copy", language, [f"{source.pick(phrases['repeat'])} {text}", text], [text])
    place = source.below(len(entries) - 1)
    question = _fill(source.pick(phrases["after"]), {"x": entries[place]})
    wanted = entries[place + 1]
    return _document("notes/copy", language, [f"{text}\n\n{question}", wanted], [wanted])


class _Crowd(NamedTuple):
    """Names that many people of a document share, so that it takes both to tell one from another."""

    first: list[str]
    last: list[str]


def _crowd(source: Source, split: Split) -> _Crowd | None:
    """In half of the training documents. Held-out ones have few names anyway."""
    if split != "train" or source.chance(50):
        return None
    first, last = ([draw(kind, source, split) for _ in range(source.between(2, 6))] for kind in _NAMES)
    return _Crowd(first, last)


def _fact(
    source: Source, split: Split, phrases: Mapping[str, Any], used: set[str], crowd: _Crowd | None
) -> tuple[list[str], dict[str, str]]:
    """A fact template with values of ``split``; its name, room and locker are not in ``used``, and are added to it."""
    for _ in range(500):
        template: list[str] = source.pick(phrases["facts"])
        slots = {slot: _value(slot, source, split, crowd) for slot in _slots(template[0])}
        keys = [f"{slot} {slots[slot]}" for slot in _KEYS if slot in slots]
        if used.isdisjoint(keys):
            used.update(keys)
            return template, slots
    raise RuntimeError(f"no unused names for {len(used)} notes of the split {split} in 500 draws")


def _slots(line: str) -> list[str]:
    return [part.partition("}")[0] for part in line.split("{")[1:]]


def _value(slot: str, source: Source, split: Split, crowd: _Crowd | None) -> str:
    if slot == "name":
        if crowd is not None and source.chance(60):
            return f"{source.pick(crowd.first)} {source.pick(crowd.last)}"
        return " ".join(draw(kind, source, split) for kind in _NAMES)
    if slot == "locker":
        return str(source.between(1, 99))
    if slot == "code":
        for _ in range(500):
            code = f"{source.below(10000):04d}"
            if split_of("notes-code", code) == split:
                return code
        raise RuntimeError(f"no locker code of the split {split} in 500 draws")
    return draw(slot, source, split)


def _fill(line: str, slots: Mapping[str, str]) -> str:
    for slot, value in slots.items():
        line = line.replace(f"{{{slot}}}", value)
    return line


@cache
def _phrases() -> dict[str, Any]:
    text = resources.files("mixtral.desk").joinpath("phrases/notes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
