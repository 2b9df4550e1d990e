"""A vocabulary as the metadata of GGUF files spells it, and whether that of a file is ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixtral.errors import TokenizerError
from mixtral.tokenizer.tokenizer import Tokenizer

__all__ = ["check_pieces", "gguf_vocabulary"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '{END}' }}"
    "{% elif message['role'] == 'assistant' %}{{ '{SPACE}' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)


def gguf_vocabulary(vocab_size: int) -> dict[str, Any]:
    """The keys ``tokenizer.*`` of a GGUF file (ggml's ``docs/gguf.md``) for a model with that many token ids: pieces,
    scores, types, special ids, template.

    The template holds user and assistant turns only; the program that reads it encodes them less exactly than we do.

    Raises:
        TokenizerError: no vocabulary of Mixtral has that size.
    """
    tokenizer = Tokenizer.for_vocab_size(vocab_size)
    ids = range(vocab_size)
    end, space = (" [/INST]", "") if tokenizer.version == "v1" else ("[/INST]", " ")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [tokenizer.piece(id) for id in ids],
        "tokenizer.ggml.scores": [tokenizer.score(id) for id in ids],
        "tokenizer.ggml.token_type": [_kind(tokenizer, id) for id in ids],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": _TURNS.replace("{END}", end).replace("{SPACE}", space),
    }


def _kind(tokenizer: Tokenizer, id: int) -> int:
    if id == 0:
        return _UNKNOWN
    if tokenizer.is_control(id):
        return _CONTROL
    if tokenizer.is_byte(id):
        return _BYTE
    # The twenty names that v3 matches in ordinary text.
    return _USER_DEFINED if tokenizer.piece(id).startswith("[REFERENCE_DOC_") else _NORMAL


def check_pieces(tokenizer: Tokenizer, pieces: Sequence[str], *, source: str) -> None:
    """Compare the pieces of a file with a vocabulary.

    Raises:
        TokenizerError: they differ, so ids of the one would be other words in the other.
    """
    wrong = next((id for id in range(tokenizer.vocab_size) if pieces[id] != tokenizer.piece(id)), None)
    if wrong is not None:
        raise TokenizerError(
            f"{source}: token {wrong} is {pieces[wrong]!r:.60}, but {tokenizer.piece(wrong)!r} in the vocabulary "
            f"{tokenizer.version} of Mixtral; the model was trained with another tokenizer and cannot be used with text"
        )
