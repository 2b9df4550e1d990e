"""A time limit for many short waits, one after the other, that starts no timer for each of them."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, Self

__all__ = ["Deadline"]

_TICK_S = 1.0  # a timer that is not needed any more is gone after this


class Deadline:
    """Like ``asyncio.timeout``, to be used again and again: ``with deadline.within(seconds): await ...``.

    The time limit of a wait that ends in time costs no timer: one that is running anyway looks whether there is a wait,
    and how long it may still take. One wait at a time; what comes too late ends with TimeoutError.
    """

    def __init__(self) -> None:
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None  # who waits
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._cancelling = 0

    def within(self, seconds: float) -> Self:
        """The limit of the wait that follows."""
        self._due = time.monotonic() + seconds
        return self

    def __enter__(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(self._loop)  # without a loop it asks the system for the number of this process
        if task is None or self._task is not None:
            raise RuntimeError("a deadline is used by one task at a time")
        self._task = task
        self._cancelling = task.cancelling()
        if self._timer is None or self._timer.when() > self._due:
            self._arm(self._loop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._expired and task is not None:
            self._expired = False
            if task.uncancel() <= self._cancelling and kind is not None and issubclass(kind, asyncio.CancelledError):
                raise TimeoutError from error

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(min(self._due, loop.time() + _TICK_S), self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._task is None:
            return
        if time.monotonic() < self._due:
            self._arm(loop)
        else:
            self._expired = True
            self._task.cancel()
