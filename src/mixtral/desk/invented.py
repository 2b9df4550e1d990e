"""Invented names, codes and numbers for training documents: what is copied must be read, not remembered.

The inventories of ``desk.world`` are small enough to be learnt by heart. A model that has learnt them answers with a
name it knows where it should copy one that it never met. So part of the training values are made up from syllables.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

from mixtral.desk.source import Source

__all__ = ["INVENTORS", "invented_noun", "invented_word", "pieced_word"]

_ONSET_TEXT = """
    b br bl c ch cl cr d dr f fl fr g gl gr h j k kl kn kr l m n p pf ph pl pr qu r s sc sch sh sk sl sm sn sp st str
    sv t th tr ts tz v w wh y z zw
"""
_NUCLEUS_TEXT = "a a a e e e i i o o u u y ai au ea ee ei eu ia ie io oa oo ou ua ue é è á í ó ú ä ö ü ñe ça"
_CODA_TEXT = "n r l s t m d k g ck ch ll nd ng nn ns nt rd rg rk rn rs rt ss st sch tt tz x z"
_ONSETS = _ONSET_TEXT.split() + [""] * 5
_NUCLEI = _NUCLEUS_TEXT.split()
_CODAS = _CODA_TEXT.split() + [""] * 30
_BEFORE = ("Casa", "Chez", "La", "Le", "El", "Il", "Zum", "Zur", "Da", "The", "Bistro", "Villa", "Osteria", "Bar")
_AFTER = ("House", "Garden", "Inn", "Hof", "Stube", "Grill", "Corner")
_SIGNS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"


def invented_word(source: Source) -> str:
    """A word of one to four syllables in small letters, 3 to 14 characters, of sounds that the five languages write."""
    while True:
        syllables = source.pick((1, 2, 2, 2, 3, 3, 4))
        word = "".join(source.pick(_ONSETS) + source.pick(_NUCLEI) + source.pick(_CODAS) for _ in range(syllables))
        if 3 <= len(word) <= 14:
            return word


def pieced_word(source: Source) -> str:
    """One to three pieces of the vocabulary, 3 to 14 characters: letters that the tokenizer has as they are.

    Syllables hardly ever begin with the rarer pieces, and a piece that is never written in training cannot be copied.
    """
    pieces = _pieces()
    while True:
        first = source.pick(pieces["start" if source.chance(80) else "inner"])
        word = first + "".join(source.pick(pieces["inner"]).lower() for _ in range(source.below(3)))
        if 3 <= len(word) <= 14:
            return word


@cache
def _pieces() -> dict[str, list[str]]:
    text = resources.files("mixtral.desk").joinpath("phrases/pieces.toml").read_text(encoding="utf-8")
    return {name: words.split() for name, words in tomllib.loads(text).items()}


def invented_noun(source: Source, language: str) -> tuple[str, str]:
    """A word for a thing, and its gender as ``desk.words`` has it: m, f, n (German), or empty (English)."""
    name = _name(source)
    return name if language == "de" else name.lower(), source.pick({"en": ("",), "de": "mfn"}.get(language, "mf"))


def _name(source: Source) -> str:
    return (pieced_word(source) if source.chance(50) else invented_word(source)).capitalize()


def _restaurant(source: Source) -> str:
    match source.below(6):
        case 0:
            return _name(source)
        case 1:
            return f"{_name(source)} {source.pick(_AFTER)}"
        case 2:
            return f"{_name(source)} {_name(source)}"
        case 3:
            return f"{source.pick(_BEFORE)} {_name(source)} {_name(source)}"
        case _:
            return f"{source.pick(_BEFORE)} {_name(source)}"


def _code(source: Source) -> str:
    return "".join(source.pick(_SIGNS) for _ in range(source.between(3, 7)))


def _phone(source: Source) -> str:
    return f"555 {source.between(1000, 9999)}"


INVENTORS: Mapping[str, Callable[[Source], str]] = MappingProxyType(
    {
        "first_name": _name,
        "last_name": _name,
        "city": _name,
        "restaurant": _restaurant,
        "street": lambda source: f"Via {_name(source)}",
        "mail_host": lambda source: f"{_name(source).lower()}.example",
        "code": _code,
        "phone": _phone,
    }
)
"""How to invent an item, for the inventories of ``desk.world`` that are open."""
