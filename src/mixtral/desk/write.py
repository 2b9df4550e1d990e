"""The mixture of all skills: document number -> document, and the documents of one held-out suite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

from mixtral.desk.calls import calls
from mixtral.desk.copies import SUITES as COPIES_SUITES
from mixtral.desk.copies import copies
from mixtral.desk.notes import SUITES as NOTES_SUITES
from mixtral.desk.notes import notes, story
from mixtral.desk.records import records
from mixtral.desk.source import Document, Source, Split
from mixtral.desk.speech import chat
from mixtral.desk.sums import SUITES as SUMS_SUITES
from mixtral.desk.sums import sums
from mixtral.errors import ConfigError

__all__ = ["MIXTURE", "SKILLS", "SUITES", "document", "generator_id", "suite_documents"]

Generator = Callable[[int, Split, int], Document]
SKILLS: Mapping[str, Generator] = MappingProxyType(
    {"chat": chat, "calls": calls, "records": records, "sums": sums, "notes": notes, "story": story, "copies": copies}
)
"""Generator of each skill, called with (seed, split, number)."""
MIXTURE: Mapping[str, int] = MappingProxyType(
    {"chat": 26, "calls": 20, "records": 14, "sums": 18, "notes": 10, "story": 2, "copies": 10}
)
"""Documents of each skill among 100 documents."""
SUITES: tuple[str, ...] = (
    "chat/templates",
    "chat/values",
    "calls/values",
    "calls/unseen",
    "calls/none",
    "calls/answer",
    "records/values",
    "records/schemas",
    *SUMS_SUITES,
    *NOTES_SUITES,
    *COPIES_SUITES,
)
"""The suites of held-out documents that are scored; the part before the slash is the skill."""


@cache
def generator_id() -> str:
    """16 hexadecimal digits of all files that write documents: where they are alike, so are all documents."""
    folder, digest = resources.files("mixtral.desk"), hashlib.sha256()
    for part in (folder, folder / "phrases"):
        for file in sorted(part.iterdir(), key=lambda file: file.name):
            if file.name.endswith((".py", ".toml")):
                digest.update(f"{file.name}\n{file.read_text(encoding='utf-8')}\n".encode())
    return digest.hexdigest()[:16]


def document(seed: int, split: Split, number: int, mixture: Mapping[str, int] | None = None) -> Document:
    """Document ``number`` of a split; ``mixture`` gives the weight of each skill (default ``MIXTURE``).

    Raises:
        ConfigError: a skill of the mixture is unknown, a weight is negative, or all are 0.
    """
    weights = MIXTURE if mixture is None else mixture
    unknown = sorted(set(weights) - set(SKILLS))
    if unknown:
        raise ConfigError(f"mixture: unknown skill {unknown[0]!r}; expected some of {', '.join(SKILLS)}")
    if min(weights.values(), default=0) < 0 or sum(weights.values()) < 1:
        raise ConfigError(f"mixture is {dict(weights)}; expected weights >= 0, at least one of them above 0")
    tickets = [skill for skill in SKILLS for _ in range(weights.get(skill, 0))]
    return SKILLS[Source("write", seed, split, number).pick(tickets)](seed, split, number)


def suite_documents(suite: str, count: int, *, seed: int, split: Split) -> list[Document]:
    """The first ``count`` documents of a suite, by document number.

    Raises:
        ConfigError: the suite is unknown, or the split has too few documents of it (``train`` has none of the suites
            that hold out templates, functions or schemas).
    """
    if suite not in SUITES:
        raise ConfigError(f"unknown suite {suite!r}; expected one of {', '.join(SUITES)}")
    generator = SKILLS[suite.partition("/")[0]]
    found: list[Document] = []
    limit = 40 * count + 400
    for number in range(limit):
        if len(found) >= count:
            break
        candidate = generator(seed, split, number)
        if candidate.suite == suite:
            found.append(candidate)
    if len(found) < count:
        raise ConfigError(
            f"suite {suite!r}: {len(found)} documents among the first {limit} of split {split!r}, {count} asked for. "
            "Take fewer, or a held-out split."
        )
    return found
