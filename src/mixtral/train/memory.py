"""The C library's allocator, set for a process that makes and frees the same large tensors over and over."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Parameter numbers of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make the process keep freed memory instead of giving it back to the system; whether the C library can (glibc).

    By default glibc maps every block beyond 32 MB anew, and the first touch of each page of it costs more than the
    arithmetic: a training step of the small preset is a sixth faster with this. The setting is the whole process's and
    stays; the process then holds on to its peak and some more, because aligned blocks leave gaps.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
