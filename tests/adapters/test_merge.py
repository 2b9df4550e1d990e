"""Merging: equal to the split products, into every layout, never by accident into quantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapting import factors_of, ours, peer_of, theirs

from mixtral.adapters.factors import TARGETS
from mixtral.adapters.merge import MergedMatrices, drifts, merge_into, merging
from mixtral.errors import CheckpointError
from mixtral.model import Mixtral
from mixtral.weights import load_model, save_model
from mixtral.weights.convert import convert, convert_to_gguf, opened
from mixtral.weights.names import pieces

ALL = {"rank": 3, "alpha": 5, "expert_rank": 2, "targets": tuple(TARGETS)}


def test_in_memory_equals_the_split_products(tiny_model: Mixtral) -> None:
    factors = factors_of(tiny_model.config, **ALL)
    expected = ours(tiny_model, factors)
    before = ours(tiny_model)
    merge_into(tiny_model, factors)
    torch.testing.assert_close(ours(tiny_model), expected, atol=3e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 0.05


def test_bfloat16_is_rounded_once(tiny_model: Mixtral) -> None:
    factors = factors_of(tiny_model.config, **ALL)
    narrow = Mixtral(tiny_model.config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, value in tiny_model.named_parameters():
            narrow.get_parameter(name).copy_(value)
    before = {name: narrow.get_parameter(name).detach().float().clone() for name in factors}
    merge_into(narrow, factors)
    for name, (a, b, scale) in factors.items():
        exact = before[name] + (b @ a) * scale
        assert torch.equal(narrow.get_parameter(name), exact.to(narrow.get_parameter(name).dtype)), name


@pytest.mark.parametrize("source", ["per-expert", "consolidated"])
@pytest.mark.parametrize("target", ["per-expert", "fused", "consolidated", "gguf"])
def test_from_and_into_every_layout(source: str, target: str, tiny_model: Mixtral, tmp_path: Path) -> None:
    """Rows in other orders included: what is written loads as the adapted model."""
    factors = factors_of(tiny_model.config, **ALL)
    save_model(tiny_model, tmp_path / "base", layout=source)  # type: ignore[arg-type]
    path = tmp_path / ("merged.gguf" if target == "gguf" else "merged")
    if target == "gguf":
        convert_to_gguf(tmp_path / "base", path, vocabulary=lambda count: {}, change=merging(factors))
    else:
        convert(tmp_path / "base", path, layout=target, change=merging(factors))  # type: ignore[arg-type]
    merged = load_model(path, device="cpu")
    torch.testing.assert_close(ours(merged), ours(tiny_model, factors), atol=3e-5, rtol=1e-4)
    with opened(tmp_path / "base") as (base, _), opened(path) as (result, _):
        found = drifts(base, result, factors)
    assert found.keys() == TARGETS.keys()
    assert all(drift.loss < 1e-4 and 0.01 < drift.change < 10 for drift in found.values())


def test_transformers_loads_what_was_merged(tiny_model: Mixtral, tmp_path: Path) -> None:
    factors = factors_of(tiny_model.config, **ALL)
    expected = ours(tiny_model, factors)
    merge_into(tiny_model, factors)
    torch.testing.assert_close(theirs(peer_of(tiny_model, tmp_path)), expected, atol=3e-5, rtol=1e-4)


def test_quantised_after_the_sum(tiny_model: Mixtral, tmp_path: Path) -> None:
    """The result is what quantising the merged weights gives, bit for bit, and the drift says what it cost."""
    factors = factors_of(tiny_model.config, **ALL)
    save_model(tiny_model, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "one", layout="per-expert", form="int4_g32", change=merging(factors))
    convert(tmp_path / "base", tmp_path / "sum", layout="per-expert", change=merging(factors))
    convert(tmp_path / "sum", tmp_path / "two", layout="per-expert", form="int4_g32")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    with opened(tmp_path / "base") as (base, _), opened(tmp_path / "one") as (result, _):
        coarse = drifts(base, result, factors)
    assert coarse["router"].loss < 1e-6
    assert 0.02 < coarse["gate_up"].loss < 1.5


def test_quantised_weights_are_left_alone_unless_asked(tiny_model: Mixtral, tmp_path: Path) -> None:
    factors = factors_of(tiny_model.config, **ALL)
    save_model(tiny_model, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "int4", layout="per-expert", form="int4_g32")
    with pytest.raises(CheckpointError, match=r"the base is quantised"):
        convert(tmp_path / "int4", tmp_path / "out", layout="per-expert", form="int8_g32", change=merging(factors))
    assert not (tmp_path / "out").exists()
    change = merging(factors, into_packed=True)
    convert(tmp_path / "int4", tmp_path / "out", layout="per-expert", form="int8_g32", change=change)
    with opened(tmp_path / "int4") as (base, _), opened(tmp_path / "out") as (result, _):
        assert all(drift.loss < 0.1 for drift in drifts(base, result, factors).values())
    packed = load_model(tmp_path / "int4", device="cpu", dtype=torch.float32, reference=True)
    before = ours(packed)
    with pytest.raises(CheckpointError, match="decode=True"):
        merge_into(packed, factors)
    assert torch.equal(ours(packed), before)


def test_router_alone_may_be_merged_beside_quantised_experts(tiny_model: Mixtral, tmp_path: Path) -> None:
    """What the adapter does not change is copied as it is."""
    factors = factors_of(tiny_model.config, rank=2, targets=("router",))
    save_model(tiny_model, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "int4", layout="per-expert", form="int4_g32")
    convert(tmp_path / "int4", tmp_path / "out", layout="per-expert", form="int4_g32", change=merging(factors))
    with opened(tmp_path / "int4") as (base, _), opened(tmp_path / "out") as (result, _):
        merged = MergedMatrices(base, factors)
        for piece in pieces(tiny_model.config, "fused"):
            assert torch.equal(result.values(piece, torch.float32), merged.values(piece, torch.float32))


def test_an_adapter_of_another_model_is_refused(tiny_model: Mixtral, tmp_path: Path) -> None:
    factors = factors_of(tiny_model.config.replace(hidden_size=32), rank=2)
    save_model(tiny_model, tmp_path / "base")
    with pytest.raises(CheckpointError, match="another base"):
        convert(tmp_path / "base", tmp_path / "out", layout="fused", change=merging(factors))
    with pytest.raises(CheckpointError, match="another base"):
        merge_into(tiny_model, factors)
