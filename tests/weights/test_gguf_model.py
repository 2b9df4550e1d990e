"""Models in GGUF files that the ``gguf`` package wrote: merged, split and gate-up experts, several parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError, MixtralError
from mixtral.model.mixtral import Mixtral
from mixtral.quant.encode import encode_rows
from mixtral.quant.formats import FORMATS
from mixtral.quant.modules import PackedExperts
from mixtral.weights.checkpoint import open_checkpoint
from mixtral.weights.convert import convert
from mixtral.weights.load import load_model

Tensors = dict[str, NDArray[Any]]
CONFIG = MixtralConfig(
    vocab_size=96,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
)
KEYS: dict[str, Any] = {
    "llama.embedding_length": 256,
    "llama.block_count": 2,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 64,
    "llama.expert_count": 3,
    "llama.expert_used_count": 2,
    "llama.context_length": 512,
    "llama.vocab_size": 96,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e6,
}


@pytest.fixture(scope="module")
def model() -> Mixtral:
    generator = torch.Generator().manual_seed(11)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Values that float16 and bfloat16 hold.
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.3).half().bfloat16())
    return model


def interleaved(matrix: NDArray[Any], heads: int) -> NDArray[Any]:
    out = np.full_like(matrix, np.nan)
    size = len(matrix) // heads
    for h in range(heads):
        for j in range(2):
            for i in range(size // 2):
                out[h * size + 2 * i + j] = matrix[h * size + j * size // 2 + i]
    return out


def tensors(model: Mixtral, kind: str) -> Tensors:
    """By the names of GGUF; shapes by rows, as the ``gguf`` package takes them."""
    own = {name: value.detach().float().numpy() for name, value in model.named_parameters()}
    found = {
        "token_embd.weight": own["model.embed_tokens.weight"],
        "output_norm.weight": own["model.norm.weight"],
        "output.weight": own["lm_head.weight"],
    }
    for n in range(CONFIG.num_hidden_layers):
        ours, theirs = f"model.layers.{n}.", f"blk.{n}."
        found[theirs + "attn_norm.weight"] = own[ours + "input_layernorm.weight"]
        found[theirs + "ffn_norm.weight"] = own[ours + "post_attention_layernorm.weight"]
        found[theirs + "attn_q.weight"] = interleaved(own[ours + "self_attn.q_proj.weight"], 4)
        found[theirs + "attn_k.weight"] = interleaved(own[ours + "self_attn.k_proj.weight"], 2)
        found[theirs + "attn_v.weight"] = own[ours + "self_attn.v_proj.weight"]
        found[theirs + "attn_output.weight"] = own[ours + "self_attn.o_proj.weight"]
        found[theirs + "ffn_gate_inp.weight"] = own[ours + "mlp.gate.weight"]
        gate_up, down = own[ours + "mlp.experts.gate_up_proj"], own[ours + "mlp.experts.down_proj"]
        if kind == "gguf-split":
            for e in range(3):
                found[f"{theirs}ffn_gate.{e}.weight"] = gate_up[e, :512]
                found[f"{theirs}ffn_up.{e}.weight"] = gate_up[e, 512:]
                found[f"{theirs}ffn_down.{e}.weight"] = down[e]
            continue
        found[theirs + "ffn_down_exps.weight"] = down
        if kind == "gguf":
            found[theirs + "ffn_gate_exps.weight"] = gate_up[:, :512]
            found[theirs + "ffn_up_exps.weight"] = gate_up[:, 512:]
        else:
            found[theirs + "ffn_gate_up_exps.weight"] = gate_up
    return found


def write(
    path: Path, found: Tensors, type_of: Callable[[str], str], *, keys: dict[str, Any] | None = None, parts: int = 0
) -> Path:
    """With the writer of the ``gguf`` package; ``type_of`` names the type of each tensor."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=parts)
    for key, value in {**KEYS, **(keys or {})}.items():
        if value is not None:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, values in found.items():
        kind = gguf.GGMLQuantizationType[type_of(name)]
        if type_of(name).endswith("_K"):  # which the package only reads
            rows = torch.from_numpy(np.ascontiguousarray(values)).flatten(0, -2)
            data = encode_rows(rows, type_of(name)).numpy().reshape(*values.shape[:-1], -1)
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        writer.add_tensor(name, data, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(found: Mixtral, expected: Mixtral) -> bool:
    pairs = zip(found.state_dict().items(), expected.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x.float(), y.float()) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("kind", ["gguf", "gguf-split", "gguf-gate-up"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_layout_of_experts(kind: str, dtype: str, model: Mixtral, tmp_path: Path) -> None:
    """C5, C6, A3: norms and routers in float32, the rest in one type, which becomes that of the model."""
    path = write(
        tmp_path / "m.gguf", tensors(model, kind), lambda name: "F32" if "norm" in name or "inp" in name else dtype
    )
    for given in (path, tmp_path):
        loaded = load_model(given, device="cpu", decode=True)
        assert same(loaded, model)
        assert loaded.get_parameter("lm_head.weight").dtype == TORCH[dtype]
        assert loaded.config == CONFIG


TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("kind", ["gguf", "gguf-split", "gguf-gate-up"])
@pytest.mark.parametrize("packed", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_decode_like_the_gguf_package(kind: str, packed: str, model: Mixtral, tmp_path: Path) -> None:
    """Bit for bit; types that differ between the experts of one layer too (C6)."""

    def type_of(name: str) -> str:
        if "norm" in name or "inp" in name:
            return "F32"
        return "Q8_0" if "attn_k" in name or ".1.weight" in name else packed

    found = tensors(model, kind)
    path = write(tmp_path / "m.gguf", found, type_of)
    loaded = load_model(path, device="cpu", dtype=torch.float32, decode=True)
    rounded = {}
    for name, values in found.items():
        form = gguf.GGMLQuantizationType[type_of(name)]
        rounded[name] = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(values), form), form)
    for name, values in tensors(loaded, kind).items():
        assert np.array_equal(values, rounded[name]), name


def test_quantised_experts_stay_packed_in_memory(model: Mixtral, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda name: "Q8_0" if "exps" in name else "F32")
    loaded = load_model(path, device="cpu")
    assert loaded.get_parameter("lm_head.weight").dtype == loaded.dtype == torch.bfloat16
    experts = loaded.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, PackedExperts)
    assert {matrix.label for three in experts.matrices() for matrix in three} == {"Q8_0"}
    decoded = load_model(path, device="cpu", decode=True)
    assert decoded.get_parameter("model.layers.0.mlp.experts.down_proj").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "form", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"]
)
@pytest.mark.parametrize("how", [{}, {"reference": True}, {"decode": True}], ids=["compiled", "reference", "decoded"])
@pytest.mark.parametrize("name", ["blk.1.ffn_down_exps.weight", "token_embd.weight"])
def test_a_scale_that_is_no_number_is_refused(
    form: str, how: dict[str, bool], name: str, model: Mixtral, tmp_path: Path
) -> None:
    """In the last block of each matrix of experts, attention and embedding; as NaN and as infinity."""

    path = write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda n: "F32" if "norm" in n or "inp" in n else form)
    load_model(path, device="cpu", **how)
    entry = open_checkpoint(path).entries[name]
    at = FORMATS[form].halves or (0,)
    for offset in at:
        for number in (b"\x00\x7e", b"\x00\xfc") if form != "BF16" else (b"\xc0\x7f", b"\x80\xff"):
            content = bytearray(path.read_bytes())
            place = entry.stop - FORMATS[form].bytes + offset
            content[place : place + 2] = number
            damaged = tmp_path / "damaged.gguf"
            damaged.write_bytes(content)
            with pytest.raises(CheckpointError, match=f"^'{name}' holds NaN or infinities"):
                load_model(damaged, device="cpu", **how)


def test_parts(model: Mixtral, tmp_path: Path) -> None:
    """C7: a folder with the parts of one file, and any part of them."""
    write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda name: "F32", parts=7)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) > 2
    for given in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        assert same(load_model(given, device="cpu"), model)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=names[1]):
        load_model(tmp_path, device="cpu")


def test_which_files_of_a_folder_count(model: Mixtral, tmp_path: Path) -> None:
    """Repositories of GGUF files often hold a config.json, which says nothing then; Mistral's files win over GGUF."""
    from mixtral.weights import pieces_of, save_model

    path = write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda name: "F32")
    (tmp_path / "config.json").write_text("{}")
    assert same(load_model(tmp_path, device="cpu"), model)
    (tmp_path / "config.json").unlink()
    other = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    save_model(other, tmp_path, layout="consolidated", overwrite=True)
    path.with_name("n.gguf").write_bytes(path.read_bytes())
    assert same(load_model(tmp_path, device="cpu"), other)
    assert pieces_of(tmp_path) is None


def test_conversion_out_of_gguf(model: Mixtral, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda name: "F32" if "norm" in name else "F16")
    for layout in ("per-expert", "fused", "consolidated"):
        convert(path, tmp_path / layout, layout=layout, dtype=torch.float32)
        assert same(load_model(tmp_path / layout, device="cpu"), model)
    packed = write(tmp_path / "q" / "m.gguf", tensors(model, "gguf"), lambda name: "Q8_0" if "exps" in name else "F32")
    with pytest.raises(CheckpointError, match="made of quantised values"):
        convert(packed, tmp_path / "no", layout="fused")
    convert(packed, tmp_path / "yes", layout="fused", dtype=torch.float32)
    expected = load_model(packed, device="cpu", dtype=torch.float32, decode=True)
    assert same(load_model(tmp_path / "yes", device="cpu"), expected)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"llama.expert_count": None}, "a dense model"),
        ({"llama.expert_count": 1}, "a dense model"),
        ({"llama.expert_count": 4}, "says num_local_experts 4, but the tensors have 3"),
        ({"llama.block_count": 3}, "says num_hidden_layers 3, but the tensors have 2"),
        ({"llama.vocab_size": 97}, "says vocab_size 97, but the tensors have 96"),
        ({"llama.vocab_size": None}, "neither tokenizer.ggml.tokens nor llama.vocab_size"),
        ({"llama.context_length": None}, "has no llama.context_length"),
        ({"llama.attention.head_count_kv": 4}, r"'blk.0.attn_k.weight' is \[128, 256\], expected \[256, 256\]"),
        ({"llama.expert_used_count": 5}, "num_experts_per_tok is 5"),
        ({"llama.embedding_length": 2.5}, "hidden_size is 2.5; expected an integer"),
    ],
)
def test_metadata_that_lies(keys: dict[str, Any], told: str, model: Mixtral, tmp_path: Path) -> None:
    """C1, C11."""
    path = write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda name: "F32", keys=keys)
    with pytest.raises(MixtralError, match=told):
        load_model(path, device="cpu")


def test_theta_of_another_model_is_used_and_told(model: Mixtral, tmp_path: Path) -> None:
    """B2."""
    keys = {"llama.rope.freq_base": 10000.0}
    path = write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda name: "F32", keys=keys)
    with pytest.warns(UserWarning, match="rope_theta is 10000"):
        assert load_model(path, device="cpu").config.rope_theta == 10000.0
    silent = write(
        tmp_path / "silent" / "m.gguf",
        tensors(model, "gguf"),
        lambda name: "F32",
        keys={"llama.rope.freq_base": None, "llama.rope.dimension_count": None},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(silent, device="cpu").config == CONFIG


def test_other_files(model: Mixtral, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tensors(model, "gguf"), lambda name: "F32")
    path.with_name("n.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 models in GGUF \(m\.gguf, n\.gguf\)"):
        load_model(tmp_path, device="cpu")
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"mamba\.gguf: architecture is 'mamba'"):
        load_model(tmp_path / "mamba.gguf", device="cpu")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(MixtralError, match=r"text\.txt"):
        load_model(tmp_path / "text.txt", device="cpu")
