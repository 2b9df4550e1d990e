"""The loop around the steps, with a run that computes nothing: disks that refuse, kills, and two runs in one folder."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.errors import TrainingError
from mixtral.parallel.mesh import Mesh, alone
from mixtral.train import checkpoint
from mixtral.train import pretrain as recipe
from mixtral.train.config import PretrainConfig
from mixtral.train.pretrain import StepReport, pretrain

Nano = Callable[..., PretrainConfig]
FULL = OSError(28, "No space left on device")
NOTHING = dict.fromkeys(StepReport.__slots__, 0)


class Idle:
    """In the place of ``Pretraining``: counts steps, and saves the count."""

    def __init__(
        self, config: PretrainConfig, folder: Path, mesh: Mesh | None = None, base: Path | None = None
    ) -> None:
        assert base is None
        self.config, self.folder, self.mesh = config, folder, mesh or alone()
        found = checkpoint.load_latest(folder)
        self.steps_done = 0 if found is None else found[0]

    def step(self) -> StepReport:
        self.steps_done += 1
        return StepReport(**(NOTHING | {"step": self.steps_done}))  # type: ignore[arg-type]

    def save(self) -> Path:
        tensors = {"steps": torch.tensor([self.steps_done])}
        return checkpoint.save(self.folder, self.steps_done, tensors, {}, keep_last=self.config.run.keep_last)

    def snapshot(self) -> Callable[[], Path]:
        step, tensors = self.steps_done, {"steps": torch.tensor([self.steps_done])}
        return lambda: checkpoint.save(self.folder, step, tensors, {}, keep_last=self.config.run.keep_last)

    def validation_loss(self) -> float:
        return self.steps_done / 8


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "Pretraining", Idle)


def ignore(report: StepReport) -> None:
    """Nothing to tell."""


def logged(folder: Path) -> list[tuple[int, bool]]:
    """Step of every record, and whether it is a validation."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(record["step"], "validation_loss" in record) for record in records]


WHOLE_LOG = [(1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True)]


def test_a_run_keeps_others_out_until_it_ends(tmp_path: Path, nano: Nano) -> None:
    def intrude(report: StepReport) -> None:
        with pytest.raises(TrainingError, match="another process is training here"):
            pretrain(nano(), tmp_path, on_step=ignore)
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(nano(), tmp_path, on_step=intrude)
    pretrain(nano(), tmp_path, on_step=ignore)
    assert logged(tmp_path) == WHOLE_LOG


class Disk:
    """Makes chosen attempts to write the log fail in the middle of the line, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
        self.attempts = 0
        opened = Path.open
        disk = self

        class Torn(io.FileIO):
            def write(self, content: Any) -> int:
                disk.attempts += 1
                if not fails(disk.attempts):
                    return super().write(content)
                super().write(content[:5])
                raise FULL

        def open_torn(path: Path, *args: Any, **options: Any) -> Any:
            if path.name == "log.jsonl" and options.get("buffering") == 0:
                return Torn(path, "ab")
            return opened(path, *args, **options)

        monkeypatch.setattr(Path, "open", open_torn)


def test_a_log_that_cannot_be_written_costs_one_warning_and_no_step(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, lambda attempt: True)
    with pytest.warns(UserWarning, match=r"log.jsonl: cannot be written \(No space left.*training goes on") as told:
        run = pretrain(nano(), tmp_path, on_step=ignore)
    assert len(told) == 1
    assert disk.attempts > 6
    assert run.steps_done == 6
    assert (tmp_path / "log.jsonl").read_bytes() == b""
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found[0] == 6


def test_lines_that_the_disk_refused_are_written_later(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, lambda attempt: attempt in {2, 3, 5})
    with pytest.warns(UserWarning, match="cannot be written") as told:
        pretrain(nano(), tmp_path, on_step=ignore)
    assert len(told) == 1
    assert logged(tmp_path) == WHOLE_LOG


def test_the_log_is_on_the_disk_before_the_state(tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    at_save: list[tuple[int, bool]] = []
    flush, save = os.fsync, checkpoint.save
    log = tmp_path / "log.jsonl"

    def note_flush(handle: int) -> None:
        flush(handle)
        if log.exists() and os.fstat(handle).st_ino == log.stat().st_ino:
            flushed.append(log.stat().st_size)

    def note_save(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        on_disk = log.read_bytes()[: flushed[-1]].splitlines()  # steps go on meanwhile and write more
        at_save.append((step, step in [json.loads(line)["step"] for line in on_disk]))
        return save(folder, step, *args, **options)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(checkpoint, "save", note_save)
    pretrain(nano(), tmp_path, on_step=ignore)
    assert at_save == [(3, True), (6, True)]


def refuse(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[int]:
    """Make the saves after some steps fail; the steps of all tries."""
    tries: list[int] = []
    save = checkpoint.save

    def maybe(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        tries.append(step)
        if step in steps:
            raise TrainingError(f"step-{step}: the state was not saved (No space left on device)")
        return save(folder, step, *args, **options)

    monkeypatch.setattr(checkpoint, "save", maybe)
    return tries


def test_a_state_that_cannot_be_saved_is_tried_again_at_the_next_time(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = refuse(monkeypatch, {2, 4})
    with pytest.warns(UserWarning, match=r"not saved \(No space.*; training goes on, .* after 2 more steps") as told:
        run = pretrain(nano(run={"steps": 7, "save_every": 2}), tmp_path, on_step=ignore)
    assert (tries, len(told), run.steps_done) == ([2, 4, 6, 7], 2, 7)
    assert [step for step, is_validation in logged(tmp_path) if is_validation] == [2, 4, 6, 7]


def test_steps_go_on_while_a_state_is_saved_and_the_next_save_waits(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    go_on = threading.Event()
    save = checkpoint.save

    def slow(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        if step == 3:
            assert go_on.wait(60)
        told.append(f"saved {step}")
        return save(folder, step, *args, **options)

    def on_step(report: StepReport) -> None:
        told.append(f"step {report.step}")
        if report.step == 5:
            go_on.set()

    monkeypatch.setattr(checkpoint, "save", slow)
    pretrain(nano(run={"steps": 8}), tmp_path, on_step=on_step)
    assert told.index("saved 3") > told.index("step 5")
    assert [entry for entry in told if entry.startswith("saved")] == ["saved 3", "saved 6", "saved 8"]


def test_a_run_that_ends_with_an_error_first_finishes_its_save(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, step = checkpoint.save, Idle.step

    def slow(*args: Any, **options: Any) -> Path:
        time.sleep(0.2)
        return save(*args, **options)

    def wrong(self: Idle) -> StepReport:
        if self.steps_done == 3:
            raise TrainingError("step 4: the loss is not finite")
        return step(self)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(Idle, "step", wrong)
    with pytest.raises(TrainingError, match="not finite"):
        pretrain(nano(), tmp_path, on_step=ignore)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found[0] == 3


@pytest.mark.parametrize("steps", [5, 6])
def test_a_last_state_that_cannot_be_saved_is_an_error(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    tries = refuse(monkeypatch, {steps})
    with pytest.raises(TrainingError, match=f"step-{steps}: the state was not saved .No space"):
        pretrain(nano(run={"steps": steps}), tmp_path, on_step=ignore)
    assert tries == [3, steps]


def test_a_stop_right_after_a_failed_save_tries_once_more_and_is_an_error(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[StepReport] = []
    tries = refuse(monkeypatch, {3})
    with (
        pytest.warns(UserWarning, match="training goes on"),
        pytest.raises(TrainingError, match="the state was not saved"),
    ):
        pretrain(nano(), tmp_path, on_step=seen.append, stopping=lambda: len(seen) == 3)
    assert tries == [3, 3]


@pytest.mark.parametrize("killed_at", [3, 6])
def test_a_validation_that_was_killed_is_made_up_for(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    def kill(self: Idle) -> float:
        if self.steps_done == killed_at:
            raise KeyboardInterrupt
        return 0.5

    with monkeypatch.context() as patch:
        patch.setattr(Idle, "validation_loss", kill)
        with pytest.raises(KeyboardInterrupt):
            pretrain(nano(), tmp_path, on_step=ignore)
    assert logged(tmp_path)[-1] == (killed_at, False)
    steps: list[int] = []
    told: list[tuple[int, float]] = []
    for _ in range(2):  # the second time nothing is missing
        pretrain(
            nano(),
            tmp_path,
            on_step=lambda report: steps.append(report.step),
            on_validation=lambda step, loss: told.append((step, loss)),
        )
    assert steps == list(range(killed_at + 1, 7))
    assert told == [(step, step / 8) for step in (3, 6) if step >= killed_at]
    assert logged(tmp_path) == WHOLE_LOG
