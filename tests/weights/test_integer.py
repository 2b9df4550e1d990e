"""GPTQ, AWQ and compressed-tensors checkpoints are read as their formats say, and stay packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integers import CONFIG, FORMS, Tensors, compressed, configure, expected, g, write
from safetensors.torch import load_file, save_file

import mixtral
from mixtral.errors import CheckpointError, ConfigError
from mixtral.model.mixtral import Mixtral
from mixtral.quant.modules import PackedExperts, PackedLinear
from mixtral.weights.load import load_model
from mixtral.weights.names import parameter_shapes
from mixtral.weights.save import save_model


@pytest.mark.parametrize("name", FORMS)
def test_values(name: str, tmp_path: Path) -> None:
    """Every value is the one of the formula, rounded once to float32."""
    written = write(tmp_path / "m", FORMS[name])
    model = load_model(written.folder, device="cpu", dtype=torch.float32, decode=True)
    for parameter in parameter_shapes(CONFIG):
        assert torch.equal(model.get_parameter(parameter), expected(written, parameter)), parameter


@pytest.mark.parametrize("name", FORMS)
def test_packed_in_memory(name: str, tmp_path: Path) -> None:
    """Weights that stay packed give the logits of weights that were decoded, up to rounded activations in compiled
    kernels, and no integer matrix is a parameter."""
    form = FORMS[name]
    written = write(tmp_path / "m", form)
    decoded = mixtral.load(written.folder, dtype="float32", decode=True, reference=True)
    packed_ = mixtral.load(written.folder, dtype="float32", reference=True)
    ids = list(range(3, 60))
    exact = decoded.logits(ids)
    torch.testing.assert_close(packed_.logits(ids), exact, rtol=1e-5, atol=1e-5)
    compiled = mixtral.load(written.folder, dtype="float32").logits(ids)
    assert ((compiled - exact).norm() / exact.norm()).item() < 0.3  # random layers make errors grow
    held = load_model(written.folder, device="cpu", dtype=torch.float32)
    module = held.get_submodule("model.layers.1.self_attn.o_proj")
    assert isinstance(module, PackedLinear)
    if form.label:
        assert module.packed.label == form.label
    assert isinstance(held.get_submodule("model.layers.0.mlp.experts"), PackedExperts)
    assert not [name for name, _ in held.named_parameters() if "experts" in name or "_proj" in name]


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    written = write(tmp_path / "m", FORMS["gptq 4"])
    model = load_model(written.folder, device="cpu")
    assert model.dtype == torch.bfloat16
    held = sum(value.numel() * value.itemsize for value in [*model.parameters(), *model.buffers()])
    assert held < (written.folder / "model.safetensors").stat().st_size


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


STEM = "model.layers.0.self_attn.q_proj"


def put(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[f"{STEM}.{part}"] = change(tensors[f"{STEM}.{part}"]).contiguous()

    return apply


def without(part: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        del tensors[f"{STEM}.{part}"]

    return apply


BAD: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "no scales": ("gptq 4", without("scales"), "has no scales beside it"),
    "no zeros": ("awq", without("qzeros"), "has no qzeros beside it"),
    "no shape": ("ct 4", without("weight_shape"), "has no weight_shape beside it"),
    "another size": ("gptq 4", put("qweight", lambda x: x[:3]), r"qweight' is I32 \[3, 64\], which is no \[64, 64\]"),
    "another type": ("gptq 4", put("qweight", lambda x: x.float()), "qweight' is F32"),
    "groups that do not divide": ("gptq 4", put("scales", lambda x: x[:1].repeat(3, 1)), "which divides no"),
    "zeros of another size": (
        "gptq 4",
        put("qzeros", lambda x: x[:1]),
        r"qzeros' is I32 \[1, 8\]; .*\[2, 8\]",
    ),
    "a scale that is no number": ("gptq 4", put("scales", lambda x: x * float("nan")), "scales' holds NaN or infi"),
    "a group that is not there": ("gptq 4", put("g_idx", lambda x: x + 1), "groups beyond 0 to 1"),
    "a negative group": ("gptq 4", put("g_idx", lambda x: x - 1), "groups beyond 0 to 1"),
    "a bias": ("gptq 4, bias", put("bias", lambda x: x + 1), "bias' is not zero; a Mixtral has no biases"),
    "zeros of a symmetric format": ("gptq 4", put("qzeros", lambda x: x + 1), "not those of the symmetric format"),
    "another shape inside": ("ct 4", put("weight_shape", lambda x: x + 1), r"says \[65, 65\], not \[64, 64\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged(name: str, tmp_path: Path) -> None:
    form, change, told = BAD[name]
    written = write(tmp_path / "m", FORMS[form])
    edit(written.folder, change)
    with pytest.raises(CheckpointError, match=told):
        load_model(written.folder, device="cpu")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": (g(5), "bits is 5; expected one of 2, 3, 4, 8"),
    "other bits than the files": (g(8), "no .64, 64. matrix of 8 bits"),
    "marlin": (g(4, form="marlin"), "checkpoint_format is 'marlin'"),
    "marlin by flag": (g(4, is_marlin_format=True), "checkpoint_format"),
    "gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
    "floats": (compressed(8, "float-quantized"), "in the format 'float-quantized'"),
    "sparse": ({**compressed(4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "cache": ({**compressed(4), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "no groups": ({"quant_method": "compressed-tensors"}, "config_groups"),
    "another method": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    "no method": ({"bits": 4}, "quant_method is None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_settings(name: str, tmp_path: Path) -> None:
    settings, told = REFUSED[name]
    written = write(tmp_path / "m", FORMS["gptq 4"])
    configure(written.folder, quantization_config=settings)
    with pytest.raises((ConfigError, CheckpointError), match=told):
        load_model(written.folder, device="cpu")


def test_config_and_files_that_do_not_belong_together(tmp_path: Path) -> None:
    written = write(tmp_path / "m", FORMS["gptq 4"])
    configure(written.folder, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"no quantization_config, but the tensors hold '.*qweight'"):
        load_model(written.folder, device="cpu")
    dense = Mixtral(CONFIG, device="cpu")
    save_model(dense, tmp_path / "dense")
    configure(tmp_path / "dense", quantization_config=g(4))
    with pytest.raises(CheckpointError, match="declares gptq weights, but the tensors hold no integer matrix"):
        load_model(tmp_path / "dense", device="cpu")


def test_rounded_activations_are_told(tmp_path: Path) -> None:
    written = write(tmp_path / "m", FORMS["ct int8"])
    settings = compressed(8, "int-quantized", input_activations={"num_bits": 8, "type": "int"})
    configure(written.folder, quantization_config=settings)
    with pytest.warns(UserWarning, match="made to be run with rounded activations"):
        load_model(written.folder, device="cpu")
