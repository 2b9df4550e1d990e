"""Keyed random choices, train/validation/test splits, and the document that every generator returns.

Everything is an integer function of keys (BLAKE2b in counter mode), so a document depends on (seed, split, number)
alone, on every machine and every Python version. No decision uses ``random``, ``hash()``, set order or floats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

__all__ = ["SPLITS", "Document", "Source", "Split", "split_of"]

T = TypeVar("T")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Source:
    """A stream of random integers, keyed by text: ``Source("sums", seed, split, number)``."""

    def __init__(self, *key: object) -> None:
        self._key = hashlib.blake2b("\x1f".join(str(part) for part in key).encode(), digest_size=32).digest()
        self._counter = 0
        self._pool = b""

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound)."""
        if not 1 <= bound <= 1 << 32:
            raise ValueError(f"bound is {bound}; expected 1 to 2**32")
        if len(self._pool) < 8:
            block = hashlib.blake2b(self._counter.to_bytes(8, "little"), key=self._key, digest_size=64)
            self._pool, self._counter = block.digest(), self._counter + 1
        word, self._pool = int.from_bytes(self._pool[:8], "little"), self._pool[8:]
        return word * bound >> 64

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 calls."""
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        """One item, uniformly."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items in random order."""
        pool = list(items)
        if count > len(pool):
            raise ValueError(f"cannot take {count} of {len(pool)} items")
        for place in range(count):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        return self.sample(items, len(items))


def split_of(*key: object, held_out_percent: int = 15) -> Split:
    """The split that owns a value, a template, a function or a schema, decided by its key before any text exists.

    ``held_out_percent`` of all keys belong to validation and test, half each.
    """
    digest = hashlib.blake2b("\x1f".join(str(part) for part in ("split", *key)).encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") % 1000
    if place >= held_out_percent * 10:
        return "train"
    return "validation" if place * 2 < held_out_percent * 10 else "test"


@dataclass(frozen=True, slots=True)
class Document:
    """One generated text: a conversation in the OpenAI message format, or plain text.

    ``messages`` ends with the assistant turn to be learnt; ``answer`` holds what a checker needs (``desk.verify``), as
    plain JSON values. ``suite`` is the name under which held-out documents are scored, for example ``sums/2-op``.
    """

    skill: str
    suite: str
    language: str
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
