"""Reading ahead of a mapped file: a thread has the pages in memory before they are asked for.

What is read now is packed or copied while the pages of the next megabytes are on their way from the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading

__all__ = ["POPULATE_READ", "ReadAhead"]

POPULATE_READ = 22
"""Maps pages that will be read all at once; the standard library has no name for it."""

_STEP = 8 << 20  # bytes that are asked for at once
_AHEAD = 32 << 20  # and most that are mapped before they are needed


class ReadAhead:
    """One thread that stays ahead of a reader going through maps from their beginnings to their ends, and gives back
    the pages behind it.

    Does nothing where the system cannot map pages on demand (Linux can from 5.14 on). ``close`` ends the thread.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._memory: mmap.mmap | None = None
        self._done = self._position = 0  # mapped up to, and where the reader goes on
        self._passed: list[tuple[mmap.mmap, int, int]] = []
        self._thread: threading.Thread | None = None
        self._closed = sys.platform != "linux"

    def need(self, memory: mmap.mmap, start: int, stop: int) -> bool:
        """Wait until these bytes of a map are in memory; what follows them comes next. False if nobody does that."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="mixtral-read-ahead", daemon=True)
            self._thread.start()
        with self._turn:
            # A map from its beginning on, or a reader that goes back: what it comes to may have been given back. One
            # that goes on begins in the page where it ended.
            if memory is not self._memory or start + mmap.PAGESIZE <= self._position:
                self._memory, self._done = memory, start
            self._done, self._position = max(self._done, start), stop
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._closed or self._done >= min(stop, len(memory)))
            return not self._closed

    def release(self, memory: mmap.mmap, start: int, count: int) -> bool:
        """These bytes of a map are not needed any more. False if nobody does that."""
        with self._turn:
            self._passed.append((memory, start, count))
            self._turn.notify_all()
            return not self._closed

    def close(self) -> None:
        """Wait for the thread to end. Nothing refers to a map any more."""
        with self._turn:
            self._closed, self._memory = True, None
            self._passed.clear()
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            # mmap.madvise keeps the interpreter's lock while it waits for the disk; a call by ctypes does not.
            advise = ctypes.CDLL(None).madvise
            advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            while (task := self._task()) is not None:
                memory, start, count, advice = task
                first = ctypes.c_char.from_buffer(memory)
                failed = advise(ctypes.addressof(first) + start, count, advice)
                del first, task
                with self._turn:
                    # Not a piece behind a gap: the reader went back while it was mapped.
                    if advice == POPULATE_READ and memory is self._memory and start <= self._done:
                        self._done = max(self._done, start + count)
                    self._closed = self._closed or failed != 0
                    self._turn.notify_all()
                del memory
        finally:
            with self._turn:
                self._closed = True
                self._turn.notify_all()

    def _task(self) -> tuple[mmap.mmap, int, int, int] | None:
        """What is to be done next: map, first byte, number of bytes, and what to tell the system; None at the end."""
        with self._turn:
            self._turn.wait_for(lambda: self._closed or bool(self._passed) or self._wanted())
            if self._closed or (self._memory is None and not self._passed):
                return None
            if self._passed or self._memory is None:
                return (*self._passed.pop(), mmap.MADV_DONTNEED)
            start = self._done // mmap.PAGESIZE * mmap.PAGESIZE
            return self._memory, start, min(_STEP, len(self._memory) - start), POPULATE_READ

    def _wanted(self) -> bool:
        memory = self._memory
        return memory is not None and self._done < min(len(memory), self._position + _AHEAD)
