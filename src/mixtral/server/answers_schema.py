"""JSON schemas of what the API answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

__all__ = ["CHAT_ANSWER", "COMPLETION_ANSWER", "ERROR", "MODEL"]

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}


def _closed(properties: Schema, *optional: str) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


ERROR = _closed(
    {
        "error": _closed(
            {
                "message": _TEXT,
                "type": {
                    "enum": [
                        "invalid_request_error",
                        "authentication_error",
                        "permission_error",
                        "rate_limit_error",
                        "server_error",
                    ]
                },
                "param": {"type": ["string", "null"]},
                "code": _TEXT,
            }
        )
    }
)
MODEL = _closed(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "root": _TEXT,
        "parent": {"type": ["string", "null"]},
        "max_model_len": _COUNT,
    }
)
_USAGE = _closed(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _closed({"cached_tokens": _COUNT}),
    }
)
_ROUTING = _closed(
    {
        "routing": _listed(
            _closed(
                {
                    "choice": _COUNT,
                    "first": _COUNT,
                    "shape": _listed(_COUNT),
                    "layers": _listed(_COUNT),
                    "experts": _TEXT,
                    "weights": _TEXT,
                    "counts": _listed(_listed(_COUNT)),
                },
                *("first", "shape", "experts", "weights", "counts"),
            )
        )
    }
)
_CALL = _closed({"id": _TEXT, "type": {"const": "function"}, "function": _closed({"name": _TEXT, "arguments": _TEXT})})
_TOKEN: Schema = {"token": _TEXT, "bytes": _listed(_COUNT), "logprob": _NUMBER}
_CHAT_LOGPROBS = _closed(
    {"content": _listed(_closed(_TOKEN | {"top_logprobs": _listed(_closed(_TOKEN))})), "refusal": {"type": "null"}}
)
_CHAT_CHOICE = _closed(
    {
        "index": _COUNT,
        "message": _closed(
            {
                "role": {"const": "assistant"},
                "content": {"type": ["string", "null"]},
                "refusal": {"type": "null"},
                "tool_calls": _listed(_CALL),
            },
            "tool_calls",
        ),
        "logprobs": _or_null(_CHAT_LOGPROBS),
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
    }
)
_COMPLETION_CHOICE = _closed(
    {
        "index": _COUNT,
        "text": _TEXT,
        "logprobs": _or_null(
            _closed(
                {
                    "tokens": _listed(_TEXT),
                    "token_logprobs": _listed(_or_null(_NUMBER)),
                    "top_logprobs": _listed(_or_null({"type": "object", "additionalProperties": _NUMBER})),
                    "text_offset": _listed(_COUNT),
                }
            )
        ),
        "finish_reason": {"enum": ["stop", "length"]},
    }
)


def _answer(kind: str, choice: Schema) -> Schema:
    return _closed(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "system_fingerprint": _TEXT,
            "choices": _listed(choice),
            "usage": _USAGE,
            "mixtral": _ROUTING,
        },
        "mixtral",
    )


CHAT_ANSWER = _answer("chat.completion", _CHAT_CHOICE)
COMPLETION_ANSWER = _answer("text_completion", _COMPLETION_CHOICE)
