"""The functions of the desk: what they are called, what they do to which thing, and with which slots.

A function is a verb and a thing (``book_room``) with slots; a slot has a parameter name, a kind of value and a phrase
per language. So a held-out function (``cancel_room``) consists of parts that training has seen. The words are in
``phrases/calls.toml``.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from mixtral.desk.source import Source, Split

__all__ = ["FUNCTIONS", "HELD_OUT", "Function", "call_phrases", "definition", "functions_of", "made_up", "slots"]

# name: slots ("?" is optional); the name holds verb and object
_FUNCTION_TEXT = """
    book_room: name date nights breakfast?; book_table: restaurant guests time seat?; book_taxi: street time guests?
    book_tour: guests day spoken; book_bike: days date; book_boat: hours date
    cancel_room: name date; cancel_table: restaurant name; cancel_taxi: name time
    cancel_tour: date name; cancel_bike: name date; cancel_boat: code
    change_room: name new_date; change_table: name new_time; change_taxi: code new_time
    change_tour: code new_date; change_bike: code new_date; change_boat: name new_time
    get_room_price: nights guests; get_tour_price: guests spoken?; get_bike_price: days
    get_boat_price: hours guests?; get_train_price: city travel_class; get_bus_price: city day
    find_room: nights max_price breakfast?; find_train: city day travel_class?; find_bus: city time
    find_restaurant: near seat? max_price; find_museum: near day; find_shop: near day?
    book_car: days date; cancel_car: name; change_car: code new_date; get_car_price: days
    book_sauna: time guests; cancel_sauna: name time; change_sauna: name new_time; get_sauna_price: hours guests?
    book_locker: days; cancel_locker: code; find_locker: near max_price; get_locker_price: days
    book_massage: hours time; cancel_massage: date name; change_massage: code new_time
    book_tent: nights guests; cancel_tent: code date?; find_tent: nights max_price; get_tent_price: nights guests
    book_kayak: hours guests; change_kayak: name new_date; find_kayak: guests max_price
    get_museum_hours: museum day; get_restaurant_hours: its_name day; get_shop_hours: at_street day
    get_weather: in_city day; report_lost_item: item near day?; report_fault: device in_room
    convert_currency: amount to_currency; set_alarm: in_room time; order_food: quantity dish in_room
    translate_word: quoted spoken
"""
_ODD_NAMES = {"get_weather": ("weather", ""), "report_lost_item": ("lost", ""), "report_fault": ("fault", ""),
              "convert_currency": ("convert", ""), "set_alarm": ("alarm", ""), "order_food": ("order", ""),
              "translate_word": ("translate", "")}  # fmt: skip
HELD_OUT: dict[str, Split] = {
    **dict.fromkeys(("cancel_room", "book_boat", "change_tour", "get_bike_price", "find_bus", "get_shop_hours"),
                    "validation"),
    **dict.fromkeys(("cancel_bike", "book_tour", "change_table", "get_train_price", "find_museum", "get_room_price"),
                    "test"),
}  # fmt: skip
"""Functions that never occur in training documents, with the split that owns them."""

# Slots that functions of a verb may have, one of each group; what is changed needs both.
_TAKES = {
    "book": "name date|day nights|days|hours guests time spoken seat breakfast travel_class city",
    "cancel": "name|code date|time",
    "change": "name|code new_date|new_time",
    "price": "nights|days|hours guests spoken travel_class day city",
    "find": "near day|date time max_price guests nights|days|hours city breakfast seat",
}
_THING_TEXT = "room table taxi tour bike boat train bus car sauna locker massage tent kayak"
_THINGS = tuple(_THING_TEXT.split())
_TYPES = {"few": "integer", "count": "integer", "price": "integer", "room": "integer", "bool": "boolean"}


class Function(NamedTuple):
    """A name, what is done to which thing (empty for some), the slots by their names in ``phrases/calls.toml``."""

    name: str
    verb: str
    thing: str
    slots: tuple[str, ...]
    optional: frozenset[str]


def _parse_functions() -> dict[str, Function]:
    functions = {}
    for entry in _FUNCTION_TEXT.strip().replace("\n", ";").split(";"):
        name, listed = (part.strip() for part in entry.split(":"))
        first, *_, last = name.split("_")
        verb, thing = _ODD_NAMES.get(name) or ((last, name.split("_")[1]) if first == "get" else (first, last))
        optional = frozenset(slot[:-1] for slot in listed.split() if slot.endswith("?"))
        functions[name] = Function(name, verb, thing, tuple(listed.replace("?", "").split()), optional)
    return functions


FUNCTIONS = _parse_functions()
"""All 62 functions by name."""


def functions_of(split: Split, *, unseen: bool = False) -> tuple[str, ...]:
    """Names of the functions trained on, or with ``unseen`` those held out for ``split`` (none for train)."""
    return tuple(name for name in FUNCTIONS if (HELD_OUT.get(name) == split if unseen else name not in HELD_OUT))


def definition(function: Function, order: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The OpenAI tool definition of a function, its slots in ``order``."""
    rows = {slot: slots()[slot] for slot in order or function.slots}
    properties: dict[str, Any] = {}
    for row in rows.values():
        properties[row["parameter"]] = {"type": _TYPES.get(row["kind"], "string")}
        if row["kind"] == "enum":
            properties[row["parameter"]]["enum"] = list(row["values"])
    required = [row["parameter"] for slot, row in rows.items() if slot not in function.optional]
    parameters = {"type": "object", "properties": properties, "required": required}
    description = call_phrases()["verbs"][function.verb]["description"].format(function.thing)
    return {
        "type": "function",
        "function": {"name": function.name, "description": description, "parameters": parameters},
    }


def made_up(source: Source) -> Function:
    """A function that the desk does not have: another pair of verb and thing, with any slots that such a verb takes.

    It is none of ``FUNCTIONS``, so none that is held out.
    """
    while True:
        verb, thing = source.pick(tuple(_TAKES)), source.pick(_THINGS)
        name = f"get_{thing}_price" if verb == "price" else f"{verb}_{thing}"
        if name not in FUNCTIONS:
            break
    groups = [group.split("|") for group in _TAKES[verb].split()]
    count = len(groups) if verb == "change" else source.between(1, min(3, len(groups)))
    chosen = tuple(source.pick(group) for group in source.shuffled(groups)[:count])
    optional = chosen[-1:] if count > 1 and verb != "change" and source.chance(25) else ()
    return Function(name, verb, thing, chosen, frozenset(optional))


@cache
def call_phrases() -> dict[str, Any]:
    """The tables of ``phrases/calls.toml``."""
    text = resources.files("mixtral.desk").joinpath("phrases/calls.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def slots() -> dict[str, dict[str, Any]]:
    """Parameter, kind and phrases of every slot."""
    found: dict[str, dict[str, Any]] = call_phrases()["slots"]
    return found
