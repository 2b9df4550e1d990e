"""Integer checkpoints that are written here: read back number by number, and kept exactly on the way to other forms."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from integers import CONFIG, FORMS, configure, expected, write
from safetensors.torch import load_file

import mixtral
from mixtral.errors import CheckpointError, ConfigError
from mixtral.model.mixtral import Mixtral
from mixtral.quant.rtn import INT_FORMS, encode_groups
from mixtral.weights.checkpoint import open_checkpoint
from mixtral.weights.convert import convert, convert_to_gguf
from mixtral.weights.load import load_model
from mixtral.weights.names import parameter_shapes
from mixtral.weights.save import save_model

SMALL = ["int8", "int8_g32", "int4_g32", "int3_g32"]  # whose groups divide the widths 64 and 96
STEM = "model.layers.1.block_sparse_moe.experts.2.w3"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = Mixtral(CONFIG, device="cpu", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in parameter_shapes(CONFIG):
            value = model.get_parameter(name)
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    save_model(model, tmp_path / "source")
    return tmp_path / "source"


def to_gguf(source: Path, path: Path, form: str | None = None) -> Path:
    convert_to_gguf(source, path, vocabulary=lambda count: {}, form=form)
    return path


@pytest.mark.parametrize("name", SMALL)
def test_what_is_written(name: str, source: Path, tmp_path: Path) -> None:
    """The numbers of the file, taken apart bit by bit, are those of the encoder; the rest is as it was."""
    form = INT_FORMS[name]
    convert(source, tmp_path / "out", layout="per-expert", form=name)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    groups = encode_groups(before[f"{STEM}.weight"], form)
    words = after[f"{STEM}.weight_packed"].numpy().astype("<i4")
    streams = [int.from_bytes(row.tobytes(), "little") for row in words]
    codes = [[stream >> i * form.bits & (1 << form.bits) - 1 for i in range(64)] for stream in streams]
    scales = after[f"{STEM}.weight_scale"]
    assert scales.dtype == torch.float16
    steps = (torch.tensor(codes) - (1 << (form.bits - 1))).view(96, -1, form.group or 64)
    assert torch.equal((steps * scales.float()[..., None]).view(96, 64), groups.decode(torch.float32))
    assert after[f"{STEM}.weight_shape"].tolist() == [96, 64]
    for kept in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.block_sparse_moe.gate.weight"):
        assert torch.equal(after[kept], before[kept])
    weights = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = weights["config_groups"]["group_0"]["weights"]
    assert (group["num_bits"], group["group_size"], group["symmetric"]) == (form.bits, form.group or None, True)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_read_and_run(name: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", layout="per-expert", form=name, shard_size_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    labels = {entry.dtype for entry in open_checkpoint(tmp_path / "out").entries.values()}
    wanted = {"INT8_G64", "INT8_G96"} if name == "int8" else {name.upper()}
    assert {label for label in labels if label.startswith("INT")} == wanted
    ids = list(range(20))
    found = mixtral.load(tmp_path / "out", dtype="float32", reference=True)
    decoded = mixtral.load(tmp_path / "out", dtype="float32", decode=True)
    torch.testing.assert_close(found.logits(ids), decoded.logits(ids), rtol=1e-5, atol=1e-5)
    original = mixtral.load(source, dtype="float32").logits(ids)
    error = (found.logits(ids) - original).norm() / original.norm()
    assert error < {8: 0.05, 4: 0.4, 3: 0.8}[INT_FORMS[name].bits]


@pytest.mark.parametrize("form", ["gptq 4", "gptq 4, zeros, order", "awq", "ct 4, zeros, order", "ct 4"])
def test_the_same_integers_are_kept(form: str, tmp_path: Path) -> None:
    """GPTQ and AWQ become compressed-tensors without a changed value, with zero points and mixed columns."""
    written = write(tmp_path / "m", FORMS[form])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(written.folder, tmp_path / "out", layout="per-expert", form="int4_g32")
    model = load_model(tmp_path / "out", device="cpu", dtype=torch.float32, decode=True)
    for parameter in parameter_shapes(CONFIG):
        assert torch.equal(model.get_parameter(parameter), expected(written, parameter)), parameter
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert group["symmetric"] == (not FORMS[form].zeros)
    assert group["actorder"] == ("group" if FORMS[form].order else None)


@pytest.mark.parametrize(("form", "kind"), [("gptq 4", "Q4_0"), ("ct 8", None), ("gptq 3", "Q4_0"), ("ct 5", "Q8_0")])
def test_plain_integers_become_blocks_and_stay_exact(form: str, kind: str | None, tmp_path: Path) -> None:
    written = write(tmp_path / "m", FORMS[form])
    if kind is None:  # groups of 16 are too small for blocks of 32
        with pytest.raises(CheckpointError, match="INT8_G16 weights, which no GGUF format holds exactly"):
            to_gguf(written.folder, tmp_path / "m.gguf")
        return
    to_gguf(written.folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = next(item for item in reader.tensors if item.name == "blk.1.ffn_down_exps.weight")
    assert found.tensor_type.name == kind
    decoded = gguf.quants.dequantize(found.data, found.tensor_type)
    assert np.array_equal(decoded, expected(written, "model.layers.1.mlp.experts.down_proj").numpy())
    model = load_model(tmp_path / "m.gguf", device="cpu", dtype=torch.float32, decode=True)
    for parameter in parameter_shapes(CONFIG):
        assert torch.equal(model.get_parameter(parameter), expected(written, parameter)), parameter


@pytest.mark.parametrize(("form", "kept"), [("gptq 4", "int4_g32"), ("gptq 4", "int8_g32"), ("ct 5", "int8_g32")])
def test_blocks_become_integers_and_blocks_again(form: str, kept: str, tmp_path: Path) -> None:
    first = to_gguf(write(tmp_path / "m", FORMS[form]).folder, tmp_path / "first.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(first, tmp_path / "out", layout="per-expert", form=kept)
        second = to_gguf(tmp_path / "out", tmp_path / "second.gguf")
    one, two = (gguf.GGUFReader(path).tensors for path in (first, second))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(*(gguf.quants.dequantize(item.data, item.tensor_type) for item in (a, b))), a.name


def test_zero_points_need_a_choice(tmp_path: Path) -> None:
    written = write(tmp_path / "m", FORMS["awq"])
    with pytest.raises(CheckpointError, match="INT4_G32_ZEROS weights, which no"):
        to_gguf(written.folder, tmp_path / "m.gguf")
    with pytest.warns(UserWarning, match=r"quantised already \(INT4_G32_ZEROS\)"):
        to_gguf(written.folder, tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_symmetric_file_with_mixed_columns_is_not_taken_for_blocks(tmp_path: Path) -> None:
    """Its headers promise plain groups, its g_idx says otherwise: told while it is written, and nothing is left."""
    written = write(tmp_path / "m", FORMS["gptq 4, zeros, order"])
    settings = {**FORMS["gptq 4, zeros, order"].settings, "desc_act": False}
    configure(written.folder, quantization_config=settings)
    with pytest.raises(CheckpointError, match="INT4_G32"):
        to_gguf(written.folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_back_to_floats_without_loss(tmp_path: Path) -> None:
    written = write(tmp_path / "m", FORMS["gptq 4, zeros, order"])
    with pytest.raises(CheckpointError, match="made of quantised values"):
        convert(written.folder, tmp_path / "out", layout="fused")
    convert(written.folder, tmp_path / "out", layout="fused", dtype=torch.float32)
    model = load_model(tmp_path / "out", device="cpu")
    for parameter in parameter_shapes(CONFIG):
        assert torch.equal(model.get_parameter(parameter), expected(written, parameter)), parameter


def test_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w2.weight.* 96 values does not divide into groups of 64"):
        convert(source, tmp_path / "out", layout="per-expert", form="int4_g64")
    with pytest.raises(ConfigError, match="int2_g32"):
        convert(source, tmp_path / "out", layout="per-expert", form="int2_g32")
    with pytest.raises(ConfigError, match="integers are written as 'per-expert'"):
        convert(source, tmp_path / "out", layout="fused", form="int4_g32")
    assert not (tmp_path / "out").exists()


def test_quantised_source_is_told(source: Path, tmp_path: Path) -> None:
    to_gguf(source, tmp_path / "m.gguf", "q8_0")
    with pytest.warns(UserWarning, match=r"quantised already \(Q8_0\)"):
        convert(tmp_path / "m.gguf", tmp_path / "out", layout="per-expert", form="int4_g32")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
