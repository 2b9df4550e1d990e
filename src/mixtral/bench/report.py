"""Measurements as numbers, as lines of a table, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtral.bench.traffic import Weights, need
from mixtral.bench.turns import OURS, Measured
from mixtral.plan import expected_experts

__all__ = ["HEADER", "Figures", "Row", "lines", "row_of", "to_json"]


@dataclass(frozen=True, slots=True)
class Figures:
    """One side of one piece of work. Tokens per second over the turns; per second of the median turn, what the work
    must read and compute at least."""

    median: float
    lowest: float
    highest: float
    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True, slots=True)
class Row:
    """One piece of work: figures by side, shares of the limits by side, and how many times as fast we are."""

    measured: Measured
    figures: Mapping[str, Figures]
    weight_bytes: float
    cache_bytes: float
    operations: float
    products: str  # whose limit counts: int8, bf16 or fp32
    peak: float  # and what it is, in operations per second
    expected_experts: float
    roof: float  # tokens per second at the nearer limit
    ratio: float | None

    def shares(self, side: str) -> tuple[float, float]:
        """Of the read bandwidth and of the products, 0 to 1."""
        figures = self.figures[side]
        return figures.bytes_per_second / self.measured.limits.read, figures.operations_per_second / self.peak


def row_of(measured: Measured, weights: Weights, *, turns: int) -> Row:
    """The numbers of one piece of work."""
    work = measured.work
    wanted = need(weights, work, turns=turns, experts=measured.experts)
    figures = {}
    for side, found in measured.seconds.items():
        speeds = [work.tokens / sum(seconds) for seconds in found]
        median = statistics.median(speeds)
        units = median / wanted.tokens
        figures[side] = Figures(median, min(speeds), max(speeds), units * wanted.bytes, units * wanted.operations)
    products, peak = measured.limits.products(quantised=weights.quantised)
    others = [side for side in figures if side != OURS]
    return Row(
        measured,
        figures,
        wanted.weight_bytes,
        wanted.cache_bytes,
        wanted.operations,
        products,
        peak,
        expected_experts(weights.config, wanted.tokens),
        wanted.tokens * min(measured.limits.read / wanted.bytes, peak / wanted.operations),
        figures[OURS].median / figures[others[0]].median if others else None,
    )


_DISTURBED = 0.05  # of the processors: what others may take without a word

HEADER = (
    f"{'':16}{'':14}{'tokens/s':>10}{'lowest':>9}{'highest':>9}{'GB/s':>8}{'of limit':>10}{'TOPS':>8}{'of limit':>10}"
    f"{'ratio':>8}"
)


def lines(row: Row) -> list[str]:
    """One line of the table for each side, the ratio on ours; then what was counted, and the limits meanwhile."""
    found = []
    for place, (side, figures) in enumerate(row.figures.items()):
        memory, products = row.shares(side)
        ratio = "" if row.ratio is None or side != OURS else f"{row.ratio:8.2f}"
        found.append(
            f"{row.measured.work.name if place == 0 else '':16}{side:14}{figures.median:10.2f}{figures.lowest:9.2f}"
            f"{figures.highest:9.2f}{figures.bytes_per_second / 1e9:8.2f}{memory:10.0%}"
            f"{figures.operations_per_second / 1e12:8.3f}{products:10.0%}{ratio}"
        )
    unit = "step" if row.measured.work.steps else "prompt"
    total, experts = (row.weight_bytes + row.cache_bytes) / 1e9, statistics.mean(row.measured.experts)
    found.append(
        f"{'':16}a {unit} reads {total:.3f} GB, {row.cache_bytes / 1e9:.3f} of it cache; {experts:.2f} experts a layer "
        f"as counted ({row.expected_experts:.2f} expected)"
    )
    found.append(
        f"{'':16}limits: {row.measured.limits.read / 1e9:.1f} GB/s, {row.peak / 1e12:.3f} TOPS in {row.products}; "
        f"{row.roof:.2f} tokens/s"
    )
    taken = {side: share for side, share in row.measured.others.items() if share is not None and share > _DISTURBED}
    if taken:
        told = ", ".join(f"{share:.0%} while {side} worked" for side, share in taken.items())
        found.append(f"{'':16}too slow: other programs took part of the processors, {told}")
    return found


def to_json(rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Everything that was measured. Bytes, operations and tokens are numbers per second where the name says so, else
    of one unit: a step of all sequences, or a prompt. ``more`` comes first."""
    return {
        **more,
        "work": [
            {
                "name": row.measured.work.name,
                **row.measured.work.to_json(),
                "experts_per_layer": row.measured.experts,
                "experts_expected": row.expected_experts,
                "experts_from": "routing counted on our side",
                "weight_bytes": row.weight_bytes,
                "cache_bytes": row.cache_bytes,
                "operations": row.operations,
                "products": row.products,
                "limits": row.measured.limits.to_json(),
                "limit_tokens_per_second": row.roof,
                "sides": {side: _side(row, side) for side in row.figures},
                "ratio": row.ratio,
            }
            for row in rows
        ],
    }


def _side(row: Row, side: str) -> dict[str, Any]:
    figures, (memory, products) = row.figures[side], row.shares(side)
    return {
        "tokens_per_second": {"median": figures.median, "min": figures.lowest, "max": figures.highest},
        "bytes_per_second": figures.bytes_per_second,
        "operations_per_second": figures.operations_per_second,
        "share_of_read_limit": memory,
        "share_of_product_limit": products,
        "processors_taken_by_others": row.measured.others[side],
        "seconds": row.measured.seconds[side],
    }
