"""What a request says about the text of an answer (``response_format``) as a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mixtral.errors import GrammarError, RequestError
from mixtral.grammar.lark import check_lark, check_regex
from mixtral.grammar.schema import check_schema
from mixtral.grammar.source import Source, json_grammar, lark_grammar
from mixtral.tokenizer.calls import FUNCTION_NAME

__all__ = ["text_constraint"]

CHOICES = 1024
CHOICE_BYTES = 32 * 1024

# A model can be in love with white space: between two parts of a JSON text there is a line of it at most. No carriage
# return, which a terminal shows as something else.
_SPACE = r" {1,8}|\n[ \t]{0,64}"
_KEYS: dict[str, set[str]] = {
    "text": set(),
    "json_object": set(),
    "json_schema": {"json_schema"},
    "regex": {"regex"},
    "grammar": {"grammar"},
    "choice": {"choice"},
}


def text_constraint(response_format: object, where: str = "response_format") -> Source | None:
    """The grammar that an answer must follow; None for ``{"type": "text"}``.

    Known are ``json_object``, ``json_schema`` (``{"name", "schema", "strict"?, "description"?}``), ``regex`` (a text),
    ``grammar`` (``{"syntax": "lark", "definition"}``) and ``choice`` (a list of texts), each under the key of its name.

    Raises:
        RequestError: the object itself is wrong; ``param`` is the path of the key.
        GrammarError: schema, regex or grammar is; with its code and the path of the place. What only compiling can find
            is not found here: give the result to a ``Guard``.
    """
    given = _members(response_format, where)
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise _wrong(f"{where}.type", kind, ", ".join(_KEYS))
    for key in given:
        if key != "type" and key not in _KEYS[kind]:
            raise RequestError(
                f"{where}.{key!s:.64} does not belong to the type {kind}", param=where, code="unknown_parameter"
            )
    value, inner = given.get(kind), f"{where}.{kind}"
    if kind == "text":
        return None
    if kind == "json_object":
        return Source(json_grammar({"type": "object"}, space=_SPACE), "schema", where)
    if kind == "json_schema":
        return _from_schema(value, inner)
    if kind == "regex":
        return Source(check_regex(value, inner), "regex", inner)
    return _from_choice(value, inner) if kind == "choice" else _from_grammar(value, inner)


def _from_schema(value: object, where: str) -> Source:
    given = _members(value, where, {"name", "schema", "strict", "description"})
    if not isinstance(name := given.get("name"), str) or not FUNCTION_NAME.fullmatch(name):
        raise _wrong(f"{where}.name", name, "1 to 64 letters, digits, _ or -")
    if not isinstance(given.get("strict"), bool | None):
        raise _wrong(f"{where}.strict", given["strict"], "true or false; the schema is kept in either case")
    if not isinstance(given.get("description"), str | None):
        raise _wrong(f"{where}.description", given["description"], "text")
    if "schema" not in given:
        raise _wrong(f"{where}.schema", None, "a JSON schema")
    schema = check_schema(given["schema"], f"{where}.schema")
    if schema.root is False:
        raise GrammarError(f"{where}.schema is false; no text is valid", param=f"{where}.schema", code="schema_invalid")
    return Source(json_grammar(schema.whole(), space=_SPACE), "schema", f"{where}.schema")


def _from_grammar(value: object, where: str) -> Source:
    given = _members(value, where, {"syntax", "definition"})
    if given.get("syntax") != "lark":
        raise _wrong(f"{where}.syntax", given.get("syntax"), '"lark"')
    return Source(check_lark(given.get("definition"), f"{where}.definition"), "grammar", f"{where}.definition")


def _from_choice(value: object, where: str) -> Source:
    if not isinstance(value, list) or not 1 <= len(value) <= CHOICES or not all(isinstance(x, str) for x in value):
        raise _wrong(where, value, f"a list of 1 to {CHOICES} texts")
    if not all(value) or len(set(value)) < len(value):
        raise _wrong(where, value, "different texts that are not empty")
    try:
        size = sum(len(each.encode()) for each in value)
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half of a character", param=where) from None
    if size > CHOICE_BYTES:
        raise RequestError(f"{where} has {size:,} bytes together; the limit is {CHOICE_BYTES:,}", param=where)
    return Source(lark_grammar("start: " + " | ".join(map(json.dumps, value))), "choice", where)


def _members(value: object, where: str, known: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object")
    for key in value:
        if known is not None and key not in known:
            raise RequestError(
                f"{where}.{key!s:.64} is an unknown key; expected {', '.join(sorted(known))}",
                param=where,
                code="unknown_parameter",
            )
    return value


def _wrong(where: str, value: object, expected: str) -> RequestError:
    shown = repr(value)
    shown = shown if len(shown) <= 64 else shown[:61] + "..."
    return RequestError(f"{where} is {shown}; expected {expected}", param=where)
