"""Messages and function definitions in the OpenAI format, checked: the rules that a conversation can break."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mixtral.errors import MessagesError
from mixtral.limits import PARTS
from mixtral.tokenizer.calls import FUNCTION_NAME, ToolCall

__all__ = ["Role", "Turn", "read_tools", "read_turns"]

_PARTS = int(PARTS["messages[].content"].high or 0)
_CALLS = int(PARTS["messages[].tool_calls"].high or 0)
Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[object, Role] = {role: role for role in get_args(Role)} | {"developer": "system"}
_KEYS: dict[Role, set[str]] = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls", "prefix", "weight"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
_AFTER: dict[Role, set[Role]] = {
    "system": {"system", "user", "assistant"},
    "user": {"system", "user", "assistant"},
    "assistant": {"user", "assistant", "tool"},
    "tool": {"user", "assistant", "tool"},
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One checked message. ``where`` is its path; ``filled`` says that content was given and not empty."""

    role: Role
    where: str
    text: str = ""
    filled: bool = False
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str | None = None
    prefix: bool = False
    weight: float | None = None


def read_turns(messages: Sequence[Mapping[str, Any]], *, for_training: bool) -> list[Turn]:
    """The messages as turns, one each. Raises MessagesError with the path of the first place that breaks a rule."""
    if not isinstance(messages, Sequence) or not messages:
        raise _wrong("messages", messages, "a list with at least one message")
    turns = []
    for place, message in enumerate(messages):
        last = place == len(messages) - 1
        turns.append(_read(message, f"messages[{place}]", last=last, for_training=for_training))
    _check_order(turns, for_training=for_training)
    _check_results(turns, for_training=for_training)
    return turns


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Function definitions with the keys and the order that the model was trained on. Raises MessagesError."""
    if not isinstance(tools, Sequence):
        raise _wrong("tools", tools, "a list of function definitions")
    found: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        given = _members(tool, where, {"type", "function"})
        if given.get("type", "function") != "function":
            raise _wrong(f"{where}.type", given["type"], '"function"')
        where += ".function"
        function = _members(given.get("function"), where, {"name", "description", "parameters", "strict"})
        name = _name(function.get("name"), f"{where}.name")
        if name in found:
            raise _wrong(f"{where}.name", name, "a name that no other function of the request has")
        if not isinstance(description := function.get("description", ""), str):
            raise _wrong(f"{where}.description", description, "text")
        if not isinstance(parameters := function.get("parameters", {}), Mapping):
            raise _wrong(f"{where}.parameters", parameters, "a JSON schema object")
        if not isinstance(function.get("strict", False), bool):
            raise _wrong(f"{where}.strict", function["strict"], "true or false")
        found[name] = {"name": name, "description": description, "parameters": dict(parameters)}
    return [{"type": "function", "function": function} for function in found.values()]


def _read(message: Any, where: str, *, last: bool, for_training: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise _wrong(where, message, "an object")
    given = message.get("role")
    if not isinstance(given, str) or given not in _ROLES:
        raise _wrong(f"{where}.role", given, "system, developer, user, assistant or tool")
    role = _ROLES[given]
    members = _members(message, where, _KEYS[role])
    content = members.get("content")
    if content is None and role != "assistant":
        raise _wrong(f"{where}.content", content, "text or a list of text parts")
    text = "" if content is None else _text(content, f"{where}.content")
    if role == "assistant":
        return _read_assistant(members, where, text, last=last, for_training=for_training)
    if role == "tool":
        name = _name(members["name"], f"{where}.name") if "name" in members else None
        return Turn(role, where, text, call_id=_id(members.get("tool_call_id"), f"{where}.tool_call_id"), name=name)
    return Turn(role, where, text, filled=bool(content))


def _read_assistant(members: Mapping[str, Any], where: str, text: str, *, last: bool, for_training: bool) -> Turn:
    listed = members.get("tool_calls", ())
    if not isinstance(listed, Sequence):
        raise _wrong(f"{where}.tool_calls", listed, "a list of function calls")
    if len(listed) > _CALLS:
        message = f"{where}.tool_calls has {len(listed)} calls; expected at most {_CALLS}"
        raise MessagesError(message, param=f"{where}.tool_calls")
    calls = tuple(
        _read_call(call, f"{where}.tool_calls[{place}]", needs_id=not (for_training and last))
        for place, call in enumerate(listed)
    )
    if bool(text) == bool(calls):
        what = "both content and tool_calls" if calls else "neither content nor tool_calls"
        raise MessagesError(f"{where} has {what}; expected exactly one of them", param=where)
    if not isinstance(prefix := members.get("prefix", False), bool):
        raise _wrong(f"{where}.prefix", prefix, "true or false")
    if prefix and (not last or calls or for_training):
        raise _wrong(f"{where}.prefix", prefix, "true only with the content of the last message, and not in training")
    weight = members.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _wrong(f"{where}.weight", weight, "0 (not trained) or 1")
    return Turn("assistant", where, text, calls=calls, prefix=prefix, weight=weight)


def _read_call(call: Any, where: str, *, needs_id: bool) -> ToolCall:
    given = _members(call, where, {"id", "type", "function"})
    if given.get("type", "function") != "function":
        raise _wrong(f"{where}.type", given["type"], '"function"')
    function = _members(given.get("function"), f"{where}.function", {"name", "arguments"})
    if not isinstance(arguments := function.get("arguments", "{}"), str):
        raise _wrong(f"{where}.function.arguments", arguments, "JSON as a string")
    id = _id(given.get("id"), f"{where}.id") if needs_id or "id" in given else ""
    return ToolCall(id, _name(function.get("name"), f"{where}.function.name"), arguments)


def _check_order(turns: Sequence[Turn], *, for_training: bool) -> None:
    for before, turn in itertools.pairwise(turns):
        if turn.role not in _AFTER[before.role]:
            allowed = ", ".join(sorted(_AFTER[before.role]))
            raise _wrong(f"{turn.where}.role", turn.role, f"after {before.role}: {allowed}")
    last = turns[-1]
    if for_training and last.role != "assistant":
        raise _wrong(f"{last.where}.role", last.role, "assistant: the last message is what is learnt")
    if not for_training and last.role not in {"user", "tool"} and not last.prefix:
        raise _wrong(f"{last.where}.role", last.role, 'user or tool as the last role, or assistant with "prefix": true')


def _check_results(turns: Sequence[Turn], *, for_training: bool) -> None:
    """Directly after its calls, each call has exactly one result; only the last turn in training has none."""
    missing: list[str] = []
    for turn in turns:
        if turn.role == "tool":
            where = f"{turn.where}.tool_call_id"
            if turn.call_id not in missing:
                raise _wrong(where, turn.call_id, "the id of a call of the assistant turn before, each once")
            missing.remove(turn.call_id)
            continue
        if missing:
            raise _unanswered(missing[0], turn.where)
        missing = [call.id for call in turn.calls]
        for place, call in enumerate(turn.calls):
            if call.id and call.id in missing[:place]:
                raise _wrong(f"{turn.where}.tool_calls[{place}].id", call.id, "a different id for each call of a turn")
    if missing and not (for_training and turns[-1].calls):
        raise _unanswered(missing[0], "messages")


def _unanswered(id: str, where: str) -> MessagesError:
    text = f"{where}: the call {_show(id)} before has no result; send one message of role tool for each call"
    return MessagesError(text, param=where)


def _members(value: Any, where: str, known: set[str]) -> dict[str, Any]:
    """The members of an object that are not null. An unknown key with a value is an error."""
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "an object")
    found = {key: member for key, member in value.items() if member is not None}
    for key in found:
        if key not in known:
            path = f"{where}.{_show(str(key))[1:-1]}"
            raise MessagesError(f"{path} is an unknown key; expected {', '.join(sorted(known))}", param=path)
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise _wrong(where, content, "text or a list of text parts")
    if len(content) > _PARTS:
        raise MessagesError(f"{where} has {len(content)} parts; expected at most {_PARTS}", param=where)
    parts = []
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            got = part.get("type") if isinstance(part, Mapping) else part
            raise _wrong(f"{where}[{place}].type", got, '"text"; Mixtral reads text only')
        text = _members(part, f"{where}[{place}]", {"type", "text"}).get("text")
        if not isinstance(text, str):
            raise _wrong(f"{where}[{place}].text", text, "text")
        parts.append(text)
    return "\n\n".join(text for text in parts if text)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not FUNCTION_NAME.fullmatch(value):
        raise _wrong(where, value, "1 to 64 letters, digits, _ or -")
    return value


def _id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isprintable():
        raise _wrong(where, value, "the id of a call: 1 to 128 printable characters")
    return value


def _wrong(where: str, got: object, expected: str) -> MessagesError:
    return MessagesError(f"{where} is {_show(got)}; expected {expected}", param=where)


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 64 else shown[:61] + "..."
