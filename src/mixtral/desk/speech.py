"""Conversations at the town desk in five languages: questions about the town, bookings over several turns, small talk.

The phrasings are in ``phrases/<language>.toml``, one per line. A user phrasing belongs to one split by the hash of its
text. A train document uses train phrasings and train values only. A held-out document belongs to one of two suites:

* ``chat/templates``: the last user turn uses a phrasing of its own split. Only intents that have one in the chosen
  language take part, so every document of this suite is new in its wording;
* ``chat/values``: train phrasings, but names, dates, times and things of its own split.

Earlier turns of a held-out document use train phrasings. Replies are not split.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from mixtral.desk import world
from mixtral.desk.source import Document, Source, Split, split_of
from mixtral.desk.world import LANGUAGES, Fact, Language

__all__ = ["FACT_KINDS", "INTENTS", "chat", "fact_question", "phrasings", "replies"]

FACT_KINDS = ("hours", "closed", "ticket", "where", "cuisine", "train", "room_price", "breakfast", "check_in",
              "check_out", "wifi", "parking", "luggage", "pets", "tram", "pharmacy")  # fmt: skip
"""Intents that ask for a fact of the town; ``world.facts_of`` has the facts of each."""
_TALK = ("greeting", "thanks", "who", "scope", "weather")
_SLOTTED = ("lost", "complaint", "late", "taxi", "cancel", "book", "table")
INTENTS: tuple[str, ...] = (*FACT_KINDS, *_TALK, *_SLOTTED)
"""What a visitor can want; every intent has phrasings in every language."""

_FOLLOWED = ("hours", "closed", "ticket", "where", "train", "room_price")
# What the desk recommends in each weather.
_OUTINGS = {
    "it_is_sunny": "botanical_garden",
    "it_is_raining": "aquarium",
    "it_is_snowing": "glass_museum",
    "it_is_windy": "old_mill",
    "it_is_cold": "clock_museum",
    "it_is_hot": "swimming_pool",
    "it_is_cloudy": "castle",
    "it_is_foggy": "maritime_museum",
}
_SENTENCE = re.compile(r"(^|[.!?]\s+)([¿¡]?)(\w)")
_SLOT = re.compile(r"\{(\w+)\}")


@cache
def _phrases(language: Language) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    text = resources.files("mixtral.desk").joinpath("phrases", f"{language}.toml").read_text(encoding="utf-8")
    table = {
        name: MappingProxyType({side: tuple(lines.strip().splitlines()) for side, lines in sides.items()})
        for name, sides in tomllib.loads(text).items()
    }
    return MappingProxyType(table)


@cache
def phrasings(intent: str, language: Language, split: Split) -> tuple[str, ...]:
    """The user phrasings of ``split``, with {slots}; may be empty for a held-out split; KeyError: unknown intent."""
    lines = _phrases(language)[intent]["user"]
    return tuple(line for line in lines if split_of("template", intent, language, line) == split)


@cache
def replies(intent: str, language: Language) -> tuple[str, ...]:
    """The forms of the desk's reply, with {slots}; KeyError for an unknown intent."""
    return _phrases(language)[intent]["reply"]


def _fill(template: str, slots: Mapping[str, str]) -> str:
    text = _SLOT.sub(lambda match: slots[match[1]], template)
    return _SENTENCE.sub(lambda match: match[1] + match[2] + match[3].upper(), text)


@dataclass(slots=True)
class _Talk:
    """A conversation under construction; ``required`` belongs to its last exchange."""

    source: Source
    split: Split
    language: Language
    messages: list[dict[str, Any]] = field(default_factory=list)
    required: list[str] = field(default_factory=list)

    def exchange(self, intent: str, slots: Mapping[str, str], required: list[str], *,
                 reply: str = "", wording: Split = "train") -> None:  # fmt: skip
        """One user turn and its reply. ``reply`` names another intent whose reply is used."""
        asked = self.source.pick(phrasings(intent, self.language, wording))
        answered = self.source.pick(replies(reply or intent, self.language))
        self.messages.append({"role": "user", "content": _fill(asked, slots)})
        self.messages.append({"role": "assistant", "content": _fill(answered, slots)})
        self.required = required

    def value(self, inventory: str) -> str:
        return world.draw(inventory, self.source, self.split)

    def name(self) -> str:
        return f"{self.value('first_name')} {self.value('last_name')}"


def _fact_slots(fact: Fact, language: Language) -> tuple[dict[str, str], list[str]]:
    """The slots of a fact's phrasings and the strings that a right answer contains."""
    slots, required = {}, []
    for name, value in fact.values.items():
        if name == "ticket_price":
            slots["price"] = world.price(value, language)
            required.append(slots["price"])
        elif name == "closed_day":
            slots["day"] = world.weekday(value, language, every=True)
            required.append(world.word("weekday", value, language))
        else:
            slots[name] = value
            required.append(value)
    if fact.kind == "cuisine":
        slots["cuisine"] = world.word("cuisine", fact.subject, language)
    elif fact.kind == "train":
        slots["city"] = slots["the"] = slots["bare"] = fact.subject
    elif fact.subject:
        table = "room_type" if fact.kind == "room_price" else "place"
        slots.update(world.forms(table, fact.subject, language))
    return slots, required


def fact_question(key: str, language: Language) -> tuple[str, list[str]]:
    """A plain question for a fact of ``world.FACTS`` and the strings its right answer contains (compare caseless)."""
    fact = world.FACTS[key]
    slots, required = _fact_slots(fact, language)
    return _fill(phrasings(fact.kind, language, "train")[0], slots), required


def _ask_fact(talk: _Talk, kind: str, wording: Split) -> None:
    slots, required = _fact_slots(talk.source.pick(world.facts_of(kind)), talk.language)
    talk.exchange(kind, slots, required, wording=wording)


def _follow(talk: _Talk, wording: Split) -> None:
    """A fact question, then the same question about something else in a few words."""
    kind = talk.source.pick(_FOLLOWED)
    first, second = talk.source.sample(world.facts_of(kind), 2)
    talk.exchange(kind, *_fact_slots(first, talk.language))
    talk.exchange("follow", *_fact_slots(second, talk.language), reply=kind, wording=wording)


def _small_talk(talk: _Talk, intent: str, wording: Split) -> None:
    if intent != "weather":
        talk.exchange(intent, {"town": world.TOWN, "hotel": world.HOTEL}, [world.TOWN], wording=wording)
        return
    key = talk.source.pick(tuple(_OUTINGS))
    weather = world.word("weather", key, talk.language)
    place = world.forms("place", _OUTINGS[key], talk.language)
    talk.exchange(intent, {"weather": weather, **place}, [weather, place["bare"]], wording=wording)


def _request(talk: _Talk, intent: str, wording: Split) -> None:
    """A wish that is said in one turn and confirmed with its values."""
    slots, required = {}, []
    if intent == "lost":
        thing = world.forms_of(world.draw_noun("item", talk.source, talk.split, talk.language), talk.language)
        slots = {**thing, "street": talk.value("street")}
        required = [thing["bare"], slots["street"]]
    elif intent == "cancel":
        slots = {"name": talk.name(), "code": talk.value("code")}
        required = [slots["name"], slots["code"]]
    else:
        slot = "room" if intent == "complaint" else "time"
        slots = {slot: talk.value(slot)}
        required = [slots[slot]]
    talk.exchange(intent, slots, required, wording=wording)


def _from_date(value: str, language: Language) -> str:
    day = world.date(value, language)
    if language == "it":
        return f"dall'{day}" if day.split()[0] in {"8", "11"} else f"dal {day}"
    return {"en": "from ", "fr": "à partir du ", "de": "ab dem ", "es": "desde el "}[language] + day


def _book(talk: _Talk, wording: Split) -> None:
    """A room: all values in one turn, or asked for one after the other, sometimes changed at the end."""
    day = talk.value("date")
    room = world.forms("room_type", world.draw_key("room_type", talk.source, talk.split), talk.language)
    slots = {**room, "nights": str(talk.source.between(2, 9)), "date": world.date(day, talk.language),
             "from_date": _from_date(day, talk.language), "name": talk.name()}  # fmt: skip
    shape = talk.source.below(3)
    required = [room["bare"], slots["nights"], slots["date"], slots["name"]]
    if shape == 0 or wording != "train":
        talk.exchange("book", slots, required, wording=wording)
        return
    talk.exchange("book_start", slots, [])
    talk.exchange("book_when", slots, [slots["nights"], slots["date"]])
    talk.exchange("name", slots, required, reply="book")
    if shape == 2:
        slots["nights"] = str((int(slots["nights"]) + talk.source.between(0, 5)) % 8 + 2)
        required = [room["bare"], slots["nights"], slots["date"], slots["name"]]
        talk.exchange("book_change", slots, required, reply="book")


def _table(talk: _Talk, wording: Split) -> None:
    """A restaurant table: all values in one turn, or asked for one after the other."""
    slots = {"restaurant": talk.value("restaurant"), "guests": str(talk.source.between(2, 9)),
             "time": talk.value("time"), "name": talk.name()}  # fmt: skip
    required = list(slots.values())
    if wording != "train" or talk.source.chance(40):
        talk.exchange("table", slots, required, wording=wording)
        return
    talk.exchange("table_start", slots, [slots["restaurant"]])
    talk.exchange("table_when", slots, [slots["guests"], slots["time"]])
    talk.exchange("name", slots, required, reply="table")


def _play(talk: _Talk, intent: str, wording: Split) -> None:
    """The exchanges of one intent; the last one is worded from the split ``wording``."""
    if intent == "follow":
        _follow(talk, wording)
    elif intent == "book":
        _book(talk, wording)
    elif intent == "table":
        _table(talk, wording)
    elif intent in _SLOTTED:
        _request(talk, intent, wording)
    elif intent in _TALK:
        _small_talk(talk, intent, wording)
    else:
        _ask_fact(talk, intent, wording)


def _draw_intent(source: Source) -> str:
    place = source.below(100)
    if place < 48:
        # The kinds with many subjects are asked more often, so that every fact is seen.
        return source.pick((*FACT_KINDS, "hours", "closed", "ticket", "where", "hours", "ticket", "where", "train"))
    if place < 56:
        return "follow"
    return source.pick(_TALK) if place < 70 else source.pick(_SLOTTED)


@cache
def _newly_worded(language: Language, split: Split) -> tuple[str, ...]:
    return tuple(intent for intent in (*INTENTS, "follow") if phrasings(intent, language, split))


def chat(seed: int, split: Split, number: int) -> Document:
    """A conversation of 1 to 4 exchanges; ``answer`` has ``contains`` (caseless), ``language`` and ``intent``.

    Every string of ``contains`` is in the reference reply, and follows from the conversation or the fixed facts.
    """
    source = Source("chat", seed, split, number)
    language = source.pick(LANGUAGES)
    talk = _Talk(source, split, language)
    wording: Split = "train"
    if split == "train":
        intent, suite = _draw_intent(source), "chat"
    elif source.chance(50):
        intent, suite, wording = source.pick(_newly_worded(language, split)), "chat/templates", split
    else:
        intent, suite = source.pick(_SLOTTED), "chat/values"
    if source.chance(15):
        spoken = source.pick(LANGUAGES) if source.chance(20) else language
        content = _fill(source.pick(replies("system", spoken)), {"town": world.TOWN, "hotel": world.HOTEL})
        talk.messages.append({"role": "system", "content": content})
    if intent not in {"book", "table", "follow"} or wording != "train":
        for _ in range(source.pick((0, 0, 0, 1, 1, 2))):
            _play(talk, source.pick((*FACT_KINDS, "greeting", "weather")), "train")
    _play(talk, intent, wording)
    answer = {"contains": talk.required, "language": language, "intent": intent}
    return Document("chat", suite, language, messages=tuple(talk.messages), answer=answer)
