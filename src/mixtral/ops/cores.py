"""How many threads suit this process: the physical cores that it may use, within the quota of its control groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

__all__ = ["usable_cores"]

_CPUS = "sys/devices/system/cpu"
# Two threads of one core share what computes: a second one adds little and makes the first one slower.
_SIBLINGS = ("core_cpus_list", "thread_siblings_list")


def usable_cores(root: Path = Path("/"), allowed: Collection[int] | None = None) -> int:
    """Physical cores among the CPUs ``allowed`` (default: this process's affinity), at most the quota, at least 1.

    A quota of 2.5 CPUs counts as 2: with a third thread all of them would be stopped for part of the time. Linux tells
    cores and quotas under ``root``; elsewhere every CPU counts as a core.
    """
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_siblings(root, cpu) for cpu in allowed})
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _siblings(root: Path, cpu: int) -> str:
    """The CPUs of one's core as Linux lists them; the CPU's own number where it does not."""
    for name in _SIBLINGS:
        if found := _read(root / _CPUS / f"cpu{cpu}" / "topology" / name):
            return found
    return f"{cpu}"


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that the process's control groups, and those around them, may use on average."""
    mounts = [line.split(" - ") for line in _read(root / "proc/self/mountinfo").splitlines() if " - " in line]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for place, kind in mounts:
            system, _, options = kind.split(" ", 2)
            if controllers:
                if system == "cgroup" and "cpu" in options.split(","):
                    yield from _limits(root, place, path, _first_quota)
            elif system == "cgroup2":
                yield from _limits(root, place, path, _second_quota)


def _limits(root: Path, mount: str, group: str, read: Callable[[Path], float | None]) -> Iterator[float]:
    """The limits of a group and of all above it that are mounted, by ``read``."""
    shown, at = (field.replace("\\040", " ") for field in mount.split(" ")[3:5])
    top = root / at.lstrip("/")
    # In a container the group may lie outside of what is mounted: then the mount itself is its own.
    inside = Path(group).is_relative_to(shown) and ".." not in Path(group).parts
    folder = top / Path(group).relative_to(shown) if inside else top
    while True:
        limit = read(folder)
        if limit is not None:
            yield limit
        if folder == top:
            return
        folder = folder.parent


def _first_quota(folder: Path) -> float | None:
    """Of control groups version 1: two files with microseconds, -1 for no limit."""
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _second_quota(folder: Path) -> float | None:
    """Of version 2: one line, quota and period, "max" for no limit."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    """A file of the system without white space around it; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
