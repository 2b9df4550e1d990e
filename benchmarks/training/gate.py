"""A contender's side of a contest: it trains when it is told to, and says how long that took and what came of it."""

from __future__ import annotations

import json
import resource
import sys
import time

__all__ = ["Gate"]


class Gate:
    """Around each step: ``begin`` waits for its turn, ``end`` notes the step.

    The parent writes a number of steps per line; the answer is a line of JSON when they are done: seconds (the waiting
    left out), tokens, and the losses of the steps. Peak memory is that of the process, in bytes. Without further lines
    the process ends.
    """

    def __init__(self) -> None:
        self._left = 0
        self._tokens, self._losses = 0, list[float]()
        self._start = 0.0
        # What the peers print goes elsewhere.
        self._out, sys.stdout = sys.stdout, sys.stderr

    def begin(self) -> None:
        """Before a step."""
        if self._left:
            return
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        self._left = int(line)
        self._tokens, self._losses = 0, []
        self._start = time.perf_counter()

    def end(self, tokens: int, loss: float) -> None:
        """After a step on that many tokens, padding not counted."""
        self._tokens += tokens
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            seconds = time.perf_counter() - self._start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            told = {"seconds": seconds, "tokens": self._tokens, "losses": self._losses, "peak": peak}
            self._out.write(json.dumps(told) + "\n")
            self._out.flush()
