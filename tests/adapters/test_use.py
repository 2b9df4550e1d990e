"""``mixtral.load(..., adapter=)``: one function, whether added to dense weights or computed beside packed ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from adapting import FORMS, factors_of, packed_folder

import mixtral
from mixtral.adapters.factors import TARGETS
from mixtral.adapters.peft import write_adapter
from mixtral.adapters.use import put_to_use
from mixtral.compiled import compile_model
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.evaluate.divergence import compare
from mixtral.model import Mixtral
from mixtral.model.mixtral import Linear
from mixtral.quant.modules import PackedLinear
from mixtral.weights import load_model, save_model
from mixtral.weights.checkpoint import read_any_config

IDS = list(range(3, 40))


def adapter_for(
    model: str | Path, folder: Path, *, targets: tuple[str, ...] = tuple(TARGETS), size: float = 0.1
) -> Path:
    config = mixtral.load(model).config if model == "embedded" else read_any_config(Path(model))
    write_adapter(folder, config, factors_of(config, size=size, rank=4, alpha=6, targets=targets))
    return folder


@pytest.mark.parametrize("form", ["awq", "gptq 4, zeros, order", "int4_g32", "q4_k_m", "q8_0"])
def test_beside_packed_weights_equals_the_sum(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without kernels to the last digits; with them within what rounding activations to int8 costs the base too."""
    assert form in FORMS
    path = packed_folder(form, tmp_path / "base")
    adapter = adapter_for(path, tmp_path / "adapter")
    base = mixtral.load(path, dtype="float32", decode=True).logits(IDS)
    summed = mixtral.load(path, dtype="float32", decode=True, adapter=adapter).logits(IDS)
    reference = mixtral.load(path, dtype="float32", reference=True, adapter=adapter).logits(IDS)
    torch.testing.assert_close(reference, summed, atol=1e-4, rtol=1e-3)
    with caplog.at_level(logging.INFO, logger="mixtral"):
        compiled = mixtral.load(path, dtype="float32", adapter=adapter)
    assert "computed beside packed ones" in caplog.text
    effect = (summed - base).norm()
    rounding = (mixtral.load(path, dtype="float32").logits(IDS) - base).norm()
    assert effect > 0.05 * base.norm()
    assert (compiled.logits(IDS) - summed).norm() < 3 * rounding + 1e-3 * base.norm()
    assert (compiled.logits(IDS) - summed).norm() < 0.5 * effect


def test_the_engine_reads_what_the_adapter_changes(tmp_path: Path) -> None:
    """Prefill and single tokens through the cache, packed and dense, against whole prompts."""
    path = packed_folder("int8_g128", tmp_path / "base")
    adapter = adapter_for(path, tmp_path / "adapter")
    for options in ({}, {"reference": True}, {"decode": True}):
        llm = mixtral.load(path, dtype="float32", adapter=adapter, **options)
        ids = llm.generate(IDS, max_tokens=6, temperature=0).ids
        whole = llm.logits([*IDS, *ids[:-1]])[len(IDS) - 1 :]
        assert whole.argmax(-1).tolist() == ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_weights_take_the_sum(dtype: str, tmp_path: Path, tiny_model: Mixtral) -> None:
    save_model(tiny_model, tmp_path / "base")
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter")
    plain = mixtral.load(tmp_path / "base", dtype=dtype).logits(IDS)
    adapted = mixtral.load(tmp_path / "base", dtype=dtype, adapter=adapter)
    exact = mixtral.load(tmp_path / "base", dtype="float32", reference=True, adapter=adapter).logits(IDS)
    error = (adapted.logits(IDS) - exact).norm()
    assert error < (1e-4 if dtype == "float32" else 0.2) * (exact - plain).norm()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["q", "gate_up", "down", "router"])
def test_the_embedded_model_takes_an_adapter(target: str, tmp_path: Path) -> None:
    """Its int8 weights stay as they are. How near the two ways are is a matter of activations in int8."""
    adapter = adapter_for("embedded", tmp_path, targets=(target,), size=1.0)
    base = mixtral.load("embedded")
    text = "Good morning, I would like a quiet double room for two nights, and where can we have dinner near the port?"
    ids = base.tokenizer.encode(text, bos=True)
    adapted = mixtral.load("embedded", adapter=adapter).logits(ids).numpy()
    decoded = mixtral.load("embedded", decode=True, adapter=adapter).logits(ids).numpy()
    effect = compare(decoded, base.logits(ids).numpy(), ids).kl_mean
    assert compare(decoded, adapted, ids).kl_mean < 0.1 * effect


def test_a_dense_projection_beside_packed_ones(tmp_path: Path) -> None:
    """All projections of attention get the float32 input of a compiled layer, whatever they are."""
    path = packed_folder("int8_g128", tmp_path)
    model = load_model(path, device="cpu", dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.v_proj"
    packed = model.get_submodule(name)
    assert isinstance(packed, PackedLinear)
    dense = Linear(256, 256, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        dense.weight.copy_(packed.packed.decode(torch.bfloat16))
    model.set_submodule(name, dense)
    factors = factors_of(model.config, rank=4, targets=("q",))
    assert put_to_use(model, factors, kernels=True) == 1
    found = mixtral.LLM(compile_model(model), None, name="mixed").logits(IDS)
    write_adapter(tmp_path / "adapter", model.config, factors)
    expected = mixtral.load(path, dtype="float32", decode=True, adapter=tmp_path / "adapter").logits(IDS)
    base = mixtral.load(path, dtype="float32", decode=True).logits(IDS)
    assert (found - expected).norm() < 0.3 * (expected - base).norm()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, tiny_config: MixtralConfig) -> None:
    write_adapter(tmp_path, tiny_config, factors_of(tiny_config, rank=2))
    with pytest.raises(CheckpointError, match="another base"):
        mixtral.load("embedded", adapter=tmp_path)
