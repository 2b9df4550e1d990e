"""Bodies of requests -> what is to be done: one function per route, run in this process or in one for long texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mixtral.server.body import parse_json
from mixtral.server.engine import Facts
from mixtral.server.errors import ApiError, show
from mixtral.server.formats import Grammar
from mixtral.server.protocol import read_chat, read_completion, read_detokenize, read_tokenize
from mixtral.server.work import Prepared, prepare_chat, prepare_completion
from mixtral.tokenizer import encode_chat

__all__ = ["CHAT", "COMPLETIONS", "DETOKENIZE", "TOKENIZE", "check_model", "read"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
_LISTED = 8  # names of models in an error
Body = Mapping[str, Any]


def read(route: str, facts: Facts, body: bytes, holder: str, grammar: Grammar | None) -> Prepared | bytes:
    """What a request to ``route`` asks for, or the whole answer where that needs no engine. Works for long.

    ``holder`` is the name of its key. Raises ApiError or MixtralError, which name the field.
    """
    return _READERS[route](facts, parse_json(body), holder, grammar)


def check_model(name: str, facts: Facts) -> None:
    """Raise a 404 for any other name than those of the model and its adapters."""
    if name != facts.name and name not in facts.adapters:
        known = [facts.name, *facts.adapters]
        more = f" and {len(known) - _LISTED} more, see /v1/models" if len(known) > _LISTED else ""
        message = f"there is no model {show(name)}; this server has {', '.join(map(repr, known[:_LISTED]))}{more}"
        raise ApiError(404, "model_not_found", message, param="model")


def _chat(facts: Facts, body: Body, holder: str, grammar: Grammar | None) -> Prepared:
    wanted = read_chat(body, vocab_size=facts.vocab_size, layers=facts.layers)
    check_model(wanted.options.model, facts)
    return prepare_chat(facts, wanted, grammar, holder)


def _completion(facts: Facts, body: Body, holder: str, grammar: Grammar | None) -> Prepared:
    wanted = read_completion(body, vocab_size=facts.vocab_size, layers=facts.layers)
    check_model(wanted.options.model, facts)
    return prepare_completion(facts, wanted, grammar, holder)


def _tokenize(facts: Facts, body: Body, holder: str, grammar: Grammar | None) -> bytes:
    wanted = read_tokenize(body)
    if wanted.model is not None:
        check_model(wanted.model, facts)
    tokenizer = facts.tokenizer
    if wanted.messages is None:
        ids = tokenizer.encode(wanted.prompt, bos=wanted.bos)
    else:
        ids = encode_chat(tokenizer, wanted.messages, wanted.tools or None).ids
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": facts.context}
    return _json(answer | ({"pieces": [tokenizer.piece(id) for id in ids]} if wanted.pieces else {}))


def _detokenize(facts: Facts, body: Body, holder: str, grammar: Grammar | None) -> bytes:
    name, ids = read_detokenize(body, vocab_size=facts.vocab_size)
    if name is not None:
        check_model(name, facts)
    return _json({"prompt": facts.tokenizer.decode(ids)})


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


_READERS: dict[str, Callable[[Facts, Body, str, Grammar | None], Prepared | bytes]] = {
    CHAT: _chat,
    COMPLETIONS: _completion,
    TOKENIZE: _tokenize,
    DETOKENIZE: _detokenize,
}
