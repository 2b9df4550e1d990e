"""``mixtral train pretrain`` killed by SIGKILL while it saves, again and again: every state counts, to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nano import toml
from torch import Tensor

from mixtral.errors import TrainingError
from mixtral.train import checkpoint

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve()
STEPS = 8
NANO = toml(
    model={"num_hidden_layers": 2},
    data={"documents_per_step": 2, "sample_documents": 200},
    optim={"ema": 0.9},
    run={"steps": STEPS, "save_every": 1, "keep_last": 2},
)
FRESH = 10  # every so manieth run is the command in a process of its own, which takes seconds to start


class Zygote:
    """A warm process whose forks run the command."""

    def __init__(self, fault: str) -> None:
        source = str(HERE.parents[2] / "src")
        self.environment = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE.with_name("zygote.py")), fault],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def start(self, kill_at: int, words: list[str]) -> int:
        """Start the command; its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kill_at, words]) + "\n")
        self.process.stdin.flush()
        return self._number()

    def wait(self) -> int:
        """The exit code of the command, below 0 for a signal."""
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@contextmanager
def zygote(fault: str = "none") -> Iterator[Zygote]:
    found = Zygote(fault)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


def words(home: Path, folder: Path) -> list[str]:
    return ["train", "pretrain", str(home / "nano.toml"), "--out", str(folder)]


def unfinished(folder: Path) -> list[str]:
    """States that have no name yet, or none any more."""
    return [path.name for path in folder.glob("step-*.tmp")]


def newest(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The newest state, of which no one may be damaged: a killed process loses nothing that it has written."""
    with warnings.catch_warnings(action="error"):
        found = checkpoint.load_latest(folder)
    return (0, {}) if found is None else (found[0], found[1])


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def killed_from_outside(pid: int, folder: Path, delay: float) -> bool:
    """SIGKILL that long after a save began; False if the process was gone before."""
    before = set(unfinished(folder))
    while not set(unfinished(folder)) - before:
        if not runs(pid):
            return False
        time.sleep(1e-4)
    time.sleep(delay)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Kills:
    """Runs of the command in one folder after another, each killed in a save, and what was there after each kill."""

    def __init__(self, home: Path, made: Zygote, seed: int, *, outside: bool = True) -> None:
        self.home, self.made, self.chance, self.outside = home, made, random.Random(seed), outside
        self.operations: list[int] = []
        (home / "nano.toml").write_text(NANO)
        self.moments: Counter[str] = Counter()
        self.runs = self.rounds = 0

    def run(self, folder: Path) -> int:
        """One run of the command, killed at a random moment, unless it ends before; its exit code."""
        self.runs += 1
        step = newest(folder)[0]
        given = words(self.home, folder)
        if self.outside and self.runs % FRESH == 0:
            command = [sys.executable, "-m", "mixtral", *given]
            with subprocess.Popen(command, env=self.made.environment, stdout=subprocess.DEVNULL) as process:
                killed_from_outside(process.pid, folder, self.chance.uniform(0, 0.03))
                code = process.wait()
        elif self.outside and self.runs % 2:
            pid = self.made.start(0, given)
            killed_from_outside(pid, folder, self.chance.uniform(0, 0.03))
            code = self.made.wait()
        else:
            # A save is 32 operations on files at most: the last of these are in a second one.
            self.operations = self.operations or self.chance.sample(range(1, 45), 44)
            self.made.start(self.operations.pop(), given)
            code = self.made.wait()
        if code == -signal.SIGKILL:
            self.note(folder, step)
        return code

    def note(self, folder: Path, before: int) -> None:
        """Count where in a save it was, by what is left; no step may be lost."""
        found, left = newest(folder)[0], unfinished(folder)
        assert found >= before
        states = [name for name in os.listdir(folder) if name.startswith("step-") and name not in left]
        if left and int(left[0][5:-4]) <= found:
            self.moments["removing an old state"] += 1
        elif left:
            files = len(os.listdir(folder / left[0]))
            self.moments[f"unfinished state of {files} files"] += 1
        elif len(states) > 2:
            self.moments["complete, old state not removed yet"] += 1
        else:
            self.moments["not in a save"] += 1

    @property
    def counted(self) -> int:
        """Kills in a save."""
        return sum(self.moments.values()) - self.moments["not in a save"]

    def finished(self, wanted: int) -> Iterator[Path]:
        """Folders whose run came to its end, until that many kills were counted."""
        while self.counted < wanted:
            self.rounds += 1
            folder = self.home / f"run-{self.rounds}"
            code = -signal.SIGKILL
            while code and self.counted < wanted:
                code = self.run(folder)
                assert code in (0, -signal.SIGKILL)
            if code:
                self.made.start(0, words(self.home, folder))
                assert self.made.wait() == 0
            yield folder


def straight(home: Path, made: Zygote) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The last state of a run that nobody disturbs, and its log."""
    (home / "nano.toml").write_text(NANO)
    made.start(0, words(home, home / "straight"))
    assert made.wait() == 0
    step, tensors = newest(home / "straight")
    assert step == STEPS
    return tensors, log(home / "straight")


def log(folder: Path) -> list[dict[str, Any]]:
    """The records without the time they took."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in one.items() if "seconds" not in name} for one in records]


def other_tensors(folder: Path, expected: dict[str, Tensor]) -> list[str]:
    """The names of what differs in a bit; all of masters, moments, averages, and the routers' counters."""
    step, found = newest(folder)
    assert step == STEPS
    assert found.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if found[name].dtype != value.dtype
        or not torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8))
    ]


@pytest.mark.timeout(3600)
def test_runs_that_are_killed_while_saving_end_like_one_that_is_not(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wanted = request.config.getoption("--kills")
    with zygote() as made:
        expected, records = straight(tmp_path, made)
        kills = Kills(tmp_path, made, seed=1)
        for folder in kills.finished(wanted):
            assert other_tensors(folder, expected) == []
            assert log(folder) == records
            kept = {path.name for path in folder.glob("step-*")} - set(unfinished(folder))
            # A kill after a commit leaves older states, which only a later save removes.
            assert kept >= {f"step-{number:08}" for number in (STEPS - 1, STEPS)}
            assert all((folder / name / "COMMIT").exists() for name in kept)
    print(f"{kills.counted} kills in a save, {kills.runs} runs, {kills.rounds} whole trainings of {STEPS} steps:")
    print(f"{dict(kills.moments)}; {len(expected)} tensors of each equal to the last bit")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["name first", "moments lost"])
def test_the_check_finds_a_planted_fault(tmp_path: Path, fault: str) -> None:
    with zygote() as made:
        expected, _ = straight(tmp_path, made)
    with zygote(fault) as made:
        kills = Kills(tmp_path, made, seed=2, outside=False)
        found: list[str] = []
        try:
            for folder in kills.finished(10):
                found += other_tensors(folder, expected)
        except (UserWarning, TrainingError) as damaged:
            found.append(str(damaged))
        assert found, kills.moments
