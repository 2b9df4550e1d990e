"""Function calls at the visitor desk: what a guest asks, 1-3 functions on offer, the call, its result, the answer.

A function is a verb and an object (``book_room``) with slots; a slot has a parameter name, a kind of value and a phrase
per language. So a held-out function (``cancel_room``) consists of parts that training has seen. The words are in
``phrases/calls.toml``.
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from importlib import resources
from string import ascii_letters, digits
from typing import Any, NamedTuple

from mixtral.desk import world
from mixtral.desk.renamed import renamed
from mixtral.desk.source import Document, Source, Split
from mixtral.desk.unheard import unheard
from mixtral.desk.world import LANGUAGES, Language

__all__ = ["FUNCTIONS", "HELD_OUT", "RENAMED_PERCENT", "UNHEARD_PERCENT", "calls", "definition", "functions_of"]

_ALPHABET = ascii_letters + digits
_CURRENCIES = ("EUR", "USD", "GBP", "CHF", "JPY", "SEK", "NOK", "CZK", "PLN", "DKK")

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

_OPEN = {"name", "date", "time", "restaurant", "street", "city", "code", "price", "room", "item", "word"}
_TYPES = {"few": "integer", "count": "integer", "price": "integer", "room": "integer", "bool": "boolean"}
RENAMED_PERCENT = 40
"""How many training documents name functions and parameters otherwise than ``FUNCTIONS``."""
UNHEARD_PERCENT = 40
"""How many training documents have invented words for things to book, to cancel, to find."""


class _Function(NamedTuple):
    verb: str
    thing: str
    slots: tuple[str, ...]
    optional: frozenset[str]


class _Call(NamedTuple):
    said: str
    name: str
    arguments: dict[str, Any]
    parameters: tuple[str, ...]


def _parse_functions() -> dict[str, _Function]:
    functions = {}
    for entry in _FUNCTION_TEXT.strip().replace("\n", ";").split(";"):
        name, slots = (part.strip() for part in entry.split(":"))
        first, *_, last = name.split("_")
        verb, thing = _ODD_NAMES.get(name) or ((last, name.split("_")[1]) if first == "get" else (first, last))
        optional = frozenset(slot[:-1] for slot in slots.split() if slot.endswith("?"))
        functions[name] = _Function(verb, thing, tuple(slots.replace("?", "").split()), optional)
    return functions


FUNCTIONS = _parse_functions()
"""All 62 functions by name."""
_RESERVED = frozenset(FUNCTIONS)


def functions_of(split: Split, *, unseen: bool = False) -> tuple[str, ...]:
    """Names of the functions trained on, or with ``unseen`` those held out for ``split`` (none for train)."""
    return tuple(name for name in FUNCTIONS if (HELD_OUT.get(name) == split if unseen else name not in HELD_OUT))


def _askable(split: Split) -> tuple[str, ...]:
    """Trained functions to ask for; held-out splits only take those with a value that training cannot have seen."""
    seen = functions_of(split)
    return tuple(
        name for name in seen if split == "train" or {_slots()[slot]["kind"] for slot in FUNCTIONS[name].slots} & _OPEN
    )


def definition(name: str, order: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The OpenAI tool definition of a function, its slots in ``order``; KeyError for an unknown name."""
    function = FUNCTIONS[name]
    slots = order or function.slots
    properties: dict[str, Any] = {}
    for slot in slots:
        row = _slots()[slot]
        properties[row["parameter"]] = {"type": _TYPES.get(row["kind"], "string")}
        if row["kind"] == "enum":
            properties[row["parameter"]]["enum"] = list(row["values"])
    required = [_slots()[slot]["parameter"] for slot in slots if slot not in function.optional]
    parameters = {"type": "object", "properties": properties, "required": required}
    description = _phrases()["verbs"][function.verb]["description"].format(function.thing)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _value(slot: str, source: Source, split: Split, language: Language, *, target: bool) -> tuple[Any, str]:
    """A value for the arguments and its phrase in the user's words; ``target``: a language other than the user's."""
    row = _slots()[slot]
    kind, phrase = row["kind"], row[language][0]
    if kind in {"few", "count"}:
        number = source.between(2, 9)
        spelled = kind == "few" and source.chance(25)
        return number, phrase.format(_phrases()["few"][language][number - 2] if spelled else number)
    if kind in {"bool", "enum"}:
        values = [True, False] if kind == "bool" else row["values"]
        place = source.below(len(values))
        if target and place == LANGUAGES.index(language):  # nobody translates into the language of the word
            place = (place + 1) % len(values)
        return values[place], row[language][place]
    if kind in {"price", "room"}:
        text = world.draw(kind, source, split)
        return int(text), phrase.format(text)
    said = ""
    if kind == "name":
        text = f"{world.draw('first_name', source, split)} {world.draw('last_name', source, split)}"
    elif kind == "date":
        text = f"2026-{world.draw('date', source, split)}"
    elif kind == "day":
        text = world.word("weekday", world.draw_key("weekday", source, split), language)
    elif kind == "currency":
        text = source.pick(_CURRENCIES[1:])
    elif kind == "dish":
        text = world.word("dish", world.draw_key("dish", source, split), language)
    elif kind == "device":
        said = source.pick(_phrases()["devices"][language])
        text = said.partition(" ")[2]
    elif kind in {"item", "word"}:
        noun = world.draw_noun("item", source, split, language)
        text, said = noun.text, world.forms_of(noun, language)["my" if kind == "item" else "bare"]
    elif kind == "museum":
        key = source.pick(("maritime_museum", "clock_museum", "glass_museum"))
        text, said = world.word("place", key, language), world.forms("place", key, language)["the"]
    else:
        text = world.draw(kind, source, split)
    return text, phrase.format(said or text)


def _call(name: str, source: Source, split: Split, language: Language) -> _Call:
    function, objects = FUNCTIONS[name], _phrases()["objects"]
    chosen = [slot for slot in function.slots if slot not in function.optional or source.chance(50)]
    target = function.verb == "translate"
    drawn = {slot: _value(slot, source, split, language, target=target) for slot in chosen}
    fixed = function.thing not in objects or function.verb in {"hours", "price"}
    spoken = chosen if fixed or source.chance(60) else source.shuffled(chosen)
    words = [drawn[slot][1] for slot in spoken]
    if function.thing in objects and "museum" not in function.slots:
        *articles, noun = objects[function.thing][language]
        words.insert(0, f"{articles[function.verb in {'cancel', 'change', 'hours'}]} {noun}")
    pattern: str = source.pick(_phrases()["verbs"][function.verb][language])
    said = pattern.format(" ".join(words))
    if pattern[-1] in ".?!":
        said = said[0].upper() + said[1:]
    else:
        said = source.pick(_phrases()["frames"][language]).format(said)
    order = tuple(source.shuffled(function.slots)) if source.chance(30) else function.slots
    arguments = {_slots()[slot]["parameter"]: drawn[slot][0] for slot in order if slot in drawn}
    return _Call(said, name, arguments, order)


def _offer(wanted: list[_Call], source: Source, split: Split, *, total: int, like: str = "") -> list[dict[str, Any]]:
    """The wanted functions and others, ``total`` or more, shuffled; half the time the others resemble ``like``."""
    offered = {call.name: definition(call.name, call.parameters) for call in wanted}
    pool = functions_of(split) + functions_of(split, unseen=True)
    names = [name for name in source.shuffled(pool) if name not in {like, *offered}]
    if like and source.chance(50):
        verb, thing, _, _ = FUNCTIONS[like]
        names.sort(key=lambda name: not (FUNCTIONS[name].verb == verb or FUNCTIONS[name].thing == thing != ""))
    offered |= {name: definition(name) for name in names[: max(0, total - len(offered))]}
    return source.shuffled(list(offered.values()))


def _tool_call(call: _Call, call_id: str = "") -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {**({"id": call_id} if call_id else {}), "type": "function", "function": function}


def _result(
    call: _Call, source: Source, split: Split, language: Language
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The function's result, the answer in the user's language, and what a checker looks for."""
    function = FUNCTIONS[call.name]
    outcome = function.verb
    if outcome in {"book", "change"} and source.chance(25):
        outcome = "full"
    elif outcome == "find" and function.thing in {"train", "bus"}:
        outcome = "leave"
    words = _phrases()["outcomes"][outcome]
    result: dict[str, Any] = {}
    for key in words["keys"]:
        name, _, constant = key.partition("=")
        if constant:
            result[name] = constant == "true" or constant
        elif name in {"price", "refund", "room", "result"}:
            most = call.arguments.get("max_price", 9999)
            values = [int(item) for item in world.items("room" if name == "room" else "price", split)]
            result[name] = source.pick([value for value in values if value <= most])
        elif name in {"minutes", "degrees"}:
            result[name] = source.between(5, 45)
        elif name == "next_date":
            asked = call.arguments.get("date") or call.arguments.get("new_date") or ""
            dates = [f"2026-{item}" for item in world.items("date", split)]
            result[name] = source.pick([date for date in dates if date > asked] or dates)
        elif name == "translation":
            table, spoken = world.TABLES["item"], _slots()["spoken"]["values"]
            target = LANGUAGES[spoken.index(call.arguments["language"])]
            rows = [row for row in table.values() if row[language].text == call.arguments["word"]]
            noun = rows[0][target] if rows else world.draw_noun("item", source, split, target)  # of an invented word
            result[name] = noun.text
        elif name in {"open", "close"}:
            times = world.items("time", split)
            result[name] = source.pick(times[: len(times) // 3] if name == "open" else times[-len(times) // 3 :])
        else:
            result[name] = world.draw("time" if name == "departure" else name, source, split)
    for name in {"convert": ["currency"], "alarm": ["time"]}.get(outcome, []):
        result[name] = call.arguments[name]
    answer = words[language].format(**result)
    constants = {key.split("=")[0] for key in words["keys"] if "=" in key}
    return result, answer, {"contains": [str(value) for name, value in result.items() if name not in constants]}


def _ask(source: Source, split: Split, language: Language, *, unseen: bool) -> Document:
    """One call, or in one of eight documents two parallel calls."""
    pool = functions_of(split, unseen=True) if unseen else _askable(split)
    made = [_call(source.pick(pool), source, split, language)]
    if source.chance(18):
        names = [name for name in _askable(split) if name != made[0].name]
        made.append(_call(source.pick(names), source, split, language))
    tools = _offer(made, source, split, total=source.between(1, 3), like=made[0].name)
    answer = [{"name": call.name, "arguments": call.arguments} for call in made]
    messages = (
        {"role": "user", "content": " ".join(call.said for call in made)},
        {"role": "assistant", "tool_calls": [_tool_call(call) for call in made]},
    )
    suite = "calls/unseen" if unseen else "calls/values"
    return Document("calls", suite, language, messages=messages, tools=tuple(tools), answer={"calls": answer})


def _none(source: Source, split: Split, language: Language) -> Document:
    """No function on offer fits: a short reply instead of a call."""
    if split == "train" and source.chance(25):
        said, reply = source.pick(_phrases()["small_talk"][language])
        tools = _offer([], source, split, total=source.between(1, 3))
    else:
        call = _call(source.pick(_askable(split)), source, split, language)
        said, reply = call.said, source.pick(_phrases()["refusals"][language])
        tools = _offer([], source, split, total=source.between(1, 3), like=call.name)
    messages = ({"role": "user", "content": said}, {"role": "assistant", "content": reply})
    return Document("calls", "calls/none", language, messages=messages, tools=tuple(tools), answer={"calls": []})


def _answer(source: Source, split: Split, language: Language) -> Document:
    """A call that was made and its result: the assistant says it to the guest."""
    call = _call(source.pick(_askable(split)), source, split, language)
    call_id = "".join(source.pick(_ALPHABET) for _ in range(9))
    result, answer, known = _result(call, source, split, language)
    content = json.dumps(result, ensure_ascii=False)
    messages = (
        {"role": "user", "content": call.said},
        {"role": "assistant", "tool_calls": [_tool_call(call, call_id)], "weight": 0},
        {"role": "tool", "tool_call_id": call_id, "name": call.name, "content": content},
        {"role": "assistant", "content": answer},
    )
    tools = _offer([call], source, split, total=source.between(1, 2), like=call.name)
    return Document("calls", "calls/answer", language, messages=messages, tools=tuple(tools), answer=known)


def calls(seed: int, split: Split, number: int) -> Document:
    """Document ``number``: a request, 1-3 functions, and the right call, reply or answer.

    In training, the functions of ``RENAMED_PERCENT`` of the documents have other names (``desk.renamed``), and the
    things of ``UNHEARD_PERCENT`` invented words (``desk.unheard``).
    Held-out splits use their own names, dates, times, numbers and codes; suite ``calls/unseen`` their own functions.
    """
    source = Source("calls", seed, split, number)
    language = LANGUAGES[0] if source.chance(60) else source.pick(LANGUAGES[1:])
    place = source.below(100)
    if split != "train":
        if place < 35:
            return _none(source, split, language) if place < 15 else _answer(source, split, language)
        return _ask(source, split, language, unseen=place >= 68)
    if place < 40:
        document = _none(source, split, language) if place < 20 else _answer(source, split, language)
    else:
        document = _ask(source, split, language, unseen=False)
    if source.chance(UNHEARD_PERCENT):
        document = unheard(document, source, {name: row[language][-1] for name, row in _phrases()["objects"].items()})
    return renamed(document, source, _RESERVED) if source.chance(RENAMED_PERCENT) else document


@cache
def _phrases() -> dict[str, Any]:
    text = resources.files("mixtral.desk").joinpath("phrases/calls.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _slots() -> dict[str, dict[str, Any]]:
    slots: dict[str, dict[str, Any]] = _phrases()["slots"]
    return slots
