"""The loop that every recipe runs in: step, log, save, evaluate, stop. It knows nothing of what a step computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mixtral.parallel.mesh import Mesh
from mixtral.train import checkpoint
from mixtral.train.config import OptimConfig, RunConfig
from mixtral.train.log import Log
from mixtral.train.saves import Saved, Saves

__all__ = ["Run", "Settings", "StepReport", "drive"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. Losses are per token (of DPO: per pair).

    ``load_max`` and ``load_min`` are the largest and the smallest share that an expert of any layer has of the choices
    of the whole step, in however many parts it was computed; 1 is even. ``entropy`` is that of the shares, 1 where all
    are even, as the mean over layers; ``dead`` counts the experts without a token in this step, ``collapsed`` those
    that the alarm is about, ``skipped`` the steps so far whose gradient was too long. ``agreement`` is the part of the
    choices on a fixed batch that are those of the first step; it is measured every ``save_every`` steps and at the end.
    """

    step: int
    loss: float
    balance: float
    z: float
    grad_norm: float
    learning_rate: float
    load_max: float
    load_min: float
    tokens: int
    seconds: float
    tokens_total: int
    seconds_total: float
    entropy: float = math.nan
    max_violation: float = 0.0
    dead: int = 0
    collapsed: int = 0
    agreement: float = 1.0
    skipped: int = 0

    def highlights(self) -> str:
        """What the progress line shows beside the loss; nothing but in recipes with numbers of their own."""
        return ""


class Settings(Protocol):
    """What the loop and the shared part of the recipes ask of a configuration."""

    @property
    def optim(self) -> OptimConfig:
        """Rates and coefficients."""
        ...

    @property
    def run(self) -> RunConfig:
        """Length, saving, precision."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...


class Run(Saved, Protocol):
    """What the loop asks of a recipe: a run in a folder that knows how far it is."""

    mesh: Mesh

    @property
    def config(self) -> Settings:
        """The configuration, with the number of steps."""
        ...

    def step(self) -> StepReport:
        """Train the next step."""
        ...

    def validation_loss(self) -> float | None:
        """The loss on held-out text, None where there is none."""
        ...

    def averaged_loss(self) -> float | None:
        """The same of the averaged weights; only asked for if ``optim.ema`` is not 0."""
        ...


R = TypeVar("R", bound=Run)


def drive(
    folder: Path,
    build: Callable[[], R],
    *,
    on_ready: Callable[[R], None] = lambda run: None,
    on_step: Callable[[StepReport], None],
    on_validation: Callable[[int, float], None] = lambda step, loss: None,
    max_seconds: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> R:
    """Build the run of a folder and train it to the end of the configuration, or until ``max_seconds`` or
    ``stopping()``; the state is saved at the end. Meanwhile no other process trains in the folder. ``on_ready`` gets
    the run before its first step. On several ranks any of them can stop all, and the first one alone logs and reports.

    Warns:
        UserWarning: the log could not be written, or a state before the last; the training goes on.

    Raises:
        TrainingError: a step is refused, another process trains in the folder, or the last state could not be saved.
    """
    start = time.monotonic()
    with checkpoint.exclusive(folder) if mesh is None or mesh.is_first else nullcontext():
        run = build()
        on_ready(run)
        end = math.inf if max_seconds is None else start + max_seconds
        _drive(run, on_step, on_validation, lambda: time.monotonic() >= end or stopping())
    return run


def _drive(
    run: Run,
    on_step: Callable[[StepReport], None],
    on_validation: Callable[[int, float], None],
    stopping: Callable[[], bool],
) -> None:
    log = Log(run.folder / "log.jsonl", run.steps_done) if run.mesh.is_first else None
    if run.steps_done and run.mesh.any(log is not None and not log.evaluated):  # killed before its evaluation
        _evaluate(run, log, on_validation)
    saves = Saves(run)
    try:
        while run.steps_done < run.config.run.steps:
            if run.mesh.any(stopping()):
                break
            report = run.step()
            saves.look()
            if log is not None:
                log.add(asdict(report))
                on_step(report)
            is_last = run.steps_done == run.config.run.steps
            if run.steps_done % run.config.run.save_every == 0 and not is_last:
                _flush(log)
                saves.begin()
                _evaluate(run, log, on_validation)
    finally:
        saves.wait()
    if saves.step != run.steps_done:
        _flush(log)
        run.save()
        _evaluate(run, log, on_validation)


def _flush(log: Log | None) -> None:
    if log is not None:
        log.flush()


def _evaluate(run: Run, log: Log | None, on_validation: Callable[[int, float], None]) -> None:
    """The validation loss of a state that is saved or being saved: a run that is killed meanwhile makes up for it if
    it goes on from that state, and drops it if it goes on from the one before."""
    loss = run.validation_loss()
    if loss is None:
        return
    record: dict[str, Any] = {"step": run.steps_done, "validation_loss": loss}
    if run.config.optim.ema:
        record["averaged_validation_loss"] = run.averaged_loss()
    if log is not None:
        log.add(record)
        on_validation(run.steps_done, loss)
