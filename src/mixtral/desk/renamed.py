"""Other names for the functions and parameters of a training document: names must be read in the definitions.

The desk has some fifty functions that are trained. A model that knows their names by heart calls them whatever it is
offered. So in part of the training documents they have other names: synonyms, other styles of writing, invented words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mixtral.desk.invented import invented_word
from mixtral.desk.source import Document, Source

__all__ = ["renamed", "with_names"]

Names = Mapping[str, str]

_VERBS = {
    "book": "reserve make create order rent request", "cancel": "delete drop remove void release undo",
    "change": "move edit update shift modify", "find": "search list look_up locate", "get": "show read fetch check",
    "report": "file log note", "set": "start put", "convert": "exchange", "order": "bring send", "translate": "say",
}  # fmt: skip
_PARAMETERS = {
    "name": "guest guest_name customer person who", "date": "on_date start_date when begin", "day": "weekday on_day",
    "time": "at_time hour clock start_time", "new_date": "date_to next_date to_date", "new_time": "time_to to_time",
    "nights": "night_count stay", "guests": "people persons party_size", "days": "day_count", "hours": "hour_count",
    "breakfast": "with_breakfast", "seat": "place where", "class": "comfort carriage", "language": "lang tongue",
    "restaurant": "venue place_name", "street": "address road", "near": "close_to around", "city": "town destination",
    "code": "booking_code reference key", "max_price": "limit budget price_limit", "room": "room_number",
    "museum": "sight", "item": "thing object", "device": "thing part", "dish": "meal food", "quantity": "count number",
    "word": "text term", "amount": "sum value", "currency": "target unit",
}  # fmt: skip
_ENDS = ("value", "text", "field", "arg", "info", "data")


def _styled(words: list[str], source: Source) -> str:
    """Words as one name: ``book_room``, ``bookRoom``, ``BookRoom`` or ``book-room``."""
    match source.below(5):
        case 0:
            return words[0] + "".join(word.capitalize() for word in words[1:])
        case 1:
            return "".join(word.capitalize() for word in words)
        case 2:
            return "-".join(words)
        case _:
            return "_".join(words)


def _function(name: str, source: Source) -> str:
    verb, *rest = name.split("_")
    if verb in _VERBS and source.chance(60):
        verb = source.pick(_VERBS[verb].split())
    if source.chance(20):
        verb = invented_word(source)
    words = [*verb.split("_"), *rest]
    if len(words) == 2 and source.chance(20):
        words.reverse()
    if source.chance(10):
        words.append(source.pick(("tool", "now", "service", "v2", "request")))
    return _plain(_styled(words, source))


def _parameter(name: str, source: Source) -> str:
    words = name.split("_")
    if name in _PARAMETERS and source.chance(60):
        words = source.pick(_PARAMETERS[name].split()).split("_")
    if source.chance(20):
        words = [*words, source.pick(_ENDS)]
    elif source.chance(15):
        words = [invented_word(source)]
    return _plain("_".join(words) if source.chance(75) else _styled(words, source))


def _plain(name: str) -> str:
    """Only characters that names may have."""
    return "".join(sign for sign in name if sign.isascii() and (sign.isalnum() or sign in "_-")) or "other"


def _fresh(name: str, make: Callable[[str, Source], str], source: Source, taken: set[str]) -> str:
    for _ in range(50):
        new = make(name, source)
        if new not in taken:
            return new
    return name


def renamed(document: Document, source: Source, reserved: frozenset[str]) -> Document:
    """The document with other names for part of its functions and parameters; values and words stay.

    No function gets a name of ``reserved``.
    """
    functions: dict[str, str] = {}
    parameters: dict[str, dict[str, str]] = {}
    taken = set(reserved)
    for tool in document.tools:
        name = tool["function"]["name"]
        functions[name] = _fresh(name, _function, source, taken) if source.chance(75) else name
        taken.add(functions[name])
        keys = list(tool["function"]["parameters"]["properties"])
        used = set(keys)
        parameters[name] = {}
        for key in keys:
            parameters[name][key] = _fresh(key, _parameter, source, used) if source.chance(50) else key
            used.add(parameters[name][key])
    return with_names(document, functions, parameters)


def with_names(document: Document, functions: Names, parameters: Mapping[str, Names]) -> Document:
    """The document with other names of functions, and of their parameters by the function; one without a name of its
    own in ``parameters`` keeps it."""
    return replace(
        document,
        tools=tuple(_tool(tool, functions, parameters) for tool in document.tools),
        messages=tuple(_message(message, functions, parameters) for message in document.messages),
        answer=_answer(document.answer, functions, parameters),
    )


def _tool(tool: Mapping[str, Any], functions: Names, parameters: Mapping[str, Names]) -> dict[str, Any]:
    function = tool["function"]
    table, schema = parameters[function["name"]], function["parameters"]
    changed = {
        **schema,
        "properties": {table.get(key, key): value for key, value in schema["properties"].items()},
        "required": [table.get(key, key) for key in schema["required"]],
    }
    return {**tool, "function": {**function, "name": functions[function["name"]], "parameters": changed}}


def _message(message: Mapping[str, Any], functions: Names, parameters: Mapping[str, Names]) -> dict[str, Any]:
    changed = dict(message)
    if "name" in changed:
        changed["name"] = functions[changed["name"]]
    if calls := changed.get("tool_calls"):
        changed["tool_calls"] = [{**call, "function": _call(call["function"], functions, parameters)} for call in calls]
    return changed


def _call(function: Mapping[str, Any], functions: Names, parameters: Mapping[str, Names]) -> dict[str, Any]:
    table = parameters[function["name"]]
    arguments = {table.get(key, key): value for key, value in json.loads(function["arguments"]).items()}
    return {**function, "name": functions[function["name"]], "arguments": json.dumps(arguments, ensure_ascii=False)}


def _answer(answer: Mapping[str, Any], functions: Names, parameters: Mapping[str, Names]) -> dict[str, Any]:
    if "calls" not in answer:
        return dict(answer)
    calls = [
        {
            "name": functions[call["name"]],
            "arguments": {parameters[call["name"]].get(key, key): value for key, value in call["arguments"].items()},
        }
        for call in answer["calls"]
    ]
    return {**answer, "calls": calls}
