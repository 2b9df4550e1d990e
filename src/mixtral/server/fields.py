"""Reading fields by the table of limits: what has an effect is checked, all else refused unless it asks for nothing."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from mixtral.limits import PARTS, REFUSED, Kind, Limit
from mixtral.server.errors import ApiError, show

__all__ = [
    "combination",
    "known_fields",
    "members",
    "name_of",
    "part",
    "required",
    "value_of",
    "wrong_type",
    "wrong_value",
]

_WORDS: dict[Kind, str] = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "list": "a list",
    "object": "an object",
}
_TYPES: dict[Kind, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
    "list": (list,),
    "object": (dict,),
}
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def known_fields(body: Mapping[str, Any], limits: Mapping[str, Limit]) -> dict[str, Any]:
    """The fields of a body that are in ``limits`` and not null, checked against them.

    Raises:
        ApiError: 400 ``unknown_parameter``, ``unsupported_parameter``, ``missing_required_parameter``, ``invalid_type``
            or ``invalid_value``, naming the field.
    """
    found = {}
    for name, value in body.items():
        if name in limits:
            if value is not None:
                found[name] = value_of(value, name, limits[name])
        elif name in REFUSED:
            _check_refused(name, value)
        else:
            close = difflib.get_close_matches(name[:64], (*limits, *REFUSED), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            raise ApiError(400, "unknown_parameter", f"unknown field {show(name)}; {hint}", param=name)
    for name, limit in limits.items():
        if limit.required:
            required(found, name)
    return found


def _check_refused(name: str, value: Any) -> None:
    refused = REFUSED[name]
    if value is None or value == {} or value == []:
        return
    # 1 == True and 1 == 1.0 in Python; a JSON value of another type is another value.
    if not any(type(value) is type(no_op) and value == no_op for no_op in refused.no_ops):
        message = f"{name} is {show(value)}; this server does not support it: {refused.hint}"
        raise ApiError(400, "unsupported_parameter", message, param=name)


def value_of(value: Any, path: str, limit: Limit) -> Any:
    """``value`` if it is within its limit. Raises ApiError ``invalid_type`` or ``invalid_value``."""
    kind = next((kind for kind in (limit.kind, *limit.also) if _is(value, kind)), None)
    if kind is None:
        words = " or ".join(_WORDS[kind] for kind in (limit.kind, *limit.also))
        raise wrong_type(path, value, words)
    if kind != limit.kind:
        return value  # bounds are those of the main kind; what else it may be is checked where it is read
    if limit.values and value not in limit.values:
        raise wrong_value(path, value, " or ".join(map(repr, limit.values)))
    size = value if kind in ("integer", "number") else len(value) if kind in ("string", "list", "object") else 0
    low, high = limit.low, limit.high
    if (low is not None and size < low) or (high is not None and size > high):
        bounds = f"{low or 0:.12g} to {high:.12g}" if high is not None else f"at least {low:.12g}"
        if size is value:
            raise wrong_value(path, value, bounds)
        units = {"string": "characters", "list": "items", "object": "entries"}[kind]
        raise ApiError(400, "invalid_value", f"{path} has {size} {units}; expected {bounds}", param=path)
    return value


def _is(value: Any, kind: Kind) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def part(value: Any, path: str, name: str) -> Any:
    """``value``, checked as the part ``name`` of the table."""
    return value_of(value, path, PARTS[name])


def members(value: Any, path: str, known: Collection[str]) -> dict[str, Any]:
    """The members of an object that are not null. Raises ApiError for an unknown one that is not null."""
    if not isinstance(value, dict):
        raise wrong_type(path, value, "an object")
    found = {key: member for key, member in value.items() if member is not None}
    for key in found:
        if key not in known:
            at = f"{path}.{show(key)[1:-1]}"
            message = f"unknown field {at}; expected {', '.join(sorted(known))}"
            raise ApiError(400, "unknown_parameter", message, param=at)
    return found


def required(fields: Mapping[str, Any], name: str, path: str = "") -> Any:
    """A field that must be there. Raises ApiError ``missing_required_parameter``."""
    if name not in fields:
        path = f"{path}.{name}" if path else name
        raise ApiError(400, "missing_required_parameter", f"the field {path} is missing", param=path)
    return fields[name]


def name_of(value: Any, path: str, name: str) -> str:
    """A name of letters, digits, ``_`` and ``-``, checked as the part ``name`` of the table."""
    text: str = part(value, path, name)
    if not _NAME.issuperset(text):
        raise wrong_value(path, value, "letters, digits, _ or -")
    return text


def wrong_type(path: str, value: object, expected: str) -> ApiError:
    """A 400 for a value of the wrong JSON type."""
    return ApiError(400, "invalid_type", f"{path} is {show(value)}; expected {expected}", param=path)


def wrong_value(path: str, value: object, expected: str) -> ApiError:
    """A 400 for a value out of its range."""
    return ApiError(400, "invalid_value", f"{path} is {show(value)}; expected {expected}", param=path)


def combination(path: str, message: str) -> ApiError:
    """A 400 for fields that do not go together."""
    return ApiError(400, "unsupported_combination", message, param=path)
