"""Limits of every number, size and depth in a request: one table for validation, OpenAPI, documentation and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "BODY",
    "CHAT",
    "COMPLETIONS",
    "DETOKENIZE",
    "PARTS",
    "REFUSED",
    "ROUTES",
    "TOKENIZE",
    "Kind",
    "Limit",
    "Refused",
    "markdown",
]

Kind = Literal["integer", "number", "boolean", "string", "list", "object"]
VOCABULARY = 32_768  # of the largest tokenizer
_INT31 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A field of a request. ``low`` and ``high`` bound a number, the characters of a string, or the items of a list or
    object. ``also`` are other JSON types that the field may have, checked where it is read. null is no value.
    """

    kind: Kind
    low: float | None = None
    high: float | None = None
    default: str = "none"
    required: bool = False
    also: tuple[Kind, ...] = ()
    values: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A field that other servers have. It may only hold a value that asks for nothing: null, {}, [] or ``no_ops``."""

    no_ops: tuple[Any, ...] = ()
    hint: str = "remove it"


_MODEL = Limit(kind="string", low=1, high=128, required=True, default="required", about="a name from `/v1/models`")
_MESSAGES = Limit(
    kind="list",
    low=1,
    high=4096,
    required=True,
    default="required",
    about="roles system, developer, user, assistant, tool; the last is from the user or a tool, or an assistant's with "
    "`prefix: true`, which is continued",
)
_TOOLS = Limit(kind="list", low=0, high=128, about="functions; needs a v2 or v3 tokenizer; 256 KiB together")
_SAMPLING: dict[str, Limit] = {
    "min_tokens": Limit(kind="integer", low=0, high=_INT31, default="0", about="tokens before the answer may end"),
    "ignore_eos": Limit(kind="boolean", default="false", about="never end before `max_tokens`"),
    "n": Limit(kind="integer", low=1, high=64, default="1", about="answers to each prompt"),
    "temperature": Limit(
        kind="number", low=0, high=2, default="1", about="below 0.001 the most likely token, ties to the lower id"
    ),
    "top_p": Limit(kind="number", low=0, high=1, default="1", about="0 keeps one token"),
    "top_k": Limit(kind="integer", low=-1, high=VOCABULARY, default="0", about="-1 and 0 are off"),
    "min_p": Limit(kind="number", low=0, high=1, default="0"),
    "presence_penalty": Limit(kind="number", low=-2, high=2, default="0"),
    "frequency_penalty": Limit(kind="number", low=-2, high=2, default="0"),
    "repetition_penalty": Limit(kind="number", low=0.5, high=2, default="1"),
    "logit_bias": Limit(
        kind="object", low=0, high=1024, default="{}", about="token id -> -100 to 100, added to its logit"
    ),
    "seed": Limit(kind="integer", low=-(2**63), high=2**63 - 1, default="drawn", about="told in `x-mixtral-seed`"),
    "stop": Limit(
        kind="list", low=0, high=16, also=("string",), about="a string or several; ends the text and is not part of it"
    ),
    "stream": Limit(kind="boolean", default="false"),
    "stream_options": Limit(kind="object", about="`include_usage`; needs `stream`"),
    "user": Limit(kind="string", low=1, high=128, about="logged as a hash"),
    "safety_identifier": Limit(kind="string", low=1, high=128, about="logged as a hash"),
    "prompt_cache_key": Limit(
        kind="string", low=1, high=128, about="requests with different keys share no cached prefix"
    ),
    "priority": Limit(kind="integer", low=-_INT31, high=_INT31, default="0", about="lower waits less"),
    "mixtral": Limit(kind="object", about="`routing`: which experts each token used"),
}
CHAT: dict[str, Limit] = {
    "model": _MODEL,
    "messages": _MESSAGES,
    "max_tokens": Limit(
        kind="integer", low=1, high=_INT31, default="what the context leaves, at most 4096", about="of the answer"
    ),
    "max_completion_tokens": Limit(kind="integer", low=1, high=_INT31, about="newer name of `max_tokens`"),
    **_SAMPLING,
    "logprobs": Limit(kind="boolean", default="false"),
    "top_logprobs": Limit(kind="integer", low=0, high=20, default="0", about="needs `logprobs`"),
    "tools": _TOOLS,
    "tool_choice": Limit(
        kind="string",
        values=("auto", "none", "required", "any"),
        also=("object",),
        default="auto with tools",
        about='or `{"type": "function", "function": {"name": ...}}`',
    ),
    "parallel_tool_calls": Limit(kind="boolean", default="true", about="false: one call at most"),
    "response_format": Limit(
        kind="object", default="text", about="`type`: text, json_object, json_schema, regex, grammar, choice"
    ),
}
COMPLETIONS: dict[str, Limit] = {
    "model": _MODEL,
    "prompt": Limit(
        kind="list",
        low=1,
        also=("string",),
        required=True,
        default="required",
        about="a string, up to 128 strings, token ids, or up to 128 lists of them; prompts times `n` at most 128",
    ),
    "max_tokens": Limit(kind="integer", low=0, high=_INT31, default="16", about="0 only with `echo`"),
    **_SAMPLING,
    "logprobs": Limit(kind="integer", low=0, high=5, about="alternatives listed per token"),
    "echo": Limit(kind="boolean", default="false", about="the prompt comes first, scored if `logprobs`; not a stream"),
    "best_of": Limit(kind="integer", low=1, high=64, about="only equal to `n`"),
    "response_format": CHAT["response_format"],
}
TOKENIZE: dict[str, Limit] = {
    "model": Limit(kind="string", low=1, high=128, about="a name from `/v1/models`"),
    "prompt": Limit(kind="string", low=0, about="a text, or `messages` instead"),
    "messages": Limit(kind="list", low=1, high=4096, about="encoded as for an answer"),
    "tools": _TOOLS,
    "add_special_tokens": Limit(kind="boolean", default="true", about="BOS in front of `prompt`"),
    "return_pieces": Limit(kind="boolean", default="false", about="the vocabulary's name of each token"),
}
DETOKENIZE: dict[str, Limit] = {
    "model": TOKENIZE["model"],
    "tokens": Limit(kind="list", low=0, high=65_536, required=True, default="required", about="token ids"),
}
ROUTES: dict[str, dict[str, Limit]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}
# Parts of the fields above.
PARTS: dict[str, Limit] = {
    "messages[].content": Limit(kind="list", low=0, high=256, also=("string",), about="a string, or text parts"),
    "messages[].tool_calls": Limit(kind="list", low=0, high=128),
    "messages[].tool_calls[].id": Limit(kind="string", low=1, high=128, about="printable"),
    "stop[]": Limit(kind="string", low=1, high=512),
    "logit_bias.ID": Limit(kind="number", low=-100, high=100),
    "tools[].function.name": Limit(kind="string", low=1, high=64, about="letters, digits, `_`, `-`; unique"),
    "tools[].function.description": Limit(kind="string", low=0, high=8192),
    "tools (bytes as JSON)": Limit(kind="integer", high=256 * 1024),
    "response_format.json_schema.name": Limit(kind="string", low=1, high=64, about="letters, digits, `_`, `-`"),
    "response_format.regex": Limit(kind="string", low=1, high=4096),
    "response_format.grammar.definition": Limit(kind="string", low=1, high=32_768),
    "response_format.choice": Limit(kind="list", low=1, high=1024, about="different texts"),
    "response_format.choice[]": Limit(kind="string", low=1, high=4096),
    "mixtral.routing": Limit(kind="string", values=("none", "counts", "experts", "weights"), default="none"),
    "mixtral.routing (tokens of a request)": Limit(kind="integer", high=8192, about="for experts and weights"),
    "prompts x n": Limit(kind="integer", high=128),
}
# Of the body as a whole.
BODY: dict[str, int] = {"levels": 64, "values": 200_000, "characters of a number": 64}

_FORMAT = "use response_format"
REFUSED: dict[str, Refused] = {
    "audio": Refused(),
    "add_generation_prompt": Refused(no_ops=(True,), hint="to continue a message, set prefix: true in it"),
    "allowed_token_ids": Refused(hint="use logit_bias, or response_format"),
    "bad_words": Refused(hint="use logit_bias"),
    "cache_salt": Refused(hint="use prompt_cache_key"),
    "chat_template": Refused(hint="the chat format is that of the model"),
    "chat_template_kwargs": Refused(hint="the chat format is that of the model"),
    "continue_final_message": Refused(no_ops=(False,), hint="set prefix: true in the last message"),
    "documents": Refused(hint="put the texts into a message"),
    "function_call": Refused(no_ops=("auto", "none"), hint="use tool_choice"),
    "functions": Refused(hint="use tools"),
    "guided_choice": Refused(hint=_FORMAT),
    "guided_grammar": Refused(hint=_FORMAT),
    "guided_json": Refused(hint=_FORMAT),
    "guided_regex": Refused(hint=_FORMAT),
    "include_stop_str_in_output": Refused(no_ops=(False,), hint="append the stop string yourself"),
    "length_penalty": Refused(no_ops=(1,), hint="there is no beam search"),
    "metadata": Refused(hint="nothing is stored; remove it"),
    "modalities": Refused(no_ops=(["text"],), hint="answers are text"),
    "moderation": Refused(),
    "prediction": Refused(),
    "prompt_cache_options": Refused(),
    "prompt_cache_retention": Refused(),
    "prompt_embeds": Refused(hint="send text or token ids"),
    "prompt_logprobs": Refused(hint="use echo with logprobs in /v1/completions"),
    "reasoning_effort": Refused(hint="the model has no separate reasoning"),
    "service_tier": Refused(no_ops=("auto", "default"), hint="use priority"),
    "skip_special_tokens": Refused(no_ops=(True,), hint="control tokens have no text"),
    "spaces_between_special_tokens": Refused(no_ops=(True, False), hint="control tokens have no text"),
    "stop_token_ids": Refused(hint="use stop"),
    "store": Refused(no_ops=(False,), hint="nothing is stored"),
    "structured_outputs": Refused(hint=_FORMAT),
    "suffix": Refused(hint="the model was not trained to fill in"),
    "truncate_prompt_tokens": Refused(hint="shorten the prompt yourself; nothing is cut silently"),
    "use_beam_search": Refused(no_ops=(False,), hint="use n"),
    "verbosity": Refused(no_ops=("medium",), hint="ask for it in a message"),
    "web_search_options": Refused(hint="this server opens no connections"),
}


def markdown(fields: Mapping[str, Limit]) -> str:
    """The table of ``fields`` as it stands in the documents."""
    rows = ["| field | values | default | |", "|---|---|---|---|"]
    for name, limit in fields.items():
        rows.append(f"| `{name}` | {_values(limit)} | {limit.default} | {limit.about} |")
    return "\n".join(rows)


def _values(limit: Limit) -> str:
    if limit.values:
        return ", ".join(limit.values)
    units = {"string": " characters", "list": " items", "object": " entries"}
    if limit.low is None and limit.high is None:
        return {"boolean": "true or false"}.get(limit.kind, limit.kind)
    low, high = (_number(bound) for bound in (limit.low, limit.high))
    span = f"{low} to {high}" if low and high else f"at most {high}" if high else f"at least {low}"
    return span + units.get(limit.kind, "")


def _number(bound: float | None) -> str:
    exact = {2**31 - 1: "2^31 - 1", -(2**31 - 1): "-(2^31 - 1)", 2**63 - 1: "2^63 - 1", -(2**63): "-2^63"}
    return "" if bound is None else exact.get(bound, f"{bound:.12g}")  # type: ignore[call-overload]
