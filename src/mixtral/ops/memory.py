"""Memory for weights and caches, and of files, in pages of 2 MB where the system has them; how much of it is left."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["LARGE", "available_bytes", "empty", "keep_freed", "map_file"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h
LARGE = 4 << 20
"""Bytes from which on large pages are asked for."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As ``torch.empty`` on the CPU; from 4 MB on in large pages, which saves most look-ups of addresses.

    Reading weights of 1 GB on two threads took 1.2 to 1.4 times as long with pages of 4 KB (virtual machine, Zen 4).
    Linux gives large pages where ``/sys/kernel/mm/transparent_hugepage/enabled`` is ``madvise`` or ``always``.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: ordinary pages do as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def map_file(path: Path) -> mmap.mmap:
    """The memory of a whole file, which nobody may change or cut meanwhile; what is written to it stays here.
    In large pages where the file system has them (ext4, XFS and btrfs of recent kernels).

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def keep_freed() -> bool:
    """Let this process keep what it frees, instead of giving it back to the system; whether its C library can.

    A training step takes and frees gigabytes, and glibc maps each large piece anew, in pages that the kernel clears.
    Without that, a step of the size `mid` of the benchmarks took 2.9 s instead of 3.5 to 3.7 s (Zen 5). What a process
    holds stays near its peak.
    """
    try:
        call = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(call(_MMAP_MAX, 0)) and bool(call(_TRIM_THRESHOLD, -1))


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory of a device that can still be taken. On the CPU that is what Linux says (under ``root``), within the limit
    of the process's control group; 2 GB where nothing is said."""
    if device.type != "cpu":
        free, _ = torch.accelerator.get_memory_info(device)
        return int(free)
    known = [
        int(line.split()[1]) * 1024
        for line in _read(root / "proc/meminfo").splitlines()
        if line.startswith("MemAvailable:")
    ]
    most, used = (_read(root / "sys/fs/cgroup" / name).strip() for name in ("memory.max", "memory.current"))
    if most.isdigit() and used.isdigit():
        known.append(max(0, int(most) - int(used)))
    return min(known, default=2 << 30)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
