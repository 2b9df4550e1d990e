"""TensorBoard: the numbers of a step under their groups; without the package, one sentence."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mixtral.errors import ConfigError
from mixtral.train.board import Board
from mixtral.train.dpo import PreferenceReport
from mixtral.train.loop import StepReport

NUMBERS: dict[str, Any] = dict.fromkeys(StepReport.__slots__, 0) | {
    "step": 7,
    "loss": 1.5,
    "tokens": 10,
    "seconds": 2.0,
}


class Writer:
    """In the place of torch's: keeps what it is told."""

    made: list[Writer]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = Path(folder), purge_step, False
        self.values: dict[str, tuple[float, int]] = {}
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.values[name] = (value, step)

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    Writer.made = []
    return Writer.made


def test_numbers_come_in_groups_and_replace_those_that_are_trained_again(tmp_path: Path, writers: list[Writer]) -> None:
    board = Board(tmp_path)
    assert not writers
    board.step(StepReport(**NUMBERS))
    board.validation(7, 0.5)
    board.close()
    (writer,) = writers
    assert (writer.folder, writer.purge_step, writer.closed) == (tmp_path / "tensorboard", 7, True)
    assert writer.values["loss/loss"] == (1.5, 7)
    assert writer.values["loss/validation"] == (0.5, 7)
    assert writer.values["speed/tokens_per_second"] == (5.0, 7)
    assert {"router/entropy", "router/agreement", "router/collapsed", "optim/skipped"} <= writer.values.keys()
    assert not any(name.startswith("preference") for name in writer.values)


def test_a_validation_that_comes_first_does_not_purge_the_numbers_of_its_step(
    tmp_path: Path, writers: list[Writer]
) -> None:
    Board(tmp_path).validation(7, 0.5)  # a run was killed while it was evaluated, and goes on
    assert (writers[0].purge_step, writers[0].values["loss/validation"]) == (8, (0.5, 7))


def test_preferences_have_a_group_of_their_own(tmp_path: Path, writers: list[Writer]) -> None:
    more = dict.fromkeys(("margin", "accuracy", "kl", "chosen_logprob", "rejected_logprob", "routing_agreement"), 0.5)
    board = Board(tmp_path)
    board.step(PreferenceReport(**NUMBERS, **more))
    assert {f"preference/{name}" for name in more} <= writers[0].values.keys()


def test_a_number_that_was_not_measured_is_left_out(tmp_path: Path, writers: list[Writer]) -> None:
    board = Board(tmp_path)
    board.step(StepReport(**NUMBERS | {"entropy": float("nan")}))
    assert "router/entropy" not in writers[0].values


def test_without_the_package_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard, .*pip install 'mixtral\[train\]'"):
        Board(tmp_path)


def test_event_files_are_what_tensorboard_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path)
    for step in (1, 2):
        board.step(StepReport(**NUMBERS | {"step": step, "loss": 2.0 / step}))
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/loss")] == [(1, 2.0), (2, 1.0)]
