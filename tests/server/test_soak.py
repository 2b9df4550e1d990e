"""The soak test: what its judgement sees, on planted harm, and a short run against a real server."""

from __future__ import annotations

import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


@pytest.fixture(scope="module")
def soak() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("soak")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def outcome(soak: Any) -> Any:
    return sys.modules["soak_load"].Outcome


def life(soak: Any, *, growth: float = 0.0, files: float = 0.0, threads: float = 0.0, minutes: int = 10) -> Any:
    """A process that is looked at every 2 s, with noise and bursts; growth of each kind a minute."""
    draw = random.Random(1)
    samples = []
    for number in range(minutes * 30):
        now = number / 30
        rss = int((300 + now * growth + draw.uniform(-2, 2) + 40 * (draw.random() < 0.05)) * soak.MIB)
        samples.append(soak.Sample(number * 2.0, rss, rss, 10 + int(now * files), 5 + int(now * threads)))
    return soak.Life("engine", 1, samples).report(60.0)


def test_a_slope_is_not_moved_by_bursts(soak: Any) -> None:
    draw = random.Random(0)
    times = [each / 10 for each in range(300)]
    values = [2.5 * time + draw.gauss(0, 1) + (500 if draw.random() < 0.1 else 0) for time in times]
    assert soak.slope(times, values) == pytest.approx(2.5, abs=0.1)


def judged(soak: Any, outcomes: Any = (), windows: Any = (), lives: Any = (), *, short: bool = True) -> Any:
    return soak.judge(outcomes, windows, lives, short=short)


def test_a_flat_process_passes(soak: Any) -> None:
    http = {**life(soak), "what": "http"}
    assert judged(soak, lives=[life(soak, growth=0.5), http], short=False)[0] == []


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ({"growth": 1.4}, r"memory grows by 1\.[345]\d* MiB a minute"),
        ({"files": 1.0}, "files grow by"),
        ({"threads": 0.5}, "threads grow by"),
    ],
)
def test_growth_is_seen(soak: Any, harm: dict[str, float], told: str) -> None:
    problems, _ = judged(soak, lives=[life(soak, **harm)])
    assert len(problems) == 1
    assert re.search(told, problems[0]), problems


def test_a_run_that_judged_nothing_does_not_pass(soak: Any) -> None:
    problems, _ = judged(soak, lives=[life(soak, minutes=1)], short=False)
    assert len(problems) == 2


def test_only_what_a_kill_explains_is_forgiven(soak: Any, outcome: Any) -> None:
    windows = [soak.Window(100.0, 110.0)]
    within = outcome("chat", 105.0, 106.0, 500, "engine_dead", "500 engine_dead")
    spanning = outcome("chat", 90.0, 101.0, 0, "connection", "it broke")
    held = outcome("chat", 400.0, 401.0, 400, "request_quarantined", "400 request_quarantined")
    problems, explained = judged(soak, [within, spanning, held], windows)
    assert problems == []
    assert explained == {"engine_dead": 1, "connection": 1, "request_quarantined": 1}
    for wrong in (
        outcome("chat", 120.0, 121.0, 500, "engine_dead", "500 engine_dead"),
        outcome("chat", 105.0, 106.0, 500, "internal_error", "500 internal_error"),
        outcome("chat", 105.0, 195.0, 0, "hung", "nothing came"),
        outcome("sentinel", 105.0, 106.0, 200, "", "another answer"),
        outcome("chat", 800.0, 801.0, 400, "request_quarantined", "400 request_quarantined"),
    ):
        problems, explained = judged(soak, [wrong], windows)
        assert len(problems) == 1
        assert not explained


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_half_a_minute_with_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "soak.py"), "--minutes", "0.5", "--kills", "1"]
    command += ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "report.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["total"] > 50
    assert len(report["kills"]) == 1
    assert {row["what"] for row in report["processes"]} == {"http", "engine", "trial"}
    assert len([row for row in report["processes"] if row["what"] == "engine"]) == 2
    assert (tmp_path / "report.png").stat().st_size > 10_000
