"""A picture of what was measured: tokens per second by side, the range of the turns, and the limit of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mixtral.bench.report import Row
from mixtral.bench.turns import OURS
from mixtral.errors import ConfigError

__all__ = ["check_plot", "write_plot"]

_KINDS = (".png", ".svg", ".pdf")
_COLOURS = ("#1f6f8b", "#c0793a")


def check_plot(path: Path) -> None:
    """Raise before anything is measured, if no picture could be written there.

    Raises:
        ConfigError: matplotlib is missing, or the name does not end like one of a picture.
    """
    if path.suffix.lower() not in _KINDS:
        raise ConfigError(f"--plot is {str(path)!r}; expected a name that ends in {', '.join(_KINDS)}", param="plot")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; install it with `pip install 'mixtral[bench]'`", param="plot")


def write_plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """One panel for each piece of work, as their numbers have different sizes.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(max(5.0, 2.3 * len(rows)), 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for place, (side, found) in enumerate(row.figures.items()):
            reach = [[found.median - found.lowest], [found.highest - found.median]]
            axes.bar(place, found.median, yerr=reach, capsize=4, width=0.7, color=_COLOURS[side != OURS], label=side)
            axes.annotate(f"{found.median:.4g}", (place, 0), xytext=(0, 4), textcoords="offset points", ha="center")
        axes.axhline(row.roof, linestyle="--", linewidth=1, color="black")
        axes.set_ylim(0, 1.08 * max(row.roof, *(found.highest for found in row.figures.values())))
        axes.set_xticks(range(len(row.figures)), list(row.figures), rotation=20)
        ratio = "" if row.ratio is None else f"\n{row.ratio:.2f} times as fast"
        axes.set_title(f"{row.measured.work.name}{ratio}", fontsize="small")
    figure.supylabel("tokens per second; dashed: limit of the machine", fontsize="small")
    figure.savefig(path, dpi=150)
