"""Requests: a JSON object in, a checked request out. A field has an effect or is a 400 that names it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixtral.limits import CHAT, COMPLETIONS, DETOKENIZE, PARTS, TOKENIZE
from mixtral.server.errors import ApiError
from mixtral.server.fields import combination, known_fields, members, part, required, wrong_type, wrong_value
from mixtral.server.formats import Form, read_form, read_response_format
from mixtral.server.routing import Telemetry, read_telemetry
from mixtral.tokenizer.turns import read_tools

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "Options",
    "TokenizeRequest",
    "read_chat",
    "read_completion",
    "read_detokenize",
    "read_tokenize",
]

_PROMPTS = int(PARTS["prompts x n"].high or 0)
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_ID_DIGITS = frozenset("0123456789")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What both routes share. ``sampling`` holds checked fields of SamplingParams, with a seed, without max_tokens.

    ``users`` are the names that the log shows as a hash.
    """

    model: str
    sampling: dict[str, Any]
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    priority: int
    cache_key: str
    users: tuple[str, ...]
    telemetry: Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A checked body of ``/v1/chat/completions``; the messages themselves are checked when they are encoded."""

    options: Options
    messages: list[dict[str, Any]]
    form: Form


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A checked body of ``/v1/completions``: one or more prompts, texts or token ids.

    With ``echo`` the prompts come first in the answer, scored if log-probabilities were asked for.
    """

    options: Options
    prompts: list[str] | list[list[int]]
    form: Form
    echo: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """A checked body of ``/tokenize``: a text, or (``messages``) a conversation with its tools."""

    model: str | None
    prompt: str
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]]
    bos: bool
    pieces: bool


def read_chat(body: Mapping[str, Any], *, vocab_size: int, layers: int) -> ChatRequest:
    """The chat request in a body. Raises ApiError or MessagesError, which name the field."""
    fields = known_fields(body, CHAT)
    old, new = fields.get("max_tokens"), fields.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens is {new}; send one of them"
        raise combination("max_completion_tokens", message)
    top = fields.get("top_logprobs")
    if top is not None and not fields.get("logprobs"):
        raise combination("top_logprobs", "top_logprobs needs logprobs: true")
    form = read_form(fields)
    options = _options(fields, form, old if new is None else new, vocab_size=vocab_size, layers=layers)
    options.sampling["logprobs"] = (top or 0) if fields.get("logprobs") else None
    _refuse_weights(fields["messages"])
    return ChatRequest(options=options, messages=fields["messages"], form=form)


def read_completion(body: Mapping[str, Any], *, vocab_size: int, layers: int) -> CompletionRequest:
    """The completion request in a body; token ids are below ``vocab_size``. Raises ApiError, which names the field."""
    fields = known_fields(body, COMPLETIONS)
    form = Form(text=read_response_format(fields.get("response_format")))
    options = _options(fields, form, fields.get("max_tokens"), vocab_size=vocab_size, layers=layers)
    echo, logprobs = fields.get("echo", False), fields.get("logprobs")
    if fields.get("best_of") not in (None, options.n):
        raise combination("best_of", f"best_of is {fields['best_of']}; expected n, which is {options.n}, or nothing")
    if echo and options.stream:
        raise combination("echo", "echo needs a whole answer; leave stream out")
    if options.max_tokens == 0 and not echo:
        raise combination("max_tokens", "max_tokens is 0; expected at least 1, except with echo: true")
    if options.max_tokens == 0 and options.telemetry.mode != "none":
        message = "mixtral.routing comes with the tokens of an answer, and max_tokens is 0; expected at least 1"
        raise combination("mixtral.routing", message)
    options.sampling["logprobs"] = logprobs
    if echo and (logprobs is not None or options.max_tokens == 0):
        options.sampling["prompt_logprobs"] = logprobs or 0
    prompts = _prompts(fields["prompt"], vocab_size)
    if len(prompts) * options.n > _PROMPTS:
        raise combination("n", f"{len(prompts)} prompts with n {options.n} are too many; expected at most {_PROMPTS}")
    return CompletionRequest(options=options, prompts=prompts, form=form, echo=echo)


def read_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    """The request in a body of ``/tokenize``. Raises ApiError or MessagesError, which name the field."""
    fields = known_fields(body, TOKENIZE)
    if ("prompt" in fields) == ("messages" in fields):
        if "prompt" in fields:
            raise combination("messages", "prompt and messages are both given; send one of them")
        raise required({}, "prompt")
    if "messages" not in fields:
        for name in ("tools",):
            if fields.get(name):
                raise combination(name, f"{name} needs messages")
    elif "add_special_tokens" in fields:
        raise combination("add_special_tokens", "a conversation has its own control tokens; leave it out")
    else:
        read_tools(fields.get("tools", []))
        _refuse_weights(fields["messages"])
    return TokenizeRequest(
        model=fields.get("model"),
        prompt=fields.get("prompt", ""),
        messages=fields.get("messages"),
        tools=fields.get("tools", []),
        bos=fields.get("add_special_tokens", True),
        pieces=fields.get("return_pieces", False),
    )


def read_detokenize(body: Mapping[str, Any], *, vocab_size: int) -> tuple[str | None, list[int]]:
    """Model and token ids in a body of ``/detokenize``. Raises ApiError, which names the field."""
    fields = known_fields(body, DETOKENIZE)
    _check_ids(fields["tokens"], "tokens", vocab_size)
    return fields.get("model"), fields["tokens"]


def _options(fields: Mapping[str, Any], form: Form, max_tokens: int | None, *, vocab_size: int, layers: int) -> Options:
    stream = fields.get("stream", False)
    stop = _stop(fields.get("stop"))
    sampling: dict[str, Any] = {name: float(fields[name]) for name in _NUMBERS if name in fields}
    # 53 bits: a seed that was drawn here can be sent back by clients whose numbers are doubles.
    sampling["seed"] = fields.get("seed", secrets.randbits(53))
    sampling["top_k"] = max(fields.get("top_k", 0), 0)
    sampling["logit_bias"] = _logit_bias(fields.get("logit_bias", {}), vocab_size)
    for name in ("min_tokens", "ignore_eos"):
        if fields.get(name):
            if form.text is not None or form.offers_calls:
                raise combination(name, f"{name} cannot be kept with response_format or tools; leave it out")
            sampling[name] = fields[name]
    if stop and form.text is not None:
        raise combination("stop", "a stop string could cut the response_format; leave one of them out")
    return Options(
        model=fields["model"],
        sampling=sampling,
        max_tokens=max_tokens,
        n=fields.get("n", 1),
        stop=stop,
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream=stream),
        priority=fields.get("priority", 0),
        cache_key=fields.get("prompt_cache_key", ""),
        users=tuple(fields[name] for name in ("user", "safety_identifier") if name in fields),
        telemetry=read_telemetry(fields.get("mixtral"), layers),
    )


def _logit_bias(given: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    found = {}
    for key, value in given.items():
        path = f"logit_bias.{key}"
        plain = 0 < len(key) <= 6 and _ID_DIGITS.issuperset(key) and str(int(key)) == key
        if not plain or int(key) >= vocab_size:
            expected = f"token ids from 0 to {vocab_size - 1} as keys"
            raise wrong_value("logit_bias", key, expected)
        found[int(key)] = float(part(value, path, "logit_bias.ID"))
    return found


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    words = [value] if isinstance(value, str) else value
    for place, word in enumerate(words):
        part(word, f"stop[{place}]" if words is value else "stop", "stop[]")
    return tuple(words)


def _include_usage(value: Any, *, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise combination("stream_options", "stream_options needs stream: true")
    given = members(value, "stream_options", {"include_usage", "include_obfuscation"})
    for name, member in given.items():
        if not isinstance(member, bool):
            raise wrong_type(f"stream_options.{name}", member, "true or false")
    if given.get("include_obfuscation"):
        path = "stream_options.include_obfuscation"
        raise ApiError(400, "unsupported_parameter", f"{path} is true; this server does not support it", param=path)
    return bool(given.get("include_usage"))


def _refuse_weights(messages: list[Any]) -> None:
    """``weight`` is of training alone."""
    for place, item in enumerate(messages):
        if isinstance(item, dict) and item.get("weight") is not None:
            path = f"messages[{place}].weight"
            raise ApiError(400, "unknown_parameter", f"unknown field {path}; remove it", param=path)


def _prompts(value: Any, vocab_size: int) -> list[str] | list[list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], str | list) and len(value) > _PROMPTS:
        message = f"prompt has {len(value)} items; expected at most {_PROMPTS} prompts"
        raise ApiError(400, "invalid_value", message, param="prompt")
    if all(isinstance(item, str) for item in value):
        return value  # type: ignore[no-any-return]
    if all(isinstance(item, list) for item in value):
        for place, item in enumerate(value):
            _check_ids(item, f"prompt[{place}]", vocab_size, low=1)
        return value  # type: ignore[no-any-return]
    if isinstance(value[0], str | list):
        expected = "a string, a list of strings, a list of token ids, or a list of such lists, not a mixture"
        raise wrong_type("prompt", value, expected)
    _check_ids(value, "prompt", vocab_size)
    return [value]


def _check_ids(ids: list[Any], path: str, vocab_size: int, *, low: int = 0) -> None:
    if len(ids) < low:
        raise ApiError(400, "invalid_value", f"{path} has no token ids; expected at least one", param=path)
    for place, id in enumerate(ids):
        if isinstance(id, bool) or not isinstance(id, int):
            raise wrong_type(f"{path}[{place}]", id, "a token id")
        if not 0 <= id < vocab_size:
            raise wrong_value(f"{path}[{place}]", id, f"a token id from 0 to {vocab_size - 1}")
