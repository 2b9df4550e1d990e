"""``--parallel``: start the ranks of this machine, or be one of those that a launcher started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtral.parallel.mesh import Mesh

__all__ = ["HELP", "joined", "launched_ranks"]

HELP = "Axes and their ranks, such as dp=2 or dp=4,tp=2,ep=2; starts them here unless torchrun has."


def launched_ranks(parallel: str | None, arguments: Sequence[str], stopping: Callable[[], bool]) -> bool:
    """Run ``mixtral`` with these arguments as the ranks of ``parallel``, to their end; False if this process is to do
    the work itself: it is one of them, or there is only one.

    Raises:
        ConfigError: the axes cannot be read, or a launcher started several processes that know of no axes.
        TrainingError: a rank failed.
    """
    from mixtral.errors import ConfigError
    from mixtral.parallel.launch import launch
    from mixtral.parallel.mesh import in_a_launch
    from mixtral.parallel.plan import Axes

    if parallel is None:
        if in_a_launch():
            raise ConfigError("a launcher started this process as one of several; say how they share: --parallel dp=N")
        return False
    axes = Axes.parse(parallel)
    if in_a_launch() or axes.world == 1:
        return False
    launch([sys.executable, "-m", "mixtral", *arguments], axes.world, stopping=stopping)
    return True


@contextmanager
def joined(parallel: str | None) -> Iterator[tuple[Mesh, Callable[[], bool]]]:
    """The mesh this process is a rank of, alone without a launcher; and whether that launcher has died."""
    from mixtral.parallel.mesh import alone, in_a_launch, join
    from mixtral.parallel.plan import Axes

    if parallel is None or not in_a_launch():
        yield alone(), lambda: False
        return
    parent = os.getppid()
    with join(Axes.parse(parallel)) as mesh:
        yield mesh, lambda: os.getppid() != parent
