"""Scores of the desk's held-out suites, with an interval and a trivial baseline beside every score."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mixtral import __version__
from mixtral.desk.source import Document, Split
from mixtral.desk.verify import check, is_formed, languages_of
from mixtral.desk.write import SKILLS, suite_documents
from mixtral.errors import ConfigError

__all__ = ["Answer", "Answerer", "SuiteScore", "score", "to_json", "to_markdown", "wilson"]

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Answer:
    """What a subject replied: its text, and its calls as ``{"name", "arguments"}`` or in the OpenAI form."""

    text: str
    calls: Sequence[Mapping[str, Any]] = ()


Answerer = Callable[[Sequence[Document]], Sequence[Answer]]
"""Answers a batch: one answer per document, to ``messages[:-1]`` and ``tools`` of it."""


@dataclass(frozen=True, slots=True)
class SuiteScore:
    """Correct answers among ``n``, the Wilson 95 % interval of the share, and the better trivial baseline.

    ``formed`` answers can be read as what was asked for: JSON, or calls of functions on offer; None where nothing of
    that kind is asked for. ``languages`` has, for the language of the question, how many answers were correct, how many
    were in that language or in none that can be told, and of how many.
    """

    suite: str
    n: int
    correct: int
    low: float
    high: float
    baseline_name: str
    baseline_correct: int
    formed: int | None = None
    languages: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def score(
    answerer: Answerer,
    suites: Sequence[str],
    count: int,
    *,
    seed: int,
    split: Split,
    sample: int = 2000,
) -> list[SuiteScore]:
    """One score per suite over its first ``count`` documents; baselines see ``sample`` training documents of the skill.

    Raises:
        ConfigError: a suite is unknown, ``count`` or ``sample`` is below 1, or a batch got another number of answers.
    """
    if count < 1 or sample < 1:
        raise ConfigError(f"count is {count} and sample is {sample}; both must be at least 1")
    scores = []
    for suite in suites:
        documents = suite_documents(suite, count, seed=seed, split=split)
        answers = answerer(documents)
        if len(answers) != len(documents):
            raise ConfigError(
                f"suite {suite!r}: {len(answers)} answers to {len(documents)} documents; expected one each"
            )
        correct = _correct(documents, answers)
        low, high = wilson(correct, count)
        name, baseline = _baseline(documents, seed=seed, sample=sample)
        formed = _formed(documents, answers)
        languages = _languages(documents, answers)
        scores.append(SuiteScore(suite, count, correct, low, high, name, baseline, formed, languages))
    return scores


def _formed(documents: Sequence[Document], answers: Sequence[Answer]) -> int | None:
    """How many answers have the form that was asked for, None if none was."""
    pairs = zip(documents, answers, strict=True)
    votes = [is_formed(document, answer.text, answer.calls) for document, answer in pairs]
    return None if all(vote is None for vote in votes) else sum(vote is True for vote in votes)


def _languages(documents: Sequence[Document], answers: Sequence[Answer]) -> dict[str, tuple[int, int, int]]:
    found: dict[str, list[int]] = {}
    for document, answer in zip(documents, answers, strict=True):
        heard = languages_of(answer.text)
        own = found.setdefault(document.language, [0, 0, 0])
        own[0] += check(document, answer.text, answer.calls)
        own[1] += not heard or document.language in heard
        own[2] += 1
    return {name: (own[0], own[1], own[2]) for name, own in sorted(found.items())}


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The Wilson 95 % interval of a share ``correct / n``; ConfigError unless 0 <= correct <= n and n >= 1."""
    if n < 1 or not 0 <= correct <= n:
        raise ConfigError(f"{correct} correct of {n}; expected 0 <= correct <= n and n >= 1")
    share, square = correct / n, _Z95 * _Z95
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def to_markdown(scores: Sequence[SuiteScore]) -> str:
    """The scores as a table in per cent, one row per suite; ``form %``: answers of the form that was asked for."""
    lines = [
        "| suite | n | correct % | 95 % interval | form % | baseline % | baseline |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in scores:
        share, baseline = 100 * row.correct / row.n, 100 * row.baseline_correct / row.n
        interval = f"{100 * row.low:.1f} - {100 * row.high:.1f}"
        formed = "" if row.formed is None else f"{100 * row.formed / row.n:.1f}"
        lines.append(
            f"| {row.suite} | {row.n} | {share:.1f} | {interval} | {formed} | {baseline:.1f} | {row.baseline_name} |"
        )
    return "\n".join(lines) + "\n"


def to_json(scores: Sequence[SuiteScore], *, split: Split, seed: int, decoding: str = "greedy") -> str:
    """What was asked and the scores, as a JSON object; ``scores`` have the fields of ``SuiteScore``, shares rounded."""
    rows = [{**asdict(row), "low": round(row.low, 6), "high": round(row.high, 6)} for row in scores]
    made = {"mixtral": __version__, "split": split, "seed": seed, "decoding": decoding, "scores": rows}
    return json.dumps(made, indent=2) + "\n"


def _correct(documents: Sequence[Document], answers: Sequence[Answer]) -> int:
    return sum(check(document, answer.text, answer.calls) for document, answer in zip(documents, answers, strict=True))


def _baseline(documents: Sequence[Document], *, seed: int, sample: int) -> tuple[str, int]:
    """Name and correct answers of the better of two: reply of the nearest training document, most frequent reply."""
    generator = SKILLS[documents[0].skill]
    known = [generator(seed, "train", number) for number in range(sample)]
    bags = [_words(document) for document in known]
    nearest = []
    for document in documents:
        bag = _words(document)
        shared = [len(bag & other) for other in bags]
        overlaps = [both / (len(bag) + len(other) - both) for both, other in zip(shared, bags, strict=True)]
        nearest.append(_reply(known[overlaps.index(max(overlaps))]))
    replies = [_reply(document) for document in known]
    frequent, times = Counter(map(repr, replies)).most_common(1)[0]
    name, best = "nearest", _correct(documents, nearest)
    if times > 1:
        majority = next(reply for reply in replies if repr(reply) == frequent)
        correct = _correct(documents, [majority] * len(documents))
        if correct > best:
            name, best = "majority", correct
    return name, best


def _words(document: Document) -> frozenset[str]:
    """The words of the prompt from its last user turn on, results of calls included; never empty."""
    text: list[str] = []
    for message in reversed(document.messages[:-1]):
        text.append(str(message.get("content") or ""))
        if message["role"] == "user":
            break
    return frozenset(re.findall(r"\w+", " ".join(text).casefold()) or [""])


def _reply(document: Document) -> Answer:
    last = document.messages[-1]
    return Answer(str(last.get("content") or ""), tuple(last.get("tool_calls") or ()))
