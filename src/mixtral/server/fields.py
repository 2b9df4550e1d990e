"""Which request fields exist: those with an effect, and those that are refused unless they ask for nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mixtral.server.errors import ApiError, show

__all__ = ["CHAT_FIELDS", "COMPLETION_FIELDS", "boolean", "known_fields", "number", "text", "whole", "wrong_type"]

_SAMPLING_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "logprobs",
    "stream",
    "stream_options",
    "user",
)
CHAT_FIELDS = ("model", "messages", "tools", "tool_choice", "max_completion_tokens", "top_logprobs", *_SAMPLING_FIELDS)
COMPLETION_FIELDS = ("model", "prompt", *_SAMPLING_FIELDS)

# Field -> values that change nothing. null, {} and [] change nothing in any of them.
_NO_OPS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": (),
    "ignore_eos": (False,),
    "logit_bias": (),
    "metadata": (),
    "min_tokens": (0,),
    "mixtral": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_HINTS = {
    "n": "send one request per answer",
    "best_of": "send one request per answer",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "parallel_tool_calls": "the model decides how many functions it calls",
    "response_format": "ask for the format in a message; constrained output is not available",
    "echo": "put the prompt before the text yourself",
}


def known_fields(body: Mapping[str, Any], accepted: tuple[str, ...]) -> dict[str, Any]:
    """The accepted fields of a body that are not null. Every other field must be a known one that asks for nothing.

    Raises:
        ApiError: 400 ``unknown_parameter`` or ``unsupported_parameter``, naming the field.
    """
    found = {}
    for name, value in body.items():
        if name in accepted:
            if value is not None:
                found[name] = value
            continue
        if name not in _NO_OPS:
            known = (*accepted, *_NO_OPS)
            close = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            raise ApiError(400, "unknown_parameter", f"unknown field {show(name)}; {hint}", param=name)
        if not _asks_nothing(value, _NO_OPS[name]):
            hint = _HINTS.get(name, "remove it")
            message = f"{name} is {show(value)}; this server does not support it: {hint}"
            raise ApiError(400, "unsupported_parameter", message, param=name)
    return found


def _asks_nothing(value: Any, no_ops: tuple[Any, ...]) -> bool:
    if value is None or value == {} or value == []:
        return True
    # 1 == True and 1 == 1.0 in Python; a JSON value of another type is another value.
    return any(type(value) is type(no_op) and value == no_op for no_op in no_ops)


def wrong_type(name: str, value: object, expected: str) -> ApiError:
    """A 400 for a value of the wrong JSON type."""
    return ApiError(400, "invalid_type", f"{name} is {show(value)}; expected {expected}", param=name)


def number(fields: Mapping[str, Any], name: str) -> float | None:
    """A JSON number, or None if it was not given; its range is checked later."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, value, "a number")
    return value


def whole(fields: Mapping[str, Any], name: str, lowest: int, highest: int) -> int | None:
    """A JSON integer within bounds, or None if it was not given."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, value, "an integer")
    if not lowest <= value <= highest:
        message = f"{name} is {show(value)}; expected {lowest} to {highest}"
        raise ApiError(400, "invalid_value", message, param=name)
    return value


def boolean(fields: Mapping[str, Any], name: str) -> bool:
    """true or false; false if it was not given."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise wrong_type(name, value, "true or false")
    return value


def text(fields: Mapping[str, Any], name: str, longest: int) -> str | None:
    """A string of 1 to ``longest`` characters, or None if it was not given."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise wrong_type(name, value, "a string")
    if not 1 <= len(value) <= longest:
        message = f"{name} has {len(value)} characters; expected 1 to {longest}"
        raise ApiError(400, "invalid_value", message, param=name)
    return value
