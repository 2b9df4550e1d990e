"""Random answers under a constraint, and their check against the schema by another program."""

from __future__ import annotations

import decimal
import functools
import json
import random
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator

from mixtral.grammar import Grammar, Matcher
from mixtral.tokenizer import TextStream, Tokenizer
from mixtral.wire import Constraint

__all__ = ["accepts", "allowed", "answer", "exact", "text_of", "validate"]

_CLOSING = ['"', "}", "]", '"}', '"]', "}]", "0", "1", "a", ":", ","]


def allowed(matcher: Matcher, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the next mask, in order."""
    words = np.full(-(-tokenizer.vocab_size // 32), 0xAAAAAAAA, dtype=np.uint32)
    matcher.mask(words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: tokenizer.vocab_size])


def answer(grammar: Grammar, constraint: Constraint, seed: int, *, most: int = 300) -> list[int] | None:
    """Ids drawn at random from the masks until the end token; None if that takes more than ``most`` tokens.

    Most draws prefer tokens that bring a text to its end: among all tokens they would come too seldom.
    """
    rng = random.Random(seed)
    tokenizer = grammar.tokenizer
    closing = _closing_ids(tokenizer)
    matcher = grammar.matcher(constraint)
    ids: list[int] = []
    while not matcher.finished and len(ids) < most:
        found = allowed(matcher, tokenizer)
        near = np.intersect1d(found, closing, assume_unique=True)
        hurry = rng.random() < 0.6 or len(ids) > most // 3
        if hurry and tokenizer.eos_id in found:
            id = tokenizer.eos_id
        else:
            id = int(rng.choice(near if hurry and len(near) else found))
        matcher.advance(id)
        ids.append(id)
    return ids if matcher.finished else None


@functools.cache
def _closing_ids(tokenizer: Tokenizer) -> np.ndarray:
    ids = range(tokenizer.vocab_size)
    return np.array([id for id in ids if tokenizer.token_bytes(id).decode("latin-1") in _CLOSING])


def accepts(grammar: Grammar, source: str, text: str, *, by_bytes: bool = False) -> bool:
    """Whether the grammar allows exactly this text, in the tokens that the tokenizer gives or byte by byte."""
    tokenizer = grammar.tokenizer
    matcher = grammar.matcher(Constraint(text=source))
    pieces = [grammar.bytes_ids[byte] for byte in text.encode()] if by_bytes else tokenizer.encode(text)
    for id in [*pieces, tokenizer.eos_id]:
        if id not in allowed(matcher, tokenizer):
            return False
        matcher.advance(id)
    return matcher.finished


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, decoded at once and piece by piece: both must agree."""
    stream = TextStream(tokenizer)
    streamed = "".join(stream.push(id) for id in ids) + stream.finish()
    assert streamed == tokenizer.decode(ids)
    return streamed


def exact(value: Any) -> Any:
    """The same JSON value with decimal numbers instead of floats: only these divide without error."""
    return json.loads(json.dumps(value), parse_float=decimal.Decimal)


def validate(schema: Any, text: str) -> None:
    """Raises if ``text`` is no JSON or not valid by the rules of Draft 2020-12."""
    with decimal.localcontext(prec=2000):
        Draft202012Validator(exact(schema)).validate(json.loads(text, parse_float=decimal.Decimal))
