"""What held-out documents share with those that a run has trained: equal prompts, and sequences of 13 tokens.

The training documents are written again from their numbers, all of them, so nothing is estimated. Sequences are
compared by a hash of 64 bits: of a million against thirty million, some pair collides once in 600,000 comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixtral.desk.source import Document, Split
from mixtral.desk.write import document, suite_documents
from mixtral.tokenizer import Tokenizer, encode_chat

__all__ = ["GRAM", "Overlap", "overlaps", "to_markdown"]

GRAM = 13
"""Tokens of a sequence that is compared."""
_PART = 2000  # training documents that are looked up together
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of the ``n`` prompts of a suite: how many are a training prompt, and how many distinct sequences are trained."""

    suite: str
    n: int
    equal: int
    grams: int
    trained: int


def overlaps(
    suites: Sequence[str],
    count: int,
    *,
    seed: int,
    split: Split,
    trained: int,
    trained_seed: int,
    mixture_of: Callable[[int], Mapping[str, int]],
    on_part: Callable[[int], None] = lambda done: None,
) -> list[Overlap]:
    """Compare ``count`` prompts of each suite with the first ``trained`` documents of the training split.

    ``trained_seed`` is that of the run, ``mixture_of`` gives the mixture that a document was drawn from; ``on_part``
    hears how many documents were read.

    Raises:
        ConfigError: a suite or a skill of the mixture is unknown, or a suite has too few documents.
    """
    tokenizer = Tokenizer.from_version("v3")
    held = {suite: suite_documents(suite, count, seed=seed, split=split) for suite in suites}
    prompts = {suite: [_prompt(item) for item in documents] for suite, documents in held.items()}
    grams = {
        suite: np.unique(np.concatenate([_hashes(_ids(tokenizer, item, answered=False)) for item in documents]))
        for suite, documents in held.items()
    }
    every = np.unique(np.concatenate(list(grams.values())))
    seen = np.zeros(len(every), dtype=bool)
    wanted, equal = {prompt for some in prompts.values() for prompt in some}, set()
    for start in range(0, trained, _PART):
        numbers = range(start, min(start + _PART, trained))
        items = [document(trained_seed, "train", number, mixture_of(number)) for number in numbers]
        equal |= wanted.intersection(map(_prompt, items))
        _mark(every, seen, (_hashes(_ids(tokenizer, item, answered=True)) for item in items))
        on_part(numbers.stop)
    known = every[seen]
    return [
        Overlap(
            suite,
            count,
            sum(prompt in equal for prompt in prompts[suite]),
            len(grams[suite]),
            int(np.isin(grams[suite], known, assume_unique=True).sum()),
        )
        for suite in suites
    ]


def to_markdown(rows: Sequence[Overlap]) -> str:
    """A table, one row per suite."""
    lines = [
        f"| suite | prompts | equal to a trained one | sequences of {GRAM} tokens | of these trained % |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = 100 * row.trained / max(1, row.grams)
        lines.append(f"| {row.suite} | {row.n} | {row.equal} | {row.grams:,} | {share:.1f} |")
    return "\n".join(lines) + "\n"


def _prompt(item: Document) -> str:
    """All that is said before the answer, and the tools."""
    return item.text or json.dumps([item.messages[:-1], item.tools], sort_keys=True)


def _ids(tokenizer: Tokenizer, item: Document, *, answered: bool) -> list[int]:
    if item.text:
        return tokenizer.encode(item.text)
    if answered:
        return encode_chat(tokenizer, item.messages, item.tools or None, for_training=True).ids
    return encode_chat(tokenizer, item.messages[:-1], item.tools or None).ids


def _hashes(ids: Sequence[int]) -> Hashes:
    """A hash of every sequence of ``GRAM`` ids."""
    values = np.asarray(ids, dtype=np.uint64) + np.uint64(1)
    found = np.zeros(max(0, len(values) - GRAM + 1), dtype=np.uint64)
    for place in range(GRAM):
        found = (found ^ values[place : place + len(found)]) * _FACTOR
        found ^= found >> np.uint64(29)
    return found


def _mark(every: Hashes, seen: npt.NDArray[np.bool_], found: Iterable[Hashes]) -> None:
    """Note which of ``every``, sorted, are among the found ones."""
    some = np.concatenate(list(found))
    places = np.searchsorted(every, some)
    places[places == len(every)] = 0
    seen[places[every[places] == some]] = True
