"""Numbers of a measurement: medians and ranges, shares of the limits, the table and the JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mixtral.bench.limits import Limits
from mixtral.bench.report import HEADER, lines, row_of, to_json
from mixtral.bench.traffic import Weights, need
from mixtral.bench.turns import Measured
from mixtral.bench.work import Work
from mixtral.config import MixtralConfig

LIMITS = Limits(2, "avx512vnni", 30e9, 0.9e12, 0.2e12, 0.4e12)


@pytest.fixture
def weights(tiny_config: MixtralConfig) -> Weights:
    return Weights(tiny_config, 320_000, 300_000, 100_000, (4_000_000, 8_000_000), ("Q4_K", "Q6_K"))


def measured(**seconds: list[list[float]]) -> Measured:
    return Measured(Work("batch", 8, 4, 2), seconds, [2.0, 3.0], LIMITS, dict.fromkeys(seconds, 0.04))


def test_speeds_are_those_of_whole_turns(weights: Weights) -> None:
    row = row_of(measured(mixtral=[[1.0, 1.0], [0.5, 0.5], [3.0, 1.0]], peer=[[2.0], [4.0], [8.0]]), weights, turns=3)
    ours, theirs = row.figures["mixtral"], row.figures["peer"]
    assert (ours.median, ours.lowest, ours.highest) == (4.0, 2.0, 8.0)  # 8 tokens in 2, 1 and 4 seconds
    assert (theirs.median, theirs.lowest, theirs.highest) == (2.0, 1.0, 4.0)
    assert row.ratio == 2.0
    wanted = need(weights, row.measured.work, turns=3, experts=[2.0, 3.0])
    # A step is 4 tokens: at the median there is one of ours in a second.
    assert ours.bytes_per_second == pytest.approx(wanted.bytes)
    assert theirs.operations_per_second == pytest.approx(wanted.operations / 2)
    # Half of the experts of one layer, three quarters of those of the other, and a row of the embedding for each token.
    assert row.weight_bytes == pytest.approx(2_000_000 + 6_000_000 + 300_000 + 100_000 + 4 * 1000)
    assert row.shares("mixtral") == pytest.approx((wanted.bytes / 30e9, wanted.operations / 0.9e12))
    assert row.expected_experts == pytest.approx(4 * (1 - 0.5**4))


def test_the_roof_is_the_nearer_limit(weights: Weights) -> None:
    found = measured(mixtral=[[1.0, 1.0]])
    wanted = need(weights, found.work, turns=1, experts=found.experts)
    assert row_of(found, weights, turns=1).roof == pytest.approx(4 * 30e9 / wanted.bytes)
    slow = replace(found, limits=replace(LIMITS, int8=1e6))
    assert row_of(slow, weights, turns=1).roof == pytest.approx(4 * 1e6 / wanted.operations)


@pytest.mark.parametrize(
    ("formats", "bf16", "products", "peak"),
    [(("Q4_K",), 0.4e12, "int8", 0.9e12), (("BF16",), 0.4e12, "bf16", 0.4e12), (("F32",), None, "fp32", 0.2e12)],
)
def test_the_limit_of_products_is_that_of_the_format(
    weights: Weights, formats: tuple[str, ...], bf16: float | None, products: str, peak: float
) -> None:
    found = replace(measured(mixtral=[[1.0, 1.0]]), limits=replace(LIMITS, bf16=bf16))
    row = row_of(found, replace(weights, formats=formats), turns=1)
    assert (row.products, row.peak) == (products, peak)


def test_the_table(weights: Weights) -> None:
    row = row_of(measured(mixtral=[[1.0, 1.0]], peer=[[4.0]]), weights, turns=1)
    ours, theirs, counted, limits = lines(row)
    assert ours.split() == ["batch", "4", "mixtral", "4.00", "4.00", "4.00", "0.01", "0%", "0.000", "0%", "2.00"]
    assert theirs.split()[:4] == ["peer", "2.00", "2.00", "2.00"]
    assert len(ours) == len(HEADER) == len(theirs) + 8  # the ratio is on our line
    assert "a step reads 0.008 GB, 0.000 of it cache; 2.50 experts a layer as counted (3.75 expected)" in counted
    assert "limits: 30.0 GB/s, 0.900 TOPS in int8; " in limits
    alone = row_of(measured(mixtral=[[1.0, 1.0]]), weights, turns=1)
    assert alone.ratio is None
    assert len(lines(alone)) == 3


def test_a_machine_that_was_busy_with_other_things_is_told(weights: Weights) -> None:
    found = measured(mixtral=[[1.0, 1.0]], peer=[[4.0]], third=[[4.0]])
    row = row_of(replace(found, others={"mixtral": 0.06, "peer": 0.5, "third": None}), weights, turns=1)
    told = "too slow: other programs took part of the processors, 6% while mixtral worked, 50% while peer worked"
    assert lines(row)[-1].strip() == told


def test_the_json_holds_everything_measured(weights: Weights) -> None:
    row = row_of(measured(mixtral=[[1.0, 1.0]], peer=[[4.0]]), weights, turns=1)
    found = json.loads(json.dumps(to_json([row], command="mixtral bench batch", date="2026-11-01")))
    assert list(found) == ["command", "date", "work"]
    work = found["work"][0]
    assert (work["name"], work["sequences"], work["steps"]) == ("batch 4", 4, 2)
    assert work["experts_per_layer"] == [2.0, 3.0]
    assert work["experts_from"] == "routing counted on our side"
    assert work["limits"] == {
        "threads": 2,
        "level": "avx512vnni",
        "read": 30e9,
        "int8": 0.9e12,
        "fp32": 0.2e12,
        "bf16": 0.4e12,
    }
    assert work["ratio"] == 2.0
    side = work["sides"]["peer"]
    assert side["tokens_per_second"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert side["seconds"] == [[4.0]]
    assert side["processors_taken_by_others"] == 0.04
    assert side["share_of_read_limit"] == pytest.approx(side["bytes_per_second"] / 30e9)
    assert side["share_of_product_limit"] == pytest.approx(side["operations_per_second"] / 0.9e12)
