"""Overlap of held-out documents with training ones: found where it is planted, absent where splits keep apart."""

from __future__ import annotations

import pytest

from mixtral.desk import write
from mixtral.desk.write import suite_documents
from mixtral.errors import ConfigError
from mixtral.evaluate import overlap
from mixtral.evaluate.overlap import Overlap, overlaps, to_markdown

MIXTURE = {"chat": 50, "sums": 50}


def compared(suites: list[str], **changes: int) -> list[Overlap]:
    values = {"count": 30, "trained": 300, "trained_seed": 3} | changes
    count = values.pop("count")
    return overlaps(suites, count, seed=1, split="test", mixture_of=lambda number: MIXTURE, **values)


def test_held_out_prompts_are_not_trained() -> None:
    rows = compared(["sums/1-op", "chat/values", "notes/short"])
    assert [(row.n, row.equal) for row in rows] == [(30, 0)] * 3
    assert all(row.grams > 100 for row in rows)
    assert rows[0].trained > 0  # the templates are trained
    assert rows[2].trained < rows[2].grams / 10  # notes are not in this mixture


def test_planted_documents_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = suite_documents("sums/templates", 30, seed=1, split="test")

    def document(seed: int, split: str, number: int, mixture: object) -> object:
        return planted[number] if number < 12 else write.document(seed, "train", number, MIXTURE)

    monkeypatch.setattr(overlap, "document", document)
    before = compared(["sums/templates"], trained=0)[0]
    after = compared(["sums/templates"])[0]
    assert (before.equal, before.trained) == (0, 0)
    assert after.equal == 12
    assert after.trained > 0.35 * after.grams


def test_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(["sums/2-op", "chat/templates"])
    monkeypatch.setattr(overlap, "_PART", 7)
    assert compared(["sums/2-op", "chat/templates"]) == whole


def test_table() -> None:
    table = to_markdown([Overlap("sums/1-op", 1000, 0, 12345, 1234)])
    assert table.splitlines()[2] == "| sums/1-op | 1000 | 0 | 12,345 | 10.0 |"


def test_an_unknown_suite_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown suite"):
        compared(["sums/9-op"])
