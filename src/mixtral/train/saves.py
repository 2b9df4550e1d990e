"""Saving a run while it trains: a thread commits a copy of the state, where the run can give one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from mixtral.errors import TrainingError
from mixtral.train.config import RunConfig

__all__ = ["Saved", "Saves"]


class _Settings(Protocol):
    """What is asked of a configuration."""

    @property
    def run(self) -> RunConfig:
        """How often to save."""
        ...


class Saved(Protocol):
    """A run that can be saved."""

    folder: Path
    steps_done: int

    @property
    def config(self) -> _Settings:
        """The configuration."""
        ...

    def save(self) -> Path:
        """Commit the run state of this moment."""
        ...

    def snapshot(self) -> Callable[[], Path] | None:
        """The same for a thread: what commits a copy of the state of this moment. None if it must be ``save``."""
        ...


class Saves:
    """The saves of a run while it trains, one at a time. A disk that refuses may take the next one; what was trained
    is still in memory. ``step`` is that of the last state that was saved."""

    def __init__(self, run: Saved) -> None:
        self.step = run.steps_done
        self._run = run
        self._pool = ThreadPoolExecutor(1, "save")
        self._pending: tuple[int, Future[Path]] | None = None

    def begin(self) -> None:
        """Save the state of this moment, if possible in a thread; first wait for the save before."""
        self.wait()
        step, commit = self._run.steps_done, self._run.snapshot()
        if commit is None:
            self._end(step, self._run.save)
        else:
            self._pending = (step, self._pool.submit(commit))

    def look(self) -> None:
        """Tell of the save before, if it has ended and was not told of."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save before; one that failed is told of."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            self._end(step, future.result)

    def _end(self, step: int, result: Callable[[], Path]) -> None:
        try:
            result()
        except TrainingError as error:
            every = self._run.config.run.save_every
            warnings.warn(f"{error}; training goes on, the next try is after {every} more steps", stacklevel=5)
        else:
            self.step = step
