"""Starting the ranks of one machine, and ending them together. They meet through a file that no other user can open."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mixtral.errors import TrainingError
from mixtral.parallel.mesh import rank_variables

__all__ = ["launch"]

_POLL_S = 0.05
_GRACE_S = 30.0


def launch(
    command: Sequence[str], world: int, *, stopping: Callable[[], bool] = lambda: False, grace_s: float = _GRACE_S
) -> None:
    """Run ``command`` as ``world`` ranks and wait for all of them.

    When ``stopping()``, every rank gets SIGTERM once: training ends after the present step, saved. When a rank fails,
    the others cannot go on: they get SIGTERM and, after ``grace_s``, SIGKILL.

    Raises:
        TrainingError: a rank ended with an error; what it said is in the output.
    """
    # mkdtemp makes the folder with mode 0700.
    with tempfile.TemporaryDirectory(prefix="mixtral-ranks-") as folder:
        store = Path(folder) / "store"
        # In sessions of their own: a Ctrl-C reaches this process alone, which passes it on once.
        ranks = [
            subprocess.Popen(command, env=rank_variables(rank, world, store), start_new_session=True)
            for rank in range(world)
        ]
        try:
            failed = _wait(ranks, stopping)
        finally:
            _end(ranks, grace_s)
    if failed is not None:
        how = _how(ranks[failed].returncode)
        raise TrainingError(f"rank {failed} of {world} ended with {how}; its message stands above this one")


def _wait(ranks: Sequence[subprocess.Popen[bytes]], stopping: Callable[[], bool]) -> int | None:
    """Wait until all ranks ended well, or one did not: its number."""
    asked = False
    while True:
        codes = [rank.poll() for rank in ranks]
        for number, code in enumerate(codes):
            if code:
                return number
        if all(code == 0 for code in codes):
            return None
        if stopping() and not asked:
            asked = True
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        time.sleep(_POLL_S)


def _end(ranks: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """End what still runs."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + grace_s
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
