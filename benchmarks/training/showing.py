"""The results of ``skill.py`` as a table and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["table", "write_pictures"]

_COLOURS = ("#1f6f8b", "#c0793a", "#5b8c3e", "#8a4f7d", "#b5473c", "#7a7a7a")


def table(found: Mapping[str, Any]) -> str:
    """In Markdown: a row per method, and the two bases before any training."""
    head = ("trained", "numbers", "rate", "s", "memory, MB", "file, MB", "form", "known sums", "new sums", "old skills")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, scores in found["before"].items():
        what = "nothing (embedded)" if name == "embedded" else "nothing (int4)"
        lines.append(f"| {what} | | | | | | {_scores(scores)} |")
    for row in found["methods"].values():
        cells = (
            row["label"] + (f" ({row['experts']})" if row["experts"] else ""),
            f"{row['trained']:,}",
            f"{row['rate']:g}",
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['scores']['file_bytes'] / 1e6:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} | {_scores(row['scores'])} |")
    return "\n".join(lines)


def _scores(scores: Mapping[str, Any]) -> str:
    tests = [scores["known sums"], scores["new sums"]]
    form = 100 * sum(test["form"] for test in tests) / sum(test["n"] for test in tests)
    return " | ".join([f"{form:.0f} %", *map(_share, [*tests, scores["old"]])])


def _share(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{100 * one['right'] / one['n']:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def write_pictures(folder: Path, found: Mapping[str, Any], loads: Sequence[Sequence[Sequence[float]]]) -> None:
    """``training-curves.png``, ``training-skill.png`` and ``training-loads.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    _curves(folder / "training-curves.png", found["methods"])
    _bars(folder / "training-skill.png", found)
    _loads(folder / "training-loads.png", loads)


def _curves(path: Path, methods: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, row in zip(_COLOURS, methods.values(), strict=False):
        losses = row["losses"]
        means = [sum(part) / len(part) for part in (losses[max(0, end - 5) : end] for end in range(1, len(losses) + 1))]
        axes.plot(range(1, len(means) + 1), means, color=colour, label=f"{row['label']}, {row['rate']:g}")
    axes.set(yscale="log", xlabel="step", ylabel="loss, nats a token (mean of 5 steps)")
    axes.legend(fontsize="small", title="what is trained, learning rate", title_fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


def _bars(path: Path, found: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    rows = {"before": found["before"]["embedded"]}
    rows |= {row["label"]: row["scores"] for row in found["methods"].values()}
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, test in zip(figure.subplots(1, 3), ("known sums", "new sums", "old"), strict=True):
        for place, scores in enumerate(rows.values()):
            one = scores[test]
            share, (low, high) = 100 * one["right"] / one["n"], one["interval"]
            reach = [[max(0.0, share - 100 * low)], [max(0.0, 100 * high - share)]]
            axes.bar(place, share, yerr=reach, capsize=3, color=("black", *_COLOURS)[place], alpha=0.85)
        axes.set_xticks(range(len(rows)), list(rows), rotation=35, ha="right", fontsize="x-small")
        axes.set_ylim(0, 100)
        axes.set_title("old skills" if test == "old" else f"the new skill, {test}", fontsize="small")
        axes.grid(alpha=0.3, axis="y")
    figure.supylabel("right answers, %; bars: 95 % (Wilson)", fontsize="small")
    figure.savefig(path, dpi=130)


def _loads(path: Path, loads: Sequence[Sequence[Sequence[float]]]) -> None:
    from matplotlib.figure import Figure

    layers = len(loads[0])
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(2, -(-layers // 2), sharex=True, sharey=True).flat
    for layer, axes in enumerate(panels):
        rows = [[step[layer][expert] for step in loads] for expert in range(len(loads[0][layer]))]
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=2, interpolation="nearest")
        axes.set_title(f"layer {layer}", fontsize="small")
    figure.supxlabel("step", fontsize="small")
    figure.supylabel("expert", fontsize="small")
    figure.colorbar(image, ax=figure.axes, label="load (1 is even)", extend="max")
    figure.savefig(path, dpi=130)
