"""Integer checkpoints beside the package compressed-tensors: each reads what the other wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from integers import CONFIG
from safetensors.torch import load_file, save_file

from mixtral.model.mixtral import Mixtral
from mixtral.weights.convert import convert
from mixtral.weights.load import load_model
from mixtral.weights.names import parameter_shapes
from mixtral.weights.save import save_model

pytestmark = pytest.mark.peers
STEM = "model.layers.1.block_sparse_moe.experts.2.w3"


def source(folder: Path) -> Path:
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in parameter_shapes(CONFIG):
            value = model.get_parameter(name)
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    save_model(model, folder)
    return folder


def scheme(settings: dict[str, object]) -> object:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationScheme.model_validate(settings)


@pytest.mark.parametrize("name", ["int8", "int8_g32", "int4_g32", "int3_g32"])
def test_it_decodes_what_we_write(name: str, tmp_path: Path) -> None:
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    convert(source(tmp_path / "source"), tmp_path / "out", layout="per-expert", form=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ours = load_model(tmp_path / "out", device="cpu", dtype=torch.float16, decode=True)
    state = {key.removeprefix(f"{STEM}."): value for key, value in tensors.items() if key.startswith(STEM)}
    theirs = packed.PackedQuantizationCompressor.decompress(state, scheme(config["config_groups"]["group_0"]))["weight"]
    up = ours.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2, CONFIG.intermediate_size :]
    assert torch.equal(theirs, up)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_we_decode_what_it_writes(bits: int, symmetric: bool, tmp_path: Path) -> None:
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    folder = source(tmp_path / "source")
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": 32,
    }
    settings = {"targets": ["Linear"], "weights": weights}
    compressor = packed.PackedQuantizationCompressor
    tensors, decoded = {}, {}
    for key, value in load_file(folder / "model.safetensors").items():
        if ".experts." not in key:
            tensors[key] = value
            continue
        groups = value.float().view(len(value), -1, 32)
        low, high = groups.amin(-1), groups.amax(-1)
        half = 1 << (bits - 1)
        scale = (torch.maximum(-low, high) / half if symmetric else (high - low) / (2 * half - 1)).half()
        zero = torch.zeros_like(scale, dtype=torch.int8)
        if not symmetric:
            zero = (-half - low / scale.float()).round().clamp(-half, half - 1).to(torch.int8)
        state = {"weight": value, "weight_scale": scale, "weight_zero_point": zero}
        found = compressor.compress(state, scheme(settings))
        stem = key.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in found.items()}
        decoded[stem] = compressor.decompress(dict(found), scheme(settings))["weight"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": settings},
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, device="cpu", dtype=torch.float16, decode=True)
    down = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    for expert in range(CONFIG.num_local_experts):
        theirs = decoded[f"model.layers.0.block_sparse_moe.experts.{expert}.w2"]
        assert torch.equal(down[expert], theirs)
