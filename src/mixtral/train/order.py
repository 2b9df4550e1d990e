"""The order of fine-tuning: which examples a step takes, and in which parts, as pure functions of seed and step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mixtral.desk.source import Source

__all__ = ["at_least", "in_parts", "of_step"]

T = TypeVar("T")


def of_step(seed: int, step: int, count: int, per_step: int) -> list[int]:
    """The numbers of the examples of a step: every epoch is all of them in an order of its own, one after the other."""
    places = range(step * per_step, (step + 1) * per_step)
    return [_epoch(seed, place // count, count)[place % count] for place in places]


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int) -> Sequence[int]:
    return Source("order", seed, epoch).shuffled(range(count))


def at_least(parts: Sequence[list[T]], count: int) -> list[list[T]]:
    """The same items in ``count`` parts or more, as far as there are items: the fullest part is halved meanwhile."""
    found = list(parts)
    while len(found) < count and (fullest := max(found, key=len, default=[]))[1:]:
        place, middle = found.index(fullest), len(fullest) // 2
        found[place : place + 1] = [fullest[:middle], fullest[middle:]]
    return found


def in_parts(items: Sequence[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Cut into runs of neighbours of at most that size in all; one that is larger by itself is alone."""
    part: list[T] = []
    total = 0
    for item in items:
        if part and total + size(item) > most:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part
