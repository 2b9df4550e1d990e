"""``--parallel``: start the ranks of this machine, or be one of those that a launcher started."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mixtral.parallel.mesh import Mesh

__all__ = ["HELP", "arguments_of", "is_to_launch", "joined", "launched"]

HELP = "Axes and their ranks, such as dp=2 or dp=4,tp=2,ep=2; starts them here unless torchrun has."


def is_to_launch(parallel: str | None) -> bool:
    """Whether this process is to start the ranks: there are several, and no launcher has.

    Raises:
        ConfigError: the axes cannot be read, or a launcher started several processes that know of no axes.
    """
    from mixtral.errors import ConfigError
    from mixtral.parallel.mesh import in_a_launch
    from mixtral.parallel.plan import Axes

    if parallel is not None:
        return Axes.parse(parallel).world > 1 and not in_a_launch()
    if in_a_launch():
        raise ConfigError("a launcher started this process as one of several; say how they share: --parallel dp=N")
    return False


def arguments_of(context: typer.Context) -> list[str]:
    """The words that gave a command its parameters: one of its ranks gets the same."""
    words: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        option = [] if parameter.param_type_name == "argument" else [max(parameter.opts, key=len)]
        if isinstance(value, bool):
            words += option if value else []
            continue
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        words += [word for one in values for word in (*option, str(one))]
    names: list[str] = []
    place: Any = context
    while place.parent is not None:
        names, place = [place.info_name, *names], place.parent
    return names + words


def launched(arguments: Sequence[str], parallel: str | None, stopping: Callable[[], bool]) -> None:
    """Run ``mixtral`` with these arguments as the ranks of ``parallel``, to their end.

    Raises:
        TrainingError: a rank failed.
    """
    from mixtral.parallel.launch import launch
    from mixtral.parallel.plan import Axes

    launch([sys.executable, "-m", "mixtral", *arguments], Axes.parse(parallel or "").world, stopping=stopping)


@contextmanager
def joined(parallel: str | None, device: str | None = None) -> Iterator[Mesh]:
    """The mesh that this process is a rank of; alone without a launcher, on ``device`` or else the CPU."""
    from mixtral.ops.devices import device_of
    from mixtral.parallel.mesh import alone, in_a_launch, join
    from mixtral.parallel.plan import Axes

    if parallel is None or not in_a_launch():
        yield alone(device_of(device or "cpu"))
        return
    with join(Axes.parse(parallel), device=device) as mesh:
        yield mesh
