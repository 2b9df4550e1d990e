"""Function calls at the visitor desk: what a guest asks, 1-3 functions on offer, the call, its result, the answer.

The functions are in ``desk.functions``, the words in ``phrases/calls.toml``.
"""

from __future__ import annotations

import json
from string import ascii_letters, digits
from typing import Any, NamedTuple

from mixtral.desk import world
from mixtral.desk.functions import FUNCTIONS, Function, call_phrases, definition, functions_of, made_up, slots
from mixtral.desk.renamed import renamed
from mixtral.desk.source import Document, Source, Split
from mixtral.desk.unheard import unheard
from mixtral.desk.world import LANGUAGES, Language

__all__ = ["MADE_UP_PERCENT", "RENAMED_PERCENT", "UNHEARD_PERCENT", "calls"]

_ALPHABET = ascii_letters + digits
_CURRENCIES = ("EUR", "USD", "GBP", "CHF", "JPY", "SEK", "NOK", "CZK", "PLN", "DKK")

_RESERVED = frozenset(FUNCTIONS)
_OPEN = {"name", "date", "time", "restaurant", "street", "city", "code", "price", "room", "item", "word"}
MADE_UP_PERCENT = 35
"""How many of the functions that training documents ask for are none of ``FUNCTIONS``."""
RENAMED_PERCENT = 40
"""How many training documents name functions and parameters otherwise than ``FUNCTIONS``."""
UNHEARD_PERCENT = 40
"""How many training documents have invented words for things to book, to cancel, to find."""


class _Call(NamedTuple):
    said: str
    function: Function
    arguments: dict[str, Any]
    parameters: tuple[str, ...]


def _askable(split: Split) -> tuple[str, ...]:
    """Trained functions to ask for; held-out splits only take those with a value that training cannot have seen."""
    seen = functions_of(split)
    return tuple(
        name for name in seen if split == "train" or {slots()[slot]["kind"] for slot in FUNCTIONS[name].slots} & _OPEN
    )


def _drawn(pool: tuple[str, ...], source: Source, split: Split) -> Function:
    """One of the pool, in training also one that is made up."""
    if split == "train" and source.chance(MADE_UP_PERCENT):
        return made_up(source)
    return FUNCTIONS[source.pick(pool)]


def _value(slot: str, source: Source, split: Split, language: Language, *, target: bool) -> tuple[Any, str]:
    """A value for the arguments and its phrase in the user's words; ``target``: a language other than the user's."""
    row = slots()[slot]
    kind, phrase = row["kind"], row[language][0]
    if kind in {"few", "count"}:
        number = source.between(2, 9)
        spelled = kind == "few" and source.chance(25)
        return number, phrase.format(call_phrases()["few"][language][number - 2] if spelled else number)
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
        said = source.pick(call_phrases()["devices"][language])
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


def _call(function: Function, source: Source, split: Split, language: Language) -> _Call:
    objects = call_phrases()["objects"]
    chosen = [slot for slot in function.slots if slot not in function.optional or source.chance(50)]
    target = function.verb == "translate"
    drawn = {slot: _value(slot, source, split, language, target=target) for slot in chosen}
    fixed = function.thing not in objects or function.verb in {"hours", "price"}
    spoken = chosen if fixed or source.chance(60) else source.shuffled(chosen)
    words = [drawn[slot][1] for slot in spoken]
    if function.thing in objects and "museum" not in function.slots:
        *articles, noun = objects[function.thing][language]
        words.insert(0, f"{articles[function.verb in {'cancel', 'change', 'hours'}]} {noun}")
    pattern: str = source.pick(call_phrases()["verbs"][function.verb][language])
    said = pattern.format(" ".join(words))
    if pattern[-1] in ".?!":
        said = said[0].upper() + said[1:]
    else:
        said = source.pick(call_phrases()["frames"][language]).format(said)
    order = tuple(source.shuffled(function.slots)) if source.chance(30) else function.slots
    arguments = {slots()[slot]["parameter"]: drawn[slot][0] for slot in order if slot in drawn}
    return _Call(said, function, arguments, order)


def _offer(
    wanted: list[_Call], source: Source, split: Split, *, total: int, like: Function | None = None
) -> list[dict[str, Any]]:
    """The wanted functions and others, ``total`` or more, shuffled; half the time the others resemble ``like``."""
    offered = {call.function.name: definition(call.function, call.parameters) for call in wanted}
    pool = functions_of(split) + functions_of(split, unseen=True)
    others = {name: FUNCTIONS[name] for name in source.shuffled(pool)}
    if split == "train" and source.chance(MADE_UP_PERCENT):
        others = {function.name: function for function in (made_up(source), made_up(source), made_up(source))} | others
    names = [name for name in others if name not in offered and (like is None or name != like.name)]
    if like and source.chance(50):
        _, verb, thing, _, _ = like
        names.sort(key=lambda name: not (others[name].verb == verb or others[name].thing == thing != ""))
    offered |= {name: definition(others[name]) for name in names[: max(0, total - len(offered))]}
    return source.shuffled(list(offered.values()))


def _tool_call(call: _Call, call_id: str = "") -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {**({"id": call_id} if call_id else {}), "type": "function", "function": function}


def _result(
    call: _Call, source: Source, split: Split, language: Language
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The function's result, the answer in the user's language, and what a checker looks for."""
    function = call.function
    outcome = function.verb
    if outcome in {"book", "change"} and source.chance(25):
        outcome = "full"
    elif outcome == "find" and function.thing in {"train", "bus"}:
        outcome = "leave"
    words = call_phrases()["outcomes"][outcome]
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
            table, spoken = world.TABLES["item"], slots()["spoken"]["values"]
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
    made = [_call(_drawn(pool, source, split), source, split, language)]
    if source.chance(18):
        names = tuple(name for name in _askable(split) if name != made[0].function.name)
        made.append(_call(FUNCTIONS[source.pick(names)], source, split, language))
    tools = _offer(made, source, split, total=source.between(1, 3), like=made[0].function)
    answer = [{"name": call.function.name, "arguments": call.arguments} for call in made]
    messages = (
        {"role": "user", "content": " ".join(call.said for call in made)},
        {"role": "assistant", "tool_calls": [_tool_call(call) for call in made]},
    )
    suite = "calls/unseen" if unseen else "calls/values"
    return Document("calls", suite, language, messages=messages, tools=tuple(tools), answer={"calls": answer})


def _none(source: Source, split: Split, language: Language) -> Document:
    """No function on offer fits: a short reply instead of a call."""
    if split == "train" and source.chance(25):
        said, reply = source.pick(call_phrases()["small_talk"][language])
        tools = _offer([], source, split, total=source.between(1, 3))
    else:
        call = _call(_drawn(_askable(split), source, split), source, split, language)
        said, reply = call.said, source.pick(call_phrases()["refusals"][language])
        tools = _offer([], source, split, total=source.between(1, 3), like=call.function)
    messages = ({"role": "user", "content": said}, {"role": "assistant", "content": reply})
    return Document("calls", "calls/none", language, messages=messages, tools=tuple(tools), answer={"calls": []})


def _answer(source: Source, split: Split, language: Language) -> Document:
    """A call that was made and its result: the assistant says it to the guest."""
    call = _call(_drawn(_askable(split), source, split), source, split, language)
    call_id = "".join(source.pick(_ALPHABET) for _ in range(9))
    result, answer, known = _result(call, source, split, language)
    content = json.dumps(result, ensure_ascii=False)
    messages = (
        {"role": "user", "content": call.said},
        {"role": "assistant", "tool_calls": [_tool_call(call, call_id)], "weight": 0},
        {"role": "tool", "tool_call_id": call_id, "name": call.function.name, "content": content},
        {"role": "assistant", "content": answer},
    )
    tools = _offer([call], source, split, total=source.between(1, 2), like=call.function)
    return Document("calls", "calls/answer", language, messages=messages, tools=tuple(tools), answer=known)


def calls(seed: int, split: Split, number: int) -> Document:
    """Document ``number``: a request, 1-3 functions, and the right call, reply or answer.

    In training, ``MADE_UP_PERCENT`` of the functions that are asked for are made up, those of ``RENAMED_PERCENT`` of
    the documents have other names (``desk.renamed``), and the things of ``UNHEARD_PERCENT`` invented words
    (``desk.unheard``).
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
        document = unheard(
            document, source, {name: row[language][-1] for name, row in call_phrases()["objects"].items()}
        )
    return renamed(document, source, _RESERVED) if source.chance(RENAMED_PERCENT) else document
