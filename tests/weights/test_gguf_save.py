"""GGUF files that are written: read by the ``gguf`` package and by us, with the values that the formats allow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.gguf import read_gguf
from mixtral.files.gguf_write import GgufRecord, write_gguf
from mixtral.model.mixtral import Mixtral
from mixtral.quant.mixes import MIXES, mix_of
from mixtral.weights.convert import convert, convert_to_gguf
from mixtral.weights.load import load_model
from mixtral.weights.names import layer_of, tensors
from mixtral.weights.save import save_model

CONFIG = MixtralConfig(
    vocab_size=80,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=512,
)


def no_words(size: int) -> dict[str, Any]:
    return {"test.size": size}


@pytest.fixture(scope="module")
def model() -> Mixtral:
    generator = torch.Generator().manual_seed(21)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.3).bfloat16())
    return model


@pytest.fixture(scope="module")
def folder(model: Mixtral, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    save_model(model, folder)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(found: Mixtral, expected: Mixtral) -> bool:
    pairs = zip(found.state_dict().items(), expected.state_dict().items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_bfloat16_goes_there_and_back(model: Mixtral, folder: Path, tmp_path: Path) -> None:
    """C13: no value changes; norms and routers are float32 in the file, and what they were again afterwards."""
    moved = convert_to_gguf(folder, tmp_path / "m.gguf", vocabulary=no_words)
    found = read_gguf(tmp_path / "m.gguf")
    assert moved.size_bytes == sum(entry.stop - entry.start for entry in found.tensors.values())
    assert found.metadata["test.size"] == 80
    assert found.metadata["general.file_type"] == 32
    assert {entry.dtype for entry in found.tensors.values()} == {"F32", "BF16"}
    assert same(load_model(tmp_path / "m.gguf", device="cpu"), model)
    convert(tmp_path / "m.gguf", tmp_path / "back", layout="per-expert", dtype=torch.bfloat16)
    assert same(load_model(tmp_path / "back", device="cpu"), model)


def by_hand(model: Mixtral, name: str) -> NDArray[Any]:
    """A tensor of layer 1 as GGUF has it, from the description of the format."""
    own = {key.removeprefix("model.layers.1."): value.detach().float() for key, value in model.named_parameters()}
    if name == "attn_q":
        return own["self_attn.q_proj.weight"].view(4, 2, 32, 256).transpose(1, 2).reshape(256, 256).numpy()
    if name == "attn_k":
        return own["self_attn.k_proj.weight"].view(2, 2, 32, 256).transpose(1, 2).reshape(128, 256).numpy()
    gate_up = own["mlp.experts.gate_up_proj"]
    return {
        "attn_v": own["self_attn.v_proj.weight"],
        "ffn_gate_exps": gate_up[:, :512],
        "ffn_up_exps": gate_up[:, 512:],
        "ffn_down_exps": own["mlp.experts.down_proj"],
    }[name].numpy()


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0", "q4_1", "q5_0", "q5_1"])
def test_the_gguf_package_reads_its_own_bytes(form: str, model: Mixtral, folder: Path, tmp_path: Path) -> None:
    """Blocks are those that the package's own quantiser makes, in every tensor of a layer."""
    convert_to_gguf(folder, tmp_path / "m.gguf", form=form, vocabulary=no_words)
    peer = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name in ("attn_q", "attn_k", "attn_v", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        found = peer[f"blk.1.{name}.weight"]
        expected = gguf.quants.quantize(np.ascontiguousarray(by_hand(model, name)), found.tensor_type)
        assert found.data.tobytes() == expected.tobytes(), name
    assert peer["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"


def test_blocks_of_q4_0_are_no_worse_than_the_packages_own(model: Mixtral, folder: Path, tmp_path: Path) -> None:
    """Read by the package, and by the squared error times the square of the value."""
    convert_to_gguf(folder, tmp_path / "m.gguf", form="q4_0", vocabulary=no_words)
    peer = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name in ("attn_q", "ffn_gate_exps", "ffn_down_exps"):
        values, kind = np.ascontiguousarray(by_hand(model, name)), peer[f"blk.1.{name}.weight"].tensor_type
        assert kind.name == "Q4_0"
        errors = []
        for blocks in (peer[f"blk.1.{name}.weight"].data, gguf.quants.quantize(values, kind)):
            found = gguf.quants.dequantize(blocks, kind).reshape(values.shape)
            errors.append(((values * (found - values).astype(np.float64)) ** 2).reshape(-1, 32).sum(1))
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
        assert errors[0].sum() < 0.8 * errors[1].sum()


# Relative root mean square error of normally distributed values that a format of this many bits must stay below.
ERRORS = {"q6_k": 0.02, "q5_k_m": 0.04, "q4_k_m": 0.08, "q4_k_s": 0.08, "q3_k_m": 0.165, "q3_k_s": 0.165, "q2_k": 0.31}


@pytest.mark.parametrize("form", ERRORS)
def test_mixes(form: str, model: Mixtral, folder: Path, tmp_path: Path) -> None:
    convert_to_gguf(folder, tmp_path / "m.gguf", form=form, vocabulary=no_words)
    found, mix = read_gguf(tmp_path / "m.gguf"), mix_of(form)
    assert found.metadata["general.file_type"] == MIXES[form].file_type
    for pieces in tensors(CONFIG, "gguf"):
        parameter = pieces[0].parameter
        assert found.tensors[pieces[0].name].dtype == mix.of(parameter, layer_of(parameter), 3)
    loaded = load_model(tmp_path / "m.gguf", device="cpu", dtype=torch.float32, decode=True)
    for name, value in model.named_parameters():
        wanted = value.detach().float()
        error = (loaded.get_parameter(name) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < (ERRORS[form] if value.dim() > 1 and "mlp.gate." not in name else 1e-12), name


def test_blocks_are_moved_untouched(folder: Path, tmp_path: Path) -> None:
    """C6: from split experts to merged ones the bytes of each expert are joined, whatever the format is."""
    first, split, joined = (tmp_path / f"{name}.gguf" for name in ("first", "split", "joined"))
    convert_to_gguf(folder, first, form="q4_k_m", vocabulary=no_words)
    found = read_gguf(first)
    data = first.read_bytes()
    records = []
    for entry in found.tensors.values():
        content = np.frombuffer(data[entry.start : entry.stop], np.uint8)
        if "_exps" not in entry.name:
            records.append(GgufRecord(entry.name, entry.dtype, entry.shape, lambda c=content: [c]))  # type: ignore[misc]
            continue
        for number, part in enumerate(np.split(content, 3)):
            name = entry.name.replace("_exps", f".{number}")
            records.append(GgufRecord(name, entry.dtype, entry.shape[1:], lambda c=part: [c]))  # type: ignore[misc]
    write_gguf(split, found.metadata, records)
    convert_to_gguf(split, joined, vocabulary=no_words)
    again = read_gguf(joined)
    bytes_of = joined.read_bytes()
    for name, entry in found.tensors.items():
        other = again.tensors[name]
        assert (other.dtype, other.shape) == (entry.dtype, entry.shape)
        assert bytes_of[other.start : other.stop] == data[entry.start : entry.stop], name


def test_a_format_per_expert_needs_a_choice(folder: Path, tmp_path: Path) -> None:
    first, mixed = tmp_path / "first.gguf", tmp_path / "mixed.gguf"
    convert_to_gguf(folder, first, form="bf16", vocabulary=no_words)
    found, data = read_gguf(first), first.read_bytes()
    records = []
    for entry in found.tensors.values():
        values = torch.frombuffer(bytearray(data[entry.start : entry.stop]), dtype=torch.uint8)
        if "_exps" not in entry.name:
            records.append(GgufRecord(entry.name, entry.dtype, entry.shape, lambda c=values: [c]))  # type: ignore[misc]
            continue
        for number, part in enumerate(values.chunk(3)):
            name, form = entry.name.replace("_exps", f".{number}"), "Q8_0" if number == 1 else "BF16"
            content: Any = part.numpy()
            if form == "Q8_0":
                wide = part.clone().view(torch.bfloat16).float().view(-1, 256).numpy()
                content = gguf.quants.quantize(wide, gguf.GGMLQuantizationType.Q8_0)
            records.append(GgufRecord(name, form, entry.shape[1:], lambda c=content: [c]))  # type: ignore[misc]
    write_gguf(mixed, found.metadata, records)
    with pytest.raises(CheckpointError, match=r"ffn_gate_exps.weight' would be made of BF16, Q8_0; choose one format"):
        convert_to_gguf(mixed, tmp_path / "x.gguf", vocabulary=no_words)
    assert not (tmp_path / "x.gguf").exists()
    convert_to_gguf(mixed, tmp_path / "x.gguf", form="bf16", vocabulary=no_words)
    assert read_gguf(tmp_path / "x.gguf").tensors["blk.0.ffn_gate_exps.weight"].dtype == "BF16"


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match="format is 'q9_9'"):
        convert_to_gguf(folder, target, form="q9_9", vocabulary=no_words)
    with pytest.raises(CheckpointError, match="is a folder; give the name of the file"):
        convert_to_gguf(folder, tmp_path, vocabulary=no_words)
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        convert_to_gguf(folder, target, vocabulary=no_words)
    assert target.read_text() == "mine"
    convert_to_gguf(folder, target, vocabulary=no_words, overwrite=True)
    with pytest.raises(CheckpointError, match="is what would be read"):
        convert_to_gguf(target, target, vocabulary=no_words, overwrite=True)
    before = sha256(target)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_gguf(folder, target, vocabulary=no_words, overwrite=True, progress=stop)
    assert sha256(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_files_of_other_models_are_left_alone(folder: Path, tmp_path: Path) -> None:
    """What a killed save left of another model may be all that there is of it."""
    others = [".other.gguf.replaced1", ".other.gguf.partial", ".model.safetensors.partial", "other.gguf"]
    for name in (*others, ".m[1].gguf.replaced1", ".m[1].gguf.partial"):
        (tmp_path / name).write_text("theirs")
    for _ in range(2):
        convert_to_gguf(folder, tmp_path / "m[1].gguf", vocabulary=no_words, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "m[1].gguf"}
    assert all((tmp_path / name).read_text() == "theirs" for name in others)


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    model = Mixtral(CONFIG.replace(hidden_size=64, intermediate_size=96, head_dim=16), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_model(model, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"'token_embd.weight': Q4_K packs 256 values .* such as q8_0"):
        convert_to_gguf(tmp_path / "small", tmp_path / "m.gguf", form="q4_k_m", vocabulary=no_words)
    convert_to_gguf(tmp_path / "small", tmp_path / "m.gguf", form="q8_0", vocabulary=no_words)
