"""From waves of streams to figures: medians over turns, a table, JSON, a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streams import Wave

__all__ = ["FIGURES", "figures", "merge", "share", "table", "write_plot"]

Figures = dict[str, float]
"""The figures of one turn, by name."""

FIGURES: Mapping[str, str] = {
    "tokens_per_s": "output tokens/s",
    "ttft_median": "first token, median s",
    "ttft_p95": "first token, p95 s",
    "gap_median": "gap, median ms",
    "gap_p95": "gap, p95 ms",
    "gap_p99": "gap, p99 ms",
    "gap_ratio": "gap, p95 / median",
    "tokens_per_event": "tokens per event",
    "http_us": "HTTP process, us per token",
    "client_share": "client, share of a core",
    "others_share": "others, share of all cores",
}
"""Name of a figure -> the head of its column."""


def figures(found: Wave, *, tokens: int, prompt: int, cpu: Mapping[str, float]) -> Figures:
    """The figures of one wave whose answers must have ``tokens`` tokens, and prompts ``prompt``; ``cpu`` is what the
    processes of the server took meanwhile.

    Raises:
        ValueError: an answer, or a prompt, has another length.
    """
    for answer in found.answers:
        if (answer.tokens, answer.prompt_tokens) != (tokens, prompt):
            got = f"{answer.tokens} tokens after {answer.prompt_tokens}"
            raise ValueError(f"an answer has {got}; expected {tokens} after {prompt}")
    made = tokens * len(found.answers)
    first = [answer.first for answer in found.answers]
    gaps = [gap for answer in found.answers for gap in answer.gaps] or [0.0]
    median, late = statistics.median(gaps), share(gaps, 0.95)
    return {
        "tokens_per_s": made / found.seconds,
        "ttft_median": statistics.median(first),
        "ttft_p95": share(first, 0.95),
        "gap_median": 1e3 * median,
        "gap_p95": 1e3 * late,
        "gap_p99": 1e3 * share(gaps, 0.99),
        "gap_ratio": late / median if median else math.nan,
        "tokens_per_event": made / sum(len(answer.times) for answer in found.answers),
        "http_us": 1e6 * cpu["http"] / made,
        "engine_us": 1e6 * cpu["engine"] / made,
        "client_share": found.client_cpu / found.seconds,
        "seconds": found.seconds,
    }


def share(values: Sequence[float], part: float) -> float:
    """The smallest value that at least ``part`` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def merge(files: Sequence[Path]) -> dict[str, Any]:
    """One result of several, with all their turns.

    Raises:
        ValueError: they measured different things.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    whole = found[0]
    for other in found[1:]:
        if other["settings"] != whole["settings"]:
            raise ValueError("the files were measured with different settings; expected the same")
        for server, by_streams in other["turns"].items():
            for streams, turns in by_streams.items():
                whole["turns"].setdefault(server, {}).setdefault(streams, []).extend(turns)
    return dict(whole)


def medians(turns: Mapping[str, Mapping[str, Sequence[Figures]]]) -> dict[str, dict[int, Figures]]:
    """Server -> number of streams -> figures, each the median of all turns."""
    return {
        server: {
            int(streams): {name: statistics.median(turn[name] for turn in rows) for name in rows[0]}
            for streams, rows in sorted(by_streams.items(), key=lambda one: int(one[0]))
        }
        for server, by_streams in turns.items()
    }


def table(turns: Mapping[str, Mapping[str, Sequence[Figures]]]) -> str:
    """A table in Markdown: a row for each number of streams and server, medians of the turns."""
    found = medians(turns)
    lines = ["| streams | server | turns | " + " | ".join(FIGURES.values()) + " |"]
    lines.append("|---" * (3 + len(FIGURES)) + "|")
    for streams in sorted({streams for rows in found.values() for streams in rows}):
        for server, rows in found.items():
            if streams in rows:
                cells = [_shown(rows[streams][name]) for name in FIGURES]
                count = len(turns[server][str(streams)])
                lines.append(f"| {streams} | {server} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_plot(path: Path, turns: Mapping[str, Mapping[str, Sequence[Figures]]], title: str) -> None:
    """Three panels against the number of streams: throughput, first token, gaps."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    panels = {
        "output tokens per second": ("tokens_per_s", ""),
        "seconds to the first token": ("ttft_median", "ttft_p95"),
        "milliseconds between tokens": ("gap_median", "gap_p95"),
    }
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for axes, (label, (middle, late)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for colour, (server, rows) in zip(("#1f6f8b", "#c0793a"), medians(turns).items(), strict=False):
            axes.plot(
                list(rows),
                [row[middle] for row in rows.values()],
                "o-",
                color=colour,
                label=f"{server}, median" if late else server,
            )
            if late:
                axes.plot(list(rows), [row[late] for row in rows.values()], "o--", color=colour, label=f"{server}, p95")
        axes.set(xscale="log", xlabel="streams", title=label, ylim=(0, None))
        axes.title.set_fontsize("small")
        streams = sorted({count for rows in medians(turns).values() for count in rows})
        axes.set_xticks(streams, [str(count) for count in streams])
        axes.minorticks_off()
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
