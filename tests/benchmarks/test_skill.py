"""The new skill: tested is what was not trained, answers are judged rightly, results become a table and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ferry
import pytest
from showing import table, write_pictures
from skill import METHODS, settings

from mixtral.evaluate.desk import wilson
from mixtral.train.tune import SftConfig


def departures(found: Sequence[ferry.Question]) -> set[tuple[str, int, int]]:
    times = [re.search(r"(\d+):(\d\d)", question.text) for question in found]
    return {(q.place, int(t[1]), int(t[2])) for q, t in zip(found, times, strict=True) if t is not None}


def test_what_is_tested_was_not_trained() -> None:
    splits = {
        name: departures(ferry.questions(name, 10_000)) for name in ("train", "validation", "known sums", "new sums")
    }
    sums = {name: {(place, minute) for place, _, minute in found} for name, found in splits.items()}
    assert len(splits["train"]) > 1280
    assert splits["train"] & splits["known sums"] == set()
    assert sums["known sums"] <= sums["train"]
    assert sums["train"] & sums["new sums"] == set()
    assert sums["train"] & sums["validation"] == sums["validation"] & sums["new sums"] == set()
    assert {hour for _, hour, _ in splits["known sums"]} == set(ferry.HOURS)
    words = [re.sub(r"\d+:\d\d", "", q.text.replace(q.place, "")) for q in ferry.questions("train", 500)]
    tested = [re.sub(r"\d+:\d\d", "", q.text.replace(q.place, "")) for q in ferry.questions("new sums", 150)]
    assert set(words) & set(tested) == set()


@pytest.mark.parametrize("split", ["train", "validation", *ferry.TESTS])
def test_every_answer_is_the_right_one(split: str) -> None:
    for question in ferry.questions(split, 300):
        assert ferry.verdict(question, question.answer) == (True, True, True)
        hour, minute = map(int, re.findall(r"\d+", question.text)[:2])
        there, left = map(int, question.arrival.split(":"))
        assert 60 * there + left == 60 * hour + minute + ferry.CROSSINGS[question.place]


def test_wrong_answers_are_told_apart() -> None:
    question = ferry.questions("train", 1)[0]
    minutes = str(ferry.CROSSINGS[question.place])
    assert ferry.verdict(question, "Good morning!") == (False, False, False)
    assert ferry.verdict(question, f"{question.answer} Bye.") == (False, False, False)
    assert ferry.verdict(question, question.answer.replace(f"takes {minutes}", "takes 99")) == (True, False, True)
    assert ferry.verdict(question, question.answer.replace(question.arrival, "3:14")) == (True, True, False)
    with pytest.raises(ValueError, match="split is 'test'"):
        ferry.questions("test", 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_configuration(name: str, tmp_path: Path) -> None:
    values = settings(tmp_path, name, rate=1e-3, steps=7, threads=1)
    config = SftConfig.from_dict(json.loads(json.dumps(values)), source="skill")
    assert (config.adapter is not None, config.experts is not None) == (
        METHODS[name].is_adapter,
        name in ("esft", "random"),
    )


def results() -> dict[str, Any]:
    def scores(right: int) -> dict[str, Any]:
        one = {"n": 10, "form": 9, "crossing": 8, "right": right, "interval": wilson(right, 10)}
        return {"known sums": one, "new sums": one, "old": one, "file_bytes": 2_500_000}

    method = {"trained": 1234, "experts": None, "rate": 1e-3, "seconds": 61.4, "peak_bytes": 7e8, "losses": [2.0, 0.5]}
    return {
        "before": {"embedded": scores(0), "int4": scores(1)},
        "methods": {name: method | {"label": METHODS[name].label, "scores": scores(5)} for name in METHODS},
    }


def test_the_table_has_a_row_for_each() -> None:
    lines = table(results()).splitlines()
    assert len(lines) == 2 + 2 + len(METHODS)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[4] == (
        "| all weights | 1,234 | 0.001 | 61 | 700 | 2.5 | 90 % | 50.0 % (24-76) | 50.0 % (24-76) | 50.0 % (24-76) |"
    )


@pytest.mark.slow
def test_pictures_are_written(tmp_path: Path) -> None:
    write_pictures(tmp_path, results(), [[[0.5, 1.5]] * 8] * 4)
    for name in ("curves", "skill", "loads"):
        assert (tmp_path / f"training-{name}.png").read_bytes().startswith(b"\x89PNG")
