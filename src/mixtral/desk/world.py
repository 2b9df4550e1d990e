"""The invented town of Marvena: names and values with their splits, translated words, and the facts of the town.

Three kinds of things:

* *inventories* hold names and values that are written alike in every language. Every item belongs to one split;
* *tables* hold words in five languages, with their gender where articles depend on it (``desk.words``);
* *facts* are the same in every document, so a question about the town has one right answer.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from mixtral.desk.invented import INVENTORS, invented_noun
from mixtral.desk.source import Source, Split, split_of
from mixtral.desk.words import (
    CURRENCY,
    LANGUAGES,
    SPLIT_TABLES,
    TABLES,
    Language,
    Noun,
    date,
    draw_key,
    forms,
    forms_of,
    keys,
    price,
    weekday,
    word,
)

__all__ = [
    "CURRENCY",
    "FACTS",
    "HOTEL",
    "INVENTED_PERCENT",
    "INVENTORIES",
    "LANGUAGES",
    "SPLIT_TABLES",
    "TABLES",
    "TOWN",
    "Fact",
    "Language",
    "Noun",
    "date",
    "draw",
    "draw_key",
    "draw_noun",
    "facts_of",
    "forms",
    "forms_of",
    "items",
    "keys",
    "price",
    "weekday",
    "word",
]

TOWN = "Marvena"
HOTEL = "Hotel Lindera"

# --- inventories: written alike in every language, each item in one split --------------------------------------------


def _names() -> dict[str, tuple[str, ...]]:
    text = resources.files("mixtral.desk").joinpath("phrases/names.toml").read_text(encoding="utf-8")
    parts = {kind: re.split(r"[|\n]" if "|" in names else r"\s", names) for kind, names in tomllib.loads(text).items()}
    return {kind: tuple(part.strip() for part in found if part.strip()) for kind, found in parts.items()}


def _codes() -> tuple[str, ...]:
    letters = "BCDFGHKLMNPRSTVWXZ"
    return tuple(f"{letters[n * 7 % 18]}{letters[n * 5 // 9 % 18]}{n * 37 % 90 + 10}" for n in range(400))


_NAMES = _names()
INVENTORIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **_NAMES,
        "mail_host": tuple(f"{name}.example" for name in _NAMES["mail_host"]),
        "phone": tuple(f"555 {n * 7919 % 9000 + 1000}" for n in range(400)),
        "time": tuple(f"{minute // 60:02d}:{minute % 60:02d}" for minute in range(6 * 60, 24 * 60, 5)),
        "date": tuple(f"{month:02d}-{day:02d}" for month in range(1, 13) for day in range(2, 29)),
        "price": tuple(str(n) for n in range(5, 400)),
        "room": tuple(f"{floor}{door:02d}" for floor in range(1, 7) for door in range(1, 31)),
        "house": tuple(str(n) for n in range(2, 120)),
        "code": tuple(dict.fromkeys(_codes())),
    }
)
"""Names and values by inventory. ``date`` items are ``MM-DD``; ``price`` items are whole euros."""

INVENTED_PERCENT = 70
"""How many training items of an open inventory, and words of a table with splits, are invented, not taken from it."""


@cache
def items(inventory: str, split: Split) -> tuple[str, ...]:
    """The items of an inventory that belong to ``split``; KeyError for an unknown inventory."""
    return tuple(item for item in INVENTORIES[inventory] if split_of("value", inventory, item) == split)


def draw(inventory: str, source: Source, split: Split) -> str:
    """One item of an inventory, from the items of ``split`` alone; KeyError for an unknown inventory.

    In training, ``INVENTED_PERCENT`` of the items of open inventories are invented; none belongs to another split.
    """
    if split == "train" and inventory in INVENTORS and source.chance(INVENTED_PERCENT):
        while True:
            item = INVENTORS[inventory](source)
            if split_of("value", inventory, item) == split:
                return item
    return source.pick(items(inventory, split))


def draw_noun(table: str, source: Source, split: Split, language: Language) -> Noun:
    """A word of a table for ``split``, in training an invented one as ``draw`` has it; KeyError: unknown table."""
    if split == "train" and table in SPLIT_TABLES and source.chance(INVENTED_PERCENT):
        while True:
            noun = Noun(*invented_noun(source, language))
            if noun.text.casefold() not in _held_out_words(table):
                return noun
    return TABLES[table][draw_key(table, source, split)][language]


@cache
def _held_out_words(table: str) -> frozenset[str]:
    held_out = {*keys(table, "validation"), *keys(table, "test")}
    return frozenset(noun.text.casefold() for key in held_out for noun in TABLES[table][key].values())


# --- facts: the same in every document -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: ``kind`` names its phrasing, ``subject`` is a key (place, cuisine, room type, city) or empty.

    ``values`` are named, language-independent strings; a name ending in ``_day`` holds a weekday key, one ending in
    ``_price`` whole euros, any other is shown as it is.
    """

    kind: str
    subject: str
    values: Mapping[str, str]

    @property
    def key(self) -> str:
        """``kind`` or ``kind/subject``, unique among the facts."""
        return f"{self.kind}/{self.subject}" if self.subject else self.kind


# place: opens, closes, closed weekday, ticket in euros, street
_PLACES = """
    maritime_museum 10:00 17:00 monday 9 Via Marina
    clock_museum 11:00 18:00 tuesday 7 Via Torre
    glass_museum 09:30 16:30 wednesday 6 Via Perla
    castle 09:00 19:00 monday 12 Via Alta
    lighthouse 14:00 20:00 thursday 4 Via Faro
    botanical_garden 08:00 21:00 friday 5 Via Camelia
    aquarium 10:30 18:30 tuesday 15 Via Corallo
    town_library 08:30 19:30 sunday 2 Via Antica
    market_hall 07:00 13:00 sunday 11 Via Mercato
    puppet_theatre 15:00 22:00 monday 8 Via Teatro
    old_mill 12:00 16:00 saturday 3 Via Mulino
    swimming_pool 06:30 21:30 wednesday 10 Via Ancora
"""
_KITCHENS = """
    italian Trattoria Luna|Via Luna
    french Le Petit Quai|Via Molo
    spanish Casa Rocio|Via Vela
    indian Saffron Garden|Via Verde
    japanese Sakura|Via Rosa
    greek Taverna Delos|Via Ponte
    vegetarian Verdura|Via Tiglio
    mexican Agave|Via Corta
"""
# city: morning train, evening train, platform
_TRAINS = """
    Arlenne 07:12 18:42 1
    Bergone 08:05 19:20 2
    Costaro 06:48 17:35 3
    Dalvik 09:15 20:10 4
    Estrana 07:50 16:55 5
    Fontille 08:33 21:05 6
    Grunau 10:20 19:55 7
    Havelin 06:25 18:15 8
"""
_ROOM_PRICES = {"single_room": "70", "double_room": "110", "family_room": "150", "suite": "220"}
_HOTEL_FACTS: dict[str, dict[str, str]] = {
    "breakfast": {"open": "07:00", "close": "10:30"},
    "check_in": {"time": "15:00"},
    "check_out": {"time": "11:00"},
    "wifi": {"network": "Lindera-Guest", "password": "seagull42"},
    "parking": {"ticket_price": "18"},
    "luggage": {"open": "06:00", "close": "22:00"},
    "pets": {"ticket_price": "20"},
    "tram": {"line": "3", "street": "Via Grande"},
    "pharmacy": {"street": "Via Lauro", "close": "20:00"},
}


def _facts() -> tuple[Fact, ...]:
    found: list[Fact] = []

    def add(kind: str, subject: str, **values: str) -> None:
        found.append(Fact(kind, subject, MappingProxyType(values)))

    for line in _PLACES.strip().splitlines():
        place, opens, closes, day, ticket, street = line.split(maxsplit=5)
        add("hours", place, open=opens, close=closes)
        add("closed", place, closed_day=day)
        add("ticket", place, ticket_price=ticket)
        add("where", place, street=street)
    for line in _KITCHENS.strip().splitlines():
        cuisine, rest = line.split(maxsplit=1)
        name, street = rest.split("|")
        add("cuisine", cuisine, restaurant=name, street=street)
    for line in _TRAINS.strip().splitlines():
        city, morning, evening, platform = line.split()
        add("train", city, morning=morning, evening=evening, platform=platform)
    for room, amount in _ROOM_PRICES.items():
        add("room_price", room, ticket_price=amount)
    for kind, values in _HOTEL_FACTS.items():
        add(kind, "", **values)
    return tuple(found)


FACTS: Mapping[str, Fact] = MappingProxyType({fact.key: fact for fact in _facts()})
"""All facts of the town by key, for example ``hours/castle`` or ``wifi``."""


@cache
def facts_of(kind: str) -> tuple[Fact, ...]:
    """The facts of one kind, in table order; empty for an unknown kind."""
    return tuple(fact for fact in FACTS.values() if fact.kind == kind)
