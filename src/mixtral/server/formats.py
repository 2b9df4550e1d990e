"""What an answer must look like: ``response_format``, functions and ``tool_choice``, as the engine's Constraint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mixtral.grammar import Source
from mixtral.limits import PARTS
from mixtral.server.errors import ApiError, show
from mixtral.server.fields import combination, members, name_of, part, required, wrong_type, wrong_value
from mixtral.tokenizer import Tokenizer
from mixtral.tokenizer.turns import read_tools
from mixtral.wire import Constraint

__all__ = ["Form", "Grammar", "check_continued", "constraint", "read_form", "read_response_format"]

_TOOL_BYTES = int(PARTS["tools (bytes as JSON)"].high or 0)
_CALLS = "[TOOL_CALLS]"


class Grammar(Protocol):
    """Turns formats into grammars. Errors are MixtralErrors with a code such as ``schema_unsupported`` and a param."""

    def text_constraint(self, response_format: Mapping[str, Any]) -> Source | None:
        """The grammar of a text; None where anything may be written."""
        ...

    def calls_constraint(self, tools: Sequence[Mapping[str, Any]], *, name: str | None, parallel: bool) -> Source:
        """The grammar of what follows ``[TOOL_CALLS]``: calls of any of ``tools``, or exactly one of ``name``."""
        ...

    def check(self, source: Source) -> None:
        """Try a grammar out where nothing can be harmed; takes up to seconds. Raises if it cannot be used."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Memory of what is known of grammars that were tried."""
        ...

    def close(self) -> None:
        """Give back what trials needed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a request asks of an answer's form. ``text`` is a response_format other than text, or None.

    ``choice`` is "auto", "none", "required", or the ``name`` of the one function to call ("named").
    """

    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "none"
    name: str | None = None
    parallel: bool = True

    @property
    def offers_calls(self) -> bool:
        """Whether the answer may be function calls."""
        return self.choice != "none"


def read_form(fields: Mapping[str, Any]) -> Form:
    """The form in the fields of a chat request. Raises ApiError or MessagesError, which name the field."""
    text = read_response_format(fields.get("response_format"))
    tools = _tools(fields.get("tools", []))
    choice, name = _choice(fields.get("tool_choice"), tools)
    if text is not None and choice in ("required", "named"):
        raise combination("tool_choice", "a function call has no response_format; use tool_choice auto or none")
    return Form(
        text=text, tools=tools, choice=choice, name=name, parallel=fields.get("parallel_tool_calls", True) is True
    )


def read_response_format(value: Any, path: str = "response_format") -> dict[str, Any] | None:
    """A checked response_format; None for text. Schemas and grammars themselves are checked by the Grammar."""
    if value is None:
        return None
    known = {"json_schema", "regex", "grammar", "choice"}
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in {"text", "json_object", *known}:
        expected = "text, json_object, json_schema, regex, grammar or choice"
        raise wrong_value(f"{path}.type", kind, expected) if "type" in value else required({}, "type", path)
    given = members(value, path, {"type", kind} & {"type", *known})
    if kind in ("text", "json_object"):
        return None if kind == "text" else given
    detail = required(given, kind, path)
    path = f"{path}.{kind}"
    if kind == "regex":
        part(detail, path, "response_format.regex")
    elif kind == "choice":
        part(detail, path, "response_format.choice")
        for place, word in enumerate(detail):
            part(word, f"{path}[{place}]", "response_format.choice[]")
        if len(set(detail)) < len(detail):
            raise ApiError(400, "invalid_value", f"{path} has a text twice; expected different ones", param=path)
    elif kind == "grammar":
        detail = members(detail, path, {"syntax", "definition"})
        if required(detail, "syntax", path) != "lark":
            raise wrong_value(f"{path}.syntax", detail["syntax"], "'lark'")
        part(required(detail, "definition", path), f"{path}.definition", "response_format.grammar.definition")
    else:
        detail = members(detail, path, {"name", "description", "schema", "strict"})
        name_of(required(detail, "name", path), f"{path}.name", "response_format.json_schema.name")
        _expect(detail, "schema", path, dict, "an object")
        _expect(detail, "description", path, str, "a string")
        _expect(detail, "strict", path, bool, "true or false")
        required(detail, "schema", path)
    return {"type": kind, kind: detail}


def _expect(fields: Mapping[str, Any], name: str, path: str, kind: type, words: str) -> None:
    if name in fields and not isinstance(fields[name], kind):
        raise wrong_type(f"{path}.{name}", fields[name], words)


def _tools(tools: list[Any]) -> list[dict[str, Any]]:
    if len(json.dumps(tools, ensure_ascii=False).encode("utf-8", "replace")) > _TOOL_BYTES:
        message = f"tools is too large; expected at most {_TOOL_BYTES} bytes together"
        raise ApiError(400, "invalid_value", message, param="tools")
    read_tools(tools)
    for place, tool in enumerate(tools):
        description = tool["function"].get("description")
        if description is not None:
            part(description, f"tools[{place}].function.description", "tools[].function.description")
    return tools


def _choice(value: Any, tools: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """``tool_choice`` as "auto", "none", "required" or "named", and the name."""
    if value is None or value == "auto":
        return ("auto" if tools else "none"), None
    if value == "none":
        return "none", None
    if isinstance(value, str):
        if not tools:
            raise combination("tool_choice", f"tool_choice is {show(value)}, but the request has no tools")
        return "required", None
    given = members(value, "tool_choice", {"type", "function"})
    if required(given, "type", "tool_choice") != "function":
        raise wrong_value("tool_choice.type", given["type"], "'function'")
    function = members(required(given, "function", "tool_choice"), "tool_choice.function", {"name"})
    path = "tool_choice.function.name"
    name = name_of(required(function, "name", "tool_choice.function"), path, "tools[].function.name")
    if name not in {tool["function"]["name"] for tool in tools}:
        raise combination(path, f"{path} is {show(name)}; none of the tools has this name")
    return "named", name


def check_continued(form: Form) -> None:
    """Refuse, by an ApiError, what a message that is continued cannot be."""
    if form.choice in ("required", "named"):
        raise combination("tool_choice", "a message that is continued cannot become a function call")
    if form.text is not None:
        raise combination(
            "response_format", "a message that is continued has no response_format: its beginning would not count"
        )


def constraint(
    form: Form, tokenizer: Tokenizer, grammar: Grammar | None, *, continues: bool
) -> tuple[Constraint | None, list[Source]]:
    """What the engine must keep to (None: the model may write anything), and the grammars in it, to be tried first.

    ``continues``: the answer goes on with other text. Without a Grammar nothing can be promised, so what needs one is
    refused; functions may be offered, and a call that cannot be read is then an error of its request.

    Raises:
        ApiError, MixtralError: the form cannot be kept, or the Grammar refuses a schema, regex or grammar.
    """
    if grammar is None:
        _refuse_promises(form)
        return None, []
    text = None if form.text is None else grammar.text_constraint(form.text)
    calls = None
    if form.offers_calls and not continues:
        calls = grammar.calls_constraint(form.tools, name=form.name, parallel=form.parallel)
    trigger = None if tokenizer.version == "v1" else tokenizer.control_id(_CALLS)
    if text is None and trigger is None:
        return None, []
    made = Constraint(
        text=None if text is None else text.text,
        calls=None if calls is None else calls.text,
        trigger=trigger,
        forced=form.choice in ("required", "named"),
        continues=continues,
    )
    return made, [source for source in (text, calls) if source is not None]


def _refuse_promises(form: Form) -> None:
    for asked, param in (
        (form.text is not None, "response_format"),
        (form.choice in ("required", "named"), "tool_choice"),
        (not form.parallel, "parallel_tool_calls"),
    ):
        if asked:
            message = f"{param}: this server was started without constrained output; leave it out"
            raise ApiError(400, "unsupported_parameter", message, param=param)
