"""Gives memory that is free, but still held by the C library, back to the system; needs no torch."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable

__all__ = ["Trimmer", "trim"]


def trim() -> bool:
    """Give back what can be given back; whether it can be done here: only glibc has a call for it."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return False
    call(ctypes.c_size_t(0))
    return True


class Trimmer:
    """Calls ``trim`` at most once in ``every_s`` seconds.

    Each step of a model takes and frees pieces of memory of other sizes. What is free between pieces that are in use
    stays resident, and more of it with time, although little is in use.
    """

    def __init__(
        self, every_s: float = 10.0, *, clock: Callable[[], float] = time.monotonic, call: Callable[[], bool] = trim
    ) -> None:
        self._every_s, self._clock, self._call = every_s, clock, call
        self._last = clock()

    def tick(self) -> None:
        """Trim if it is time to."""
        now = self._clock()
        if now - self._last >= self._every_s:
            self._call()
            self._last = self._clock()
