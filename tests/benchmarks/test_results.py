"""Figures of a wave that was made by hand, medians of turns, merged files, the table, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from results import FIGURES, figures, merge, share, table, write_plot
from streams import Answer, Wave

ANSWERS = [
    Answer(asked=0.0, times=[1.0, 1.1, 1.3], tokens=4, prompt_tokens=9),
    Answer(asked=0.5, times=[2.5, 2.6, 2.7, 2.8], tokens=4, prompt_tokens=9),
]
CPU = {"http": 0.004, "engine": 1.6}
WAVE = Wave(ANSWERS, 4.0, 0.2)


def test_figures_of_a_wave() -> None:
    found = figures(WAVE, tokens=4, prompt=9, cpu=CPU)
    assert found["tokens_per_s"] == pytest.approx(2.0)
    assert found["ttft_median"] == pytest.approx(1.5)
    assert found["ttft_p95"] == pytest.approx(2.0)
    assert found["gap_median"] == pytest.approx(100.0)
    assert found["gap_p95"] == pytest.approx(200.0)
    assert found["gap_ratio"] == pytest.approx(2.0)
    assert found["tokens_per_event"] == pytest.approx(8 / 7)
    assert found["http_us"] == pytest.approx(500.0)
    assert found["engine_us"] == pytest.approx(200_000.0)
    assert found["client_share"] == pytest.approx(0.05)


def test_answers_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="an answer has 4 tokens after 9; expected 5 after 9"):
        figures(WAVE, tokens=5, prompt=9, cpu=CPU)
    with pytest.raises(ValueError, match="expected 4 after 8"):
        figures(WAVE, tokens=4, prompt=8, cpu=CPU)


def test_shares_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert share(values, 0.95) == 95.0
    assert share(values, 0.99) == 99.0
    assert share([7.0], 0.95) == 7.0


def turns(*speeds: float) -> list[dict[str, float]]:
    return [dict.fromkeys(FIGURES, 1.0) | {"tokens_per_s": speed, "engine_us": 1.0, "seconds": 1.0} for speed in speeds]


def test_files_are_merged_and_shown_as_medians(tmp_path: Path) -> None:
    first = {"settings": {"prompt": 1}, "machine": {}, "turns": {"a": {"16": turns(10, 30), "2": turns(5)}}}
    second = {"settings": {"prompt": 1}, "machine": {}, "turns": {"a": {"16": turns(20)}, "b": {"16": turns(1234.5)}}}
    other = {"settings": {"prompt": 2}, "machine": {}, "turns": {}}
    paths = [tmp_path / name for name in ("first", "second", "other")]
    for path, content in zip(paths, (first, second, other), strict=True):
        path.write_text(json.dumps(content))
    found = merge(paths[:2])["turns"]
    lines = table(found).splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        ["| 2", "a", "1", "5"],
        ["| 16", "a", "3", "20"],
        ["| 16", "b", "1", "1,234"],
    ]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    with pytest.raises(ValueError, match="different settings"):
        merge(paths)
    write_plot(tmp_path / "out.svg", found, "title")
    assert "<svg" in (tmp_path / "out.svg").read_text()
