"""What every child process of the server does first."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys

__all__ = ["confine"]

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def confine(*, dies_with_starter: bool = True) -> None:
    """Gain no rights, leave no core file, leave signals meant for all to the parent, and be killed when it ends.

    Linux counts the thread that started the process as its parent: not ``dies_with_starter`` is for processes that
    outlive theirs, and notice the end in another way.

    Raises:
        OSError: the system refuses.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        last = signal.SIGKILL if dies_with_starter else 0
        for option, value in ((_PR_SET_PDEATHSIG, last), (_PR_SET_NO_NEW_PRIVS, 1)):
            if libc.prctl(option, value, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
