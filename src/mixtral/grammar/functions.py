"""The grammar of function calls: what an answer holds after the control token ``[TOOL_CALLS]``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral.errors import GrammarError, MessagesError
from mixtral.grammar.schema import Checked, check_schema
from mixtral.grammar.source import Source, json_grammar
from mixtral.tokenizer.turns import read_tools

__all__ = ["calls_constraint"]

FUNCTIONS = 128
FUNCTIONS_BYTES = 256 * 1024
CALLS = 128  # in one answer: as many as a conversation may hold in one turn

_SPACE = r"[ \t\r\n]{1,8}"


def calls_constraint(
    tools: Sequence[Mapping[str, Any]], *, name: str | None = None, parallel: bool = True, where: str = "tools"
) -> Source:
    """``[{"name": ..., "arguments": {...}}, ...]`` with the names and argument schemas of the request.

    At least one call; exactly one with ``parallel`` False; exactly one, of that function, with a ``name``. Calls
    have no id: the server gives them one. A function without ``parameters`` takes none.

    Raises:
        MessagesError: the definitions are wrong, there are none, or ``name`` is not one of theirs.
        GrammarError: a schema in ``parameters`` is unsupported or wrong; the message names function and keyword.
    """
    functions = [tool["function"] for tool in read_tools(tools)]
    if not 1 <= len(functions) <= FUNCTIONS:
        raise MessagesError(f"{where} has {len(functions)} functions; expected 1 to {FUNCTIONS}", param=where)
    options, definitions, size = [], {}, 0
    for place, function in enumerate(functions):
        checked = _arguments(function, f"{where}[{place}].function.parameters", prefix=f"f{place}d")
        size += len(json.dumps(function["parameters"], ensure_ascii=False).encode())
        if name is None or name == function["name"]:
            definitions.update(checked.definitions)
            members = {"name": {"const": function["name"]}, "arguments": checked.root}
            options.append(
                {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}
            )
    if size > FUNCTIONS_BYTES:
        raise MessagesError(f"{where} has {size:,} bytes of schemas; the limit is {FUNCTIONS_BYTES:,}", param=where)
    if not options:
        known = ", ".join(function["name"] for function in functions)
        raise MessagesError(f"{where} has no function {name!r:.64}; it has {known:.200}", param="tool_choice")
    most = CALLS if parallel and name is None else 1
    calls = {"type": "array", "items": {"anyOf": options}, "minItems": 1, "maxItems": most}
    schema = {**calls, "$defs": definitions} if definitions else calls
    return Source(json_grammar(schema, space=_SPACE), "schema", where)


def _arguments(function: dict[str, Any], where: str, *, prefix: str) -> Checked:
    """The schema of a function's arguments, which are an object."""
    given = function["parameters"]
    if not given:
        return Checked({"type": "object", "additionalProperties": False}, {})
    try:
        checked = check_schema(given, where, prefix=prefix)
    except GrammarError as error:
        raise GrammarError(f"function {function['name']}: {error}", param=error.param, code=error.code) from None
    kinds = given.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise GrammarError(
            f"function {function['name']}: {where}.type is {kinds!r:.64}; arguments are an object",
            param=f"{where}.type",
            code="schema_invalid",
        )
    is_part_of_itself = checked.root.keys() == {"$ref"}
    root = {"allOf": [{"type": "object"}, checked.root]} if is_part_of_itself else {**checked.root, "type": "object"}
    return Checked(root, checked.definitions)
