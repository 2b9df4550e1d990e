"""The order of turns, what is counted of them, and what is refused: with sides that only pretend."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mixtral.bench.limits import Limits
from mixtral.bench.turns import Command, Measured, check, settings_of, started, take_turns
from mixtral.bench.work import Work
from mixtral.config import MixtralConfig
from mixtral.errors import BenchError, CapacityError

FAKE = Path(__file__).parent / "fake_side.py"


def command(name: str, log: Path, fault: str = "") -> Command:
    return Command(name, [sys.executable, str(FAKE), name, str(log), fault])


def measure(sides: Sequence[Command], work: Sequence[Work], turns: int = 2) -> tuple[list[Measured], list[str]]:
    measured: list[Limits] = []
    told: list[str] = []

    def limits() -> Limits:
        measured.append(Limits(2, "a", float(len(measured)), 1.0, 1.0, None))
        return measured[-1]

    with started(sides, {"threads": 2}, timeout_s=20, told=told.append) as running:
        found = [
            take_turns(running, one, turns=turns, vocab_size=1000, limits=limits, told=told.append) for one in work
        ]
    return found, told


def requests(log: Path) -> list[tuple[str, dict[str, Any]]]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def test_the_sides_take_turns_and_the_first_turn_is_not_counted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (found,), told = measure([command("mixtral", log), command("peer", log)], [Work("batch", 8, 3, 2)])
    asked = requests(log)
    assert [(name, request["do"]) for name, request in asked] == [
        *(("mixtral", "prepare"), ("peer", "prepare")),
        *[("mixtral", "run"), ("peer", "run")] * 3,
    ]
    assert found.seconds == {"mixtral": [[0.25, 0.25]] * 2, "peer": [[0.25, 0.25]] * 2}
    assert found.experts == [2.0, 3.0]
    assert all(share is None or 0 <= share <= 1 for share in found.others.values())
    assert list(found.others) == ["mixtral", "peer"]
    assert found.limits.read == 1.0  # the better one of before and after
    assert told == [
        *("mixtral: loading the model", "peer: loading the model"),
        *("batch 3: warm-up", "batch 3: turn 1 of 2", "batch 3: turn 2 of 2"),
    ]


def test_both_sides_read_the_same_tokens_and_new_ones_in_every_turn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    work = Work("batch", 8, 3, 2)
    measure([command("mixtral", log), command("peer", log)], [work])
    runs = [(name, request) for name, request in requests(log) if request["do"] == "run"]
    for turn in range(3):
        ours, theirs = runs[2 * turn][1], runs[2 * turn + 1][1]
        assert ours["prompts"] == theirs["prompts"] == work.prompts(turn, 1000)
        assert ours["fed"] == []
        assert theirs["fed"] == [[7, 7, 7], [8, 8, 8]]
    prepared = next(request for _, request in requests(log) if request["do"] == "prepare")
    assert prepared == {"do": "prepare", "work": {**work.to_json(), "cells": 11}, "prompts": []}


def test_a_context_is_filled_once_and_gone_on_from(tmp_path: Path) -> None:
    log = tmp_path / "log"
    work = Work("context", 20, 1, 4)
    _, told = measure([command("mixtral", log), command("peer", log)], [work])
    asked = requests(log)
    assert [request["prompts"] for _, request in asked] == [work.prompts(0, 1000)] * 2 + [[]] * 6
    assert asked[0][1]["work"]["cells"] == 20 + 3 * 4 + 1
    assert told[2:5] == [
        *("context 20: mixtral reads its prompt", "context 20: peer reads its prompt"),
        "context 20: warm-up",
    ]


def test_a_prefill_has_one_time_and_we_can_be_alone(tmp_path: Path) -> None:
    found, _ = measure([command("mixtral", tmp_path / "log")], [Work("prefill", 30, 1, 0), Work("decode", 8, 1, 1)])
    assert [one.seconds for one in found] == [{"mixtral": [[0.25], [0.25]]}] * 2


def test_a_side_may_give_the_time_of_the_whole(tmp_path: Path) -> None:
    sides = [command("mixtral", tmp_path / "log"), command("peer", tmp_path / "log", "[1.0]")]
    found, _ = measure(sides, [Work("batch", 8, 3, 2)])
    assert found[0].seconds["peer"] == [[1.0], [1.0]]


@pytest.mark.parametrize("times", ["[]", "[-0.5, 1.0]", "[0.0, 1.0]", '["1", 2]', "[1, 2, 3]", "[1, NaN]", "[null]"])
def test_times_that_are_none_are_refused(times: str, tmp_path: Path) -> None:
    sides = [command("mixtral", tmp_path / "log"), command("peer", tmp_path / "log", times)]
    with pytest.raises(BenchError, match=r"peer: gave the times .* for batch 3; expected seconds above 0"):
        measure(sides, [Work("batch", 8, 3, 2)])


def test_a_peer_that_dies_ends_the_measurement(tmp_path: Path) -> None:
    sides = [command("mixtral", tmp_path / "log"), command("peer", tmp_path / "log", "dies")]
    with pytest.raises(BenchError, match="peer: ended with exit code 1"):
        measure(sides, [Work("decode", 8, 1, 1)])


def test_a_context_that_is_too_short_is_told_before_anything_runs(tiny_config: MixtralConfig) -> None:
    work = [Work("decode", 8, 1, 32), Work("context", 400, 1, 32)]
    check(tiny_config, work, turns=2)
    with pytest.raises(CapacityError, match=r"context 400 with 3 turns needs 529 tokens .* is 512. Lower --depth"):
        check(tiny_config, work, turns=3)


def test_what_a_side_is_told(tiny_config: MixtralConfig) -> None:
    work = [Work("batch", 8, 32, 32), Work("prefill", 100, 1, 0)]
    assert settings_of("m", tiny_config, work, threads=3, turns=5) == {
        "model": "m",
        "threads": 3,
        "context": 101,
        "sequences": 32,
        "cache_gib": 1,
        "reuse": False,
    }
    long = settings_of("m", tiny_config, [Work("context", 1 << 22, 1, 1)], threads=3, turns=1)
    assert long["reuse"]
    # 4,194,307 tokens of 2 layers with 2 heads of 16 keys and values in 2 bytes, twice
    assert long["cache_gib"] == 3
