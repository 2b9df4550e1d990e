"""Requests of the two generation routes: a JSON object in, a checked request out. A field has an effect or is a 400."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixtral.server.errors import ApiError, show
from mixtral.server.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    boolean,
    known_fields,
    number,
    text,
    whole,
    wrong_type,
)
from mixtral.tokenizer.turns import read_tools
from mixtral.wire import SamplingParams

__all__ = ["ChatRequest", "CompletionRequest", "Options", "read_chat", "read_completion"]

_TOKEN_LIMIT = 2**31 - 1
_STOPS, _STOP_BYTES = 16, 512
_MESSAGES = 4096
_TOOLS, _TOOLS_BYTES = 128, 256 * 1024
_PROMPTS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What both routes share. ``sampling`` holds checked fields of SamplingParams, with a seed, without max_tokens."""

    model: str
    sampling: dict[str, Any]
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    user: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A checked body of ``/v1/chat/completions``; the messages themselves are checked when they are encoded.

    ``tools`` is empty with ``tool_choice: "none"``: the model is not told of functions that it must not call.
    """

    options: Options
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A checked body of ``/v1/completions``: one or more prompts, texts or token ids."""

    options: Options
    prompts: list[str] | list[list[int]]


def read_chat(body: Mapping[str, Any]) -> ChatRequest:
    """The chat request in a body. Raises ApiError, RequestError or MessagesError, which name the field."""
    fields = known_fields(body, CHAT_FIELDS)
    max_tokens = _max_tokens(fields)
    wants = boolean(fields, "logprobs")
    top = whole(fields, "top_logprobs", 0, 20)
    if top is not None and not wants:
        message = "top_logprobs needs logprobs: true"
        raise ApiError(400, "unsupported_combination", message, param="top_logprobs")
    options = _options(fields, max_tokens, (top or 0) if wants else None)
    messages = _required(fields, "messages")
    if not isinstance(messages, list):
        raise wrong_type("messages", messages, "a list of messages")
    if not 1 <= len(messages) <= _MESSAGES:
        message = f"messages has {len(messages)} items; expected 1 to {_MESSAGES}"
        raise ApiError(400, "invalid_value", message, param="messages")
    for place, item in enumerate(messages):
        if isinstance(item, dict) and item.get("weight") is not None:
            path = f"messages[{place}].weight"
            raise ApiError(400, "unknown_parameter", f"unknown field {path}; remove it", param=path)
    tools = _tools(fields)
    return ChatRequest(options=options, messages=messages, tools=tools if _may_call(fields) else [])


def read_completion(body: Mapping[str, Any], *, vocab_size: int) -> CompletionRequest:
    """The completion request in a body; token ids are below ``vocab_size``. Raises ApiError or RequestError."""
    fields = known_fields(body, COMPLETION_FIELDS)
    options = _options(fields, _max_tokens(fields), whole(fields, "logprobs", 0, 5))
    return CompletionRequest(options=options, prompts=_prompts(_required(fields, "prompt"), vocab_size))


def _options(fields: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> Options:
    model = _required(fields, "model")
    if not isinstance(model, str):
        raise wrong_type("model", model, "the name of a model")
    stream = boolean(fields, "stream")
    return Options(
        model=model,
        sampling=_sampling(fields, logprobs),
        max_tokens=max_tokens,
        stop=_stop(fields.get("stop")),
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream=stream),
        user=text(fields, "user", 128),
    )


def _sampling(fields: Mapping[str, Any], logprobs: int | None) -> dict[str, Any]:
    given: dict[str, Any] = {
        name: value
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := number(fields, name)) is not None
    }
    top_k = whole(fields, "top_k", -1, _TOKEN_LIMIT)
    seed = whole(fields, "seed", -(2**63), 2**63 - 1)
    # 53 bits: a seed that was drawn here can be sent back by clients whose numbers are doubles.
    given["seed"] = secrets.randbits(53) if seed is None else seed
    given |= {"top_k": max(top_k or 0, 0), "logprobs": logprobs}
    SamplingParams(**given)  # checks the ranges
    return given


def _max_tokens(fields: Mapping[str, Any]) -> int | None:
    old = whole(fields, "max_tokens", 1, _TOKEN_LIMIT)
    new = whole(fields, "max_completion_tokens", 1, _TOKEN_LIMIT)
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens is {new}; send one of them"
        raise ApiError(400, "unsupported_combination", message, param="max_completion_tokens")
    return old if new is None else new


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list):
        raise wrong_type("stop", value, "a string or a list of strings")
    if len(words) > _STOPS:
        message = f"stop has {len(words)} strings; expected at most {_STOPS}"
        raise ApiError(400, "invalid_value", message, param="stop")
    for place, word in enumerate(words):
        path = f"stop[{place}]" if words is value else "stop"
        if not isinstance(word, str):
            raise wrong_type(path, word, "a string")
        if not 1 <= len(word.encode()) <= _STOP_BYTES:
            message = f"{path} has {len(word.encode())} bytes; expected 1 to {_STOP_BYTES}"
            raise ApiError(400, "invalid_value", message, param=path)
    return tuple(words)


def _include_usage(value: Any, *, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise wrong_type("stream_options", value, "an object")
    if not stream:
        message = "stream_options needs stream: true"
        raise ApiError(400, "unsupported_combination", message, param="stream_options")
    for name in value:
        path = f"stream_options.{name}"
        if name == "include_obfuscation" and value[name] in (None, False):
            continue
        if name != "include_usage":
            raise ApiError(400, "unknown_parameter", f"unknown field {show(path)}; remove it", param=path)
        if value[name] is not None and not isinstance(value[name], bool):
            raise wrong_type(path, value[name], "true or false")
    return bool(value.get("include_usage"))


def _tools(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = fields.get("tools", [])
    if not isinstance(tools, list):
        raise wrong_type("tools", tools, "a list of functions")
    if len(tools) > _TOOLS or len(json.dumps(tools, ensure_ascii=False).encode()) > _TOOLS_BYTES:
        message = f"tools is too large; expected at most {_TOOLS} functions and {_TOOLS_BYTES} bytes together"
        raise ApiError(400, "invalid_value", message, param="tools")
    read_tools(tools)
    for place, tool in enumerate(tools):
        if tool["function"].get("strict"):
            path = f"tools[{place}].function.strict"
            message = f"{path} is true; this server does not constrain arguments: remove it"
            raise ApiError(400, "unsupported_parameter", message, param=path)
    return tools


def _may_call(fields: Mapping[str, Any]) -> bool:
    choice = fields.get("tool_choice", "auto")
    if choice in ("required", "any") or isinstance(choice, dict):
        message = f"tool_choice is {show(choice)}; this server supports 'auto' and 'none'"
        raise ApiError(400, "unsupported_parameter", message, param="tool_choice")
    if choice not in ("auto", "none"):
        message = f"tool_choice is {show(choice)}; expected 'auto' or 'none'"
        raise ApiError(400, "invalid_value", message, param="tool_choice")
    return bool(choice == "auto")


def _prompts(value: Any, vocab_size: int) -> list[str] | list[list[int]]:
    if isinstance(value, str):
        return [value]
    expected = "a string, a list of strings, a list of token ids, or a list of such lists"
    if not isinstance(value, list):
        raise wrong_type("prompt", value, expected)
    if not value:
        raise ApiError(400, "invalid_value", f"prompt is an empty list; expected {expected}", param="prompt")
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value):
        if len(value) > _PROMPTS:
            message = f"prompt has {len(value)} items; expected at most {_PROMPTS} prompts"
            raise ApiError(400, "invalid_value", message, param="prompt")
        for place, item in enumerate(value):
            if isinstance(item, list):
                _check_ids(item, f"prompt[{place}]", vocab_size)
        return value
    if isinstance(value[0], str | list):
        raise wrong_type("prompt", value, f"{expected}, not a mixture")
    _check_ids(value, "prompt", vocab_size)
    return [value]


def _check_ids(ids: list[Any], path: str, vocab_size: int) -> None:
    if not ids:
        raise ApiError(400, "invalid_value", f"{path} has no token ids; expected at least one", param=path)
    for place, id in enumerate(ids):
        if isinstance(id, bool) or not isinstance(id, int):
            raise wrong_type(f"{path}[{place}]", id, "a token id")
        if not 0 <= id < vocab_size:
            message = f"{path}[{place}] is {show(id)}; expected a token id from 0 to {vocab_size - 1}"
            raise ApiError(400, "invalid_value", message, param=f"{path}[{place}]")


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ApiError(400, "missing_required_parameter", f"the field {name} is missing", param=name)
    return fields[name]
