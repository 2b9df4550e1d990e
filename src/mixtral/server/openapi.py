"""The interface as an OpenAPI document, made from the table of limits; a request that fits it is never malformed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixtral import limits
from mixtral.limits import PARTS, REFUSED, Limit
from mixtral.server.answers_schema import CHAT_ANSWER, COMPLETION_ANSWER, ERROR, MODEL
from mixtral.server.engine import Engine

__all__ = ["document"]

Schema = dict[str, Any]
_NAME = "^[a-zA-Z0-9_-]{1,64}$"
_NULL: Schema = {"type": "null"}
_JSON = "application/json"


def document(engine: Engine, *, keys: bool) -> Schema:
    """The document of a server over ``engine``; ``keys`` says whether requests need one."""
    fields = _Fields(engine)
    paths = {
        "/health": _get("whether the engine lives", {"type": "object"}, failing=True),
        "/ready": _get("whether requests are taken now", {"type": "object"}, failing=True),
        "/metrics": _get("what was counted", {"type": "string"}, keys=keys, media_type="text/plain"),
        "/openapi.json": _get("this document", {"type": "object"}, keys=keys),
        "/v1/models": _get("all models", _object({"object": {"const": "list"}, "data": _list(MODEL)}), keys=keys),
        "/v1/models/{name}": _get("one model", MODEL, keys=keys, name=engine.name),
        "/v1/chat/completions": _post("an answer to a conversation", fields.body(limits.CHAT), CHAT_ANSWER, keys=keys),
        "/v1/completions": _post("what follows prompts", fields.body(limits.COMPLETIONS), COMPLETION_ANSWER, keys=keys),
        "/tokenize": _post("ids of a text or a conversation", fields.tokenize(), _tokenized(), keys=keys),
        "/detokenize": _post(
            "the text of ids", fields.body(limits.DETOKENIZE), _object({"prompt": {"type": "string"}}), keys=keys
        ),
        "/tokenizer_info": _get("which ids control tokens have", _tokenizer(), keys=keys),
    }
    schemes = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mixtral", "version": engine.fingerprint},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR}, **schemes},
    }


class _Fields:
    """Schemas of request fields for one model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        id = {"type": "integer", "minimum": 0, "maximum": engine.vocab_size - 1}
        prompts = int(PARTS["prompts x n"].high or 0)
        text = {"type": "string"}
        self._own: dict[str, Schema] = {
            "model": {"enum": [engine.name, *engine.adapters]},
            "messages": _bounded(limits.CHAT["messages"]) | {"items": _message()},
            "prompt": {
                "anyOf": [
                    text,
                    _list(text, 1, prompts),
                    _list(id, 1),
                    _list(_list(id, 1), 1, prompts),
                ]
            },
            "tokens": _bounded(limits.DETOKENIZE["tokens"]) | {"items": id},
            "stop": {"anyOf": [_part("stop[]"), _bounded(limits.CHAT["stop"]) | {"items": _part("stop[]")}]},
            "logit_bias": {
                "type": "object",
                "propertyNames": {"pattern": f"^(?:{_up_to(engine.vocab_size - 1)})$"},
                "additionalProperties": _part("logit_bias.ID"),
                "maxProperties": limits.CHAT["logit_bias"].high,
            },
            "stream_options": _open({"include_usage": {"type": "boolean"}, "include_obfuscation": {"enum": [False]}}),
            "tools": _bounded(limits.CHAT["tools"]) | {"items": _tool()},
            "tool_choice": {"anyOf": [{"enum": list(limits.CHAT["tool_choice"].values)}, _named()]},
            "response_format": {"anyOf": _formats()},
            "mixtral": _routing(engine.layers),
        }

    def body(self, fields: Mapping[str, Limit]) -> Schema:
        """A body with these fields, and those that ask for nothing."""
        properties: Schema = {}
        for name, limit in fields.items():
            schema = self._own.get(name) or _bounded(limit)
            properties[name] = schema if limit.required else {"anyOf": [schema, _NULL]}
        for name, refused in REFUSED.items():
            if name not in fields:
                properties[name] = {"enum": [None, {}, [], *refused.no_ops]}
        required = [name for name, limit in fields.items() if limit.required]
        made = {"type": "object", "properties": properties, "additionalProperties": False}
        return made | ({"required": required} if required else {})

    def tokenize(self) -> Schema:
        """Either a prompt or messages."""
        whole = self.body(limits.TOKENIZE)
        text, talk = dict(whole["properties"]), dict(whole["properties"])
        text["prompt"], text["messages"], text["tools"] = {"type": "string"}, _NULL, {"enum": [None, []]}
        talk["messages"], talk["prompt"], talk["add_special_tokens"] = self._own["messages"], _NULL, _NULL
        return {
            "anyOf": [
                whole | {"properties": text, "required": ["prompt"]},
                whole | {"properties": talk, "required": ["messages"]},
            ]
        }


def _bounded(limit: Limit) -> Schema:
    """The schema of a limit's own kind."""
    names = {
        "integer": ("integer", "minimum", "maximum"),
        "number": ("number", "minimum", "maximum"),
        "string": ("string", "minLength", "maxLength"),
        "list": ("array", "minItems", "maxItems"),
        "object": ("object", "minProperties", "maxProperties"),
        "boolean": ("boolean", "", ""),
    }
    kind, low, high = names[limit.kind]
    if limit.values:
        return {"enum": list(limit.values)}
    bounds = {low: limit.low, high: limit.high}
    return {"type": kind} | {name: bound for name, bound in bounds.items() if name and bound is not None}


def _part(name: str) -> Schema:
    return _bounded(PARTS[name])


def _list(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    made: Schema = {"type": "array", "items": items} | ({"minItems": low} if low else {})
    return made if high is None else made | {"maxItems": high}


def _object(properties: Schema) -> Schema:
    """An answer's object: all of these, and perhaps more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _open(properties: Schema, *required: str, low: bool = True) -> Schema:
    """A request's object: what is not required may be null, and so may anything else that is not known."""
    made: Schema = {
        "type": "object",
        "properties": {
            name: schema if name in required else {"anyOf": [schema, _NULL]} for name, schema in properties.items()
        },
        "additionalProperties": _NULL,
    }
    return made | ({"required": list(required)} if required else {})


def _message() -> Schema:
    part = _open({"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text")
    content = {"anyOf": [{"type": "string"}, _list(part, 0, int(PARTS["messages[].content"].high or 0))]}
    id = _part("messages[].tool_calls[].id") | {"pattern": "^[ -~]+$"}
    function = _open({"name": {"type": "string", "pattern": _NAME}, "arguments": {"type": "string"}}, "name")
    call = _open({"id": id, "type": {"const": "function"}, "function": function}, "id", "function")
    calls = _list(call, 1, int(PARTS["messages[].tool_calls"].high or 0))
    return {
        "anyOf": [
            _open({"role": {"enum": ["user", "system", "developer"]}, "content": content}, "role", "content"),
            _open(
                {"role": {"const": "assistant"}, "content": content, "prefix": {"type": "boolean"}}, "role", "content"
            ),
            _open(
                {"role": {"const": "assistant"}, "content": {"enum": ["", []]}, "tool_calls": calls},
                "role",
                "tool_calls",
            ),
            _open(
                {
                    "role": {"const": "tool"},
                    "content": content,
                    "tool_call_id": id,
                    "name": {"type": "string", "pattern": _NAME},
                },
                "role",
                "content",
                "tool_call_id",
            ),
        ]
    }


def _tool() -> Schema:
    function = _open(
        {
            "name": {"type": "string", "pattern": _NAME},
            "description": _part("tools[].function.description"),
            "parameters": {"type": "object"},
            "strict": {"type": "boolean"},
        },
        "name",
    )
    return _open({"type": {"const": "function"}, "function": function}, "function")


def _named() -> Schema:
    function = _open({"name": {"type": "string", "pattern": _NAME}}, "name")
    return _open({"type": {"const": "function"}, "function": function}, "type", "function")


def _formats() -> list[Schema]:
    detail = _open(
        {
            "name": {"type": "string", "pattern": _NAME},
            "schema": {"type": "object"},
            "description": {"type": "string"},
            "strict": {"type": "boolean"},
        },
        "name",
        "schema",
    )
    grammar = _open(
        {"syntax": {"const": "lark"}, "definition": _part("response_format.grammar.definition")},
        "syntax",
        "definition",
    )
    words = _bounded(PARTS["response_format.choice"]) | {"items": _part("response_format.choice[]")}
    words["uniqueItems"] = True
    return [
        _open({"type": {"enum": ["text", "json_object"]}}, "type"),
        _open({"type": {"const": "json_schema"}, "json_schema": detail}, "type", "json_schema"),
        _open({"type": {"const": "regex"}, "regex": _part("response_format.regex")}, "type", "regex"),
        _open({"type": {"const": "grammar"}, "grammar": grammar}, "type", "grammar"),
        _open({"type": {"const": "choice"}, "choice": words}, "type", "choice"),
    ]


def _routing(layers: int) -> Schema:
    layer = {"type": "integer", "minimum": 0, "maximum": max(layers - 1, 0)}
    chosen = _list(layer, 0, layers) | {"uniqueItems": True}
    return _open({"routing": _part("mixtral.routing"), "layers": chosen, "prompt": {"type": "boolean"}})


def _tokenized() -> Schema:
    whole = {"type": "integer", "minimum": 0}
    return _object({"tokens": _list(whole), "count": whole, "max_model_len": whole})


def _tokenizer() -> Schema:
    whole = {"type": "integer", "minimum": 0}
    counts = {"vocab_size": whole, "bos_token_id": whole, "eos_token_id": whole}
    return _object({"version": {"type": "string"}, **counts, "bos_token": _NULL, "eos_token": _NULL})


def _up_to(highest: int) -> str:
    """A pattern of the decimal numbers from 0 to ``highest``, without leading zeros."""
    digits = str(highest)
    shorter = "|".join(["[0-9]", *(f"[1-9][0-9]{{{more}}}" for more in range(1, len(digits) - 1))])
    found = [shorter]
    for place, digit in enumerate(digits):
        low, high = (1 if place == 0 else 0), int(digit) - 1
        if high >= low and len(digits) > 1:
            rest = len(digits) - place - 1
            found.append(f"{digits[:place]}[{low}-{high}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return "|".join([*found, digits])


def _answers(good: Schema, *codes: int, keys: bool) -> Schema:
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    if keys:
        codes = (*codes, 401, 403, 429)
    described = {str(code): {"description": "see the code in the body", "content": error} for code in sorted(codes)}
    return {"200": {"description": "done", "content": good}} | described


def _get(
    about: str,
    answer: Schema,
    *,
    keys: bool = False,
    failing: bool = False,
    name: str | None = None,
    media_type: str = _JSON,
) -> Schema:
    content = {media_type: {"schema": answer}}
    codes = (404, 405, 421) if name is not None else (405, 421)
    made: Schema = {"summary": about, "responses": _answers(content, *codes, keys=keys)}
    if failing:
        made["responses"]["503"] = {"description": "not now", "content": content}
    if keys:
        made["security"] = [{"key": []}]
    if name is not None:
        made["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": name}
        ]
    return {"get": made}


def _post(about: str, body: Schema, answer: Schema, *, keys: bool) -> Schema:
    content: Schema = {_JSON: {"schema": answer}}
    if "completion" in str(answer.get("properties", {}).get("object")):
        content["text/event-stream"] = {"schema": _object({"data": {"type": "string"}})}
    codes = (400, 403, 404, 405, 408, 413, 414, 415, 421, 431, 500, 503, 504)
    made: Schema = {
        "summary": about,
        "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
        "responses": _answers(content, *codes, keys=keys),
    }
    return {"post": made | ({"security": [{"key": []}]} if keys else {})}
