"""How busy a machine is with other things than the side that is measured: what they take, a measurement lacks."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Watch", "share_of_others"]

_PROC = Path("/proc")


class Watch:
    """Over the time between its making and the call of ``share``."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._started, self._busy, self._own = time.monotonic(), _busy_seconds(), _group_seconds(group)

    def share(self) -> float | None:
        """What processes outside the process group, and other machines on the same processors, took of all processors:
        0 to 1; None where the system does not tell (anywhere but on Linux)."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        seconds = (time.monotonic() - self._started) * (os.cpu_count() or 1)
        return share_of_others(seconds, busy - self._busy, _group_seconds(self._group) - self._own)


def share_of_others(seconds: float, busy: float, own: float) -> float:
    """Of so many processor seconds, where so many were busy and so many of these with the side itself."""
    return min(1.0, max(0.0, (busy - own) / seconds)) if seconds > 0 else 0.0


def _busy_seconds() -> float | None:
    """Of all processors since the system started, with those that a host gave to other machines."""
    try:
        fields = (_PROC / "stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / _ticks()


def _group_seconds(group: int) -> float:
    """Of the living processes of a group."""
    total = 0
    for folder in _PROC.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if len(fields) > 12 and int(fields[2]) == group:
            total += int(fields[11]) + int(fields[12])
    return total / _ticks()


def _ticks() -> int:
    """Of the system's clock in a second."""
    return os.sysconf("SC_CLK_TCK")
