"""Bytes and operations against numbers worked out by hand for 8x7B."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral.bench.random_model import create_model
from mixtral.bench.traffic import Weights, need, weights_of
from mixtral.bench.work import Work
from mixtral.config import MixtralConfig, preset
from mixtral.files.read import Entry
from mixtral.quant.formats import FORMATS
from mixtral.quant.mixes import MIXES
from mixtral.weights.checkpoint import Checkpoint, open_checkpoint
from mixtral.weights.names import Piece, layer_of, pieces

LARGE = preset("8x7b")
DECODE = Work("decode", 8, 1, 32)


def weights(config: MixtralConfig, form: Callable[[Piece], str]) -> Weights:
    """Of a file that does not exist."""
    plan = pieces(config, "gguf")
    sizes = {piece.name: FORMATS[form(piece)].size_bytes(piece.tensor_shape) for piece in plan}
    entries = {
        piece.name: Entry(piece.name, Path("f"), form(piece), piece.tensor_shape, 100, 100 + sizes[piece.name])
        for piece in plan
    }
    found = weights_of(Checkpoint(Path("f"), "gguf", config, entries, plan, {}))
    assert found.total == sum(sizes.values())
    return found


def all_of(form: str) -> Callable[[Piece], str]:
    return lambda piece: "F32" if len(piece.shape) == 1 else form


def batch(count: int) -> Work:
    return Work("batch", 8, count, 32)


@pytest.mark.parametrize(
    ("form", "gigabytes"), [("BF16", 25.5), ("Q8_0", 13.5), ("Q6_K", 10.5), ("Q4_K", 7.17), ("Q3_K", 5.48)]
)
def test_a_token_of_8x7b_reads_so_many_gigabytes(form: str, gigabytes: float) -> None:
    found = need(weights(LARGE, all_of(form)), DECODE, turns=1)
    assert found.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_four_layers_of_8x7b_in_q4_k_m_read_so_much() -> None:
    config = LARGE.replace(num_hidden_layers=4)
    found = weights(config, lambda p: MIXES["q4_k_m"].of(p.parameter, layer_of(p.parameter), 4))
    assert found.total / 1e9 == pytest.approx(3.71, abs=0.01)
    assert found.formats == ("Q4_K", "Q6_K")
    q4, q5, q6, q8, matrix = 4.5 / 8, 5.5 / 8, 6.5625 / 8, 8.5 / 8, 4096 * 14336
    experts = 2 * matrix * (2 * 3 * q4 + 2 * (2 * q4 + q6))  # the down projections of layers 2 and 3 are Q6_K
    attention = 4 * 4096 * (4096 * q4 + 2 * 1024 * q8 + 4096 * q5)
    rest = 4 * 8 * 4096 * 4 + 9 * 4096 * 4 + 32000 * 4096 * q6 + 4096 * q4  # routers, norms, head, a row of embedding
    assert need(found, DECODE, turns=1).weight_bytes == pytest.approx(experts + attention + rest)
    assert experts + attention + rest == pytest.approx(1.081e9, rel=0.001)


@pytest.mark.parametrize(("count", "ratio"), [(1, 1.0), (2, 1.66), (4, 2.53), (8, 3.30), (16, 3.62), (32, 3.65)])
def test_more_sequences_read_more_experts_but_each_only_once(count: int, ratio: float) -> None:
    """The cost of a step relative to that of one token: 0.116 + 0.884 u / 2, for u distinct experts."""
    found = weights(LARGE, all_of("Q4_K"))
    one = need(found, DECODE, turns=1).weight_bytes
    assert need(found, batch(count), turns=1).weight_bytes / one == pytest.approx(ratio, rel=0.01)


def test_experts_that_were_counted_are_those_that_count() -> None:
    config = LARGE.replace(num_hidden_layers=2)
    found = weights(config, all_of("Q4_K"))
    least, most, uneven = (
        need(found, batch(8), turns=1, experts=experts).weight_bytes for experts in ([2, 2], [8, 8], [2, 8])
    )
    expert = 3 * 4096 * 14336 * 144 / 256
    assert most - least == pytest.approx(12 * expert)
    assert uneven - least == pytest.approx(6 * expert)
    assert most == found.total - found.embedding * (1 - 8 / 32000)


def test_one_token_of_one_layer_takes_so_many_operations() -> None:
    """394 million active parameters, two operations each; and the head for every row of logits."""
    one, two = (
        need(weights(LARGE.replace(num_hidden_layers=layers), all_of("Q4_K")), DECODE, turns=1).operations
        for layers in (1, 2)
    )
    pairs = 8 + 31 / 2 + 1
    assert two - one == pytest.approx(0.789e9 + 4 * 4096 * pairs, rel=0.001)
    assert 2 * one - two == pytest.approx(2 * 32000 * 4096)


def test_attention_in_a_long_prompt() -> None:
    """At 4,096 tokens attention takes 4.4e12 operations beside 103e12 of all else."""
    found = weights(LARGE, all_of("Q4_K"))
    long, short = (need(found, Work("prefill", count, 1, 0), turns=1) for count in (4096, 1))
    linear = 4096 * (short.operations - 2 * 32000 * 4096 - 4 * 32 * 4096)
    assert linear == pytest.approx(103.4e12, rel=0.005)
    assert long.operations - linear - 2 * 32000 * 4096 == pytest.approx(4.4e12, rel=0.01)
    assert long.tokens == 4096
    assert long.weight_bytes == pytest.approx(found.total - found.embedding * (1 - 4096 / 32000), rel=1e-4)


def test_the_cache_at_depth() -> None:
    """4 KiB for each token and layer; at depth 8,192 four layers read 0.13 GB. Turns go on where the last one ended."""
    found = weights(LARGE.replace(num_hidden_layers=4), all_of("Q4_K"))
    work = Work("context", 8192, 1, 32)
    assert need(found, work, turns=1).cache_bytes / 1e9 == pytest.approx(0.13, rel=0.05)
    for turns in (1, 5):
        steps = [8192 + 32 + i for i in range(32 * turns)]  # after the warm-up
        mean = sum(depth + 1 for depth in steps) / len(steps)
        assert need(found, work, turns=turns).cache_bytes == pytest.approx(mean * 4 * 4096)
    eight = need(found, batch(8), turns=1).cache_bytes
    assert eight == pytest.approx(8 * (8 + 15.5 + 1) * 4 * 4096)
    assert need(found, Work("prefill", 512, 1, 0), turns=1).cache_bytes == 512 * 4 * 4096


@pytest.mark.parametrize("form", ["q4_k_m", "bf16", "int4_g32", "int8"])
def test_all_bytes_of_a_checkpoint_are_found(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: MixtralConfig
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    config = tiny_config.replace(hidden_size=256, intermediate_size=256, head_dim=64)
    made = create_model(config, tmp_path / "m", form=form, name="n", vocabulary=lambda size: {})
    found = weights_of(open_checkpoint(made.path))
    notes = 8 * 2 * (4 + 3 * 4) if form.startswith("int") else 0  # the shapes of integer matrices
    assert found.total == made.size_bytes
    assert min(found.experts) == max(found.experts) or form == "q4_k_m"
    assert found.quantised == (form != "bf16")
    per_value = {"q4_k_m": 6.5625, "bf16": 16, "int4_g32": 4.5, "int8": 8 + 16 / 256}[form]
    values = 3 * 4 * 256 * 256
    assert max(found.experts) <= math.ceil(values * per_value / 8) + notes * 8
