"""Every layout, written here by hand from its description, loads to the same numbers: T4, A5, B1, C2, C3, C8, C13."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError, MixtralError
from mixtral.model.mixtral import Mixtral
from mixtral.weights.convert import convert
from mixtral.weights.load import load_model
from mixtral.weights.names import Layout, is_router
from mixtral.weights.save import save_model

Make = Callable[..., Mixtral]
MOVED = ("per-expert", "fused", "consolidated")


def interleaved(matrix: Tensor, heads: int) -> Tensor:
    """B1, row by row: h*K + j*K/2 + i of ours is h*K + 2i + j of the file."""
    size = len(matrix) // heads
    out = torch.full_like(matrix, torch.nan)
    for h in range(heads):
        for j in range(2):
            for i in range(size // 2):
                out[h * size + 2 * i + j] = matrix[h * size + j * size // 2 + i]
    return out


def consolidated(model: Mixtral) -> dict[str, Tensor]:
    """Mistral's names and row order; one tensor per matrix of an expert."""
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = {
        "tok_embeddings.weight": own["model.embed_tokens.weight"],
        "norm.weight": own["model.norm.weight"],
        "output.weight": own["lm_head.weight"],
    }
    for n in range(model.config.num_hidden_layers):
        ours, theirs = f"model.layers.{n}.", f"layers.{n}."
        attention = ours + "self_attn."
        found[theirs + "attention_norm.weight"] = own[ours + "input_layernorm.weight"]
        found[theirs + "ffn_norm.weight"] = own[ours + "post_attention_layernorm.weight"]
        found[theirs + "attention.wq.weight"] = interleaved(own[attention + "q_proj.weight"], 4)
        found[theirs + "attention.wk.weight"] = interleaved(own[attention + "k_proj.weight"], 2)
        found[theirs + "attention.wv.weight"] = own[attention + "v_proj.weight"]
        found[theirs + "attention.wo.weight"] = own[attention + "o_proj.weight"]
        found[theirs + "feed_forward.gate.weight"] = own[ours + "mlp.gate.weight"]
        rows = model.config.intermediate_size
        for e in range(model.config.num_local_experts):
            expert = theirs + f"feed_forward.experts.{e}."
            found[expert + "w1.weight"] = own[ours + "mlp.experts.gate_up_proj"][e, :rows].clone()
            found[expert + "w3.weight"] = own[ours + "mlp.experts.gate_up_proj"][e, rows:].clone()
            found[expert + "w2.weight"] = own[ours + "mlp.experts.down_proj"][e].clone()
    return found


def eight_files(model: Mixtral) -> Iterator[dict[str, Tensor]]:
    """C2: experts below one another, w2 transposed like w1 and w3, the keys dealt out to eight files."""
    found = consolidated(model)
    for n in range(model.config.num_hidden_layers):
        prefix = f"layers.{n}.feed_forward."
        for w in ("w1", "w2", "w3"):
            parts = [found.pop(f"{prefix}experts.{e}.{w}.weight") for e in range(model.config.num_local_experts)]
            found[f"layers.{n}.block_sparse_moe.{w}"] = torch.cat([part.T if w == "w2" else part for part in parts])
        found[f"layers.{n}.block_sparse_moe.gate.weight"] = found.pop(prefix + "gate.weight")
    for number in range(8):
        yield {name: value.contiguous() for i, (name, value) in enumerate(sorted(found.items())) if i % 8 == number}


def params(config: MixtralConfig) -> dict[str, Any]:
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "moe": {"num_experts_per_tok": config.num_experts_per_tok, "num_experts": config.num_local_experts},
    }


def write(model: Mixtral, layout: str, folder: Path) -> Path:
    """The model in one of the layouts of Mistral, by hand."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params(model.config)))
    if layout == "safetensors":
        save_file(consolidated(model), folder / "consolidated.safetensors")
    elif layout == "sharded":
        items = sorted(consolidated(model).items())
        shards = {f"consolidated-0000{i + 1}-of-00002.safetensors": dict(items[i::2]) for i in range(2)}
        for name, shard in shards.items():
            save_file(shard, folder / name)
        weight_map = {key: name for name, shard in shards.items() for key in shard}
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif layout == "pth":
        torch.save(consolidated(model), folder / "consolidated.00.pth")
    else:
        for number, part in enumerate(eight_files(model)):
            torch.save(part, folder / f"consolidated.{number:02}.pt")
    return folder


def same(found: Mixtral, expected: Mixtral) -> bool:
    pairs = zip(found.state_dict().items(), expected.state_dict().items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["safetensors", "sharded", "pth", "eight"])
def test_files_of_mistral(layout: str, dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    model = make(dtype, coarse_router=True)
    folder = write(model, layout, tmp_path / "model")
    loaded = load_model(folder, device="cpu", unpickle=True)
    assert same(loaded, model)
    assert loaded.config.replace(max_position_embeddings=256) == model.config


def test_a_view_of_the_transposed_matrices_would_be_wrong(make: Make, tmp_path: Path) -> None:
    """C2: w2 of the eight files has as many values in either order, so only the values can tell."""
    folder = write(make(), "eight", tmp_path / "model")
    for path in folder.glob("*.pt"):
        part = torch.load(path, weights_only=True)
        for name in [name for name in part if name.endswith("moe.w2")]:
            part[name] = part[name].view(3, 96, 64).transpose(1, 2).reshape(3 * 96, 64).contiguous()
        torch.save(part, path)
    assert not same(load_model(folder, device="cpu", unpickle=True), make())


@pytest.mark.parametrize("target", MOVED)
@pytest.mark.parametrize("start", [*MOVED, "pth", "eight", "sharded"])
def test_every_layout_to_every_other_and_back(start: str, target: Layout, make: Make, tmp_path: Path) -> None:
    """C13: bfloat16 stays bfloat16, bit for bit; writing the same layout again gives the same bytes."""
    model = make(torch.bfloat16, coarse_router=True)
    source = tmp_path / "source"
    if start in MOVED:
        save_model(model, source, layout=start, shard_size_bytes=60_000)  # type: ignore[arg-type]
    else:
        write(model, start, source)
    moved = convert(source, tmp_path / "moved", layout=target, shard_size_bytes=60_000, unpickle=True)
    assert same(load_model(tmp_path / "moved", device="cpu"), model)
    routers = sum(value.numel() for name, value in model.named_parameters() if is_router(name))
    router_bytes = 2 if start in MOVED else 4
    assert moved.size_bytes == sum(value.numel() * 2 for value in model.parameters()) + routers * (router_bytes - 2)
    expected = moved.config.replace(router_aux_loss_coef=model.config.router_aux_loss_coef)
    assert expected.replace(max_position_embeddings=256) == model.config
    if start in MOVED:
        convert(tmp_path / "moved", tmp_path / "back", layout=start, shard_size_bytes=60_000)  # type: ignore[arg-type]
        assert digests(tmp_path / "back") == digests(source)


def test_mistral_files_that_are_written_hold_what_the_description_says(make: Make, tmp_path: Path) -> None:
    model = make(torch.bfloat16, coarse_router=True)
    save_model(model, tmp_path / "model", layout="consolidated")
    found, expected = load_file(tmp_path / "model" / "consolidated.safetensors"), consolidated(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in expected.items())
    said = json.loads((tmp_path / "model" / "params.json").read_text())
    assert said == {**params(model.config), "rope_theta": 1e6, "max_seq_len": 256}


@pytest.mark.parametrize(("layers", "width", "context"), [(32, 4096, 32768), (56, 6144, 65536), (2, 64, 32768)])
def test_context_follows_from_the_size_of_the_model(layers: int, width: int, context: int) -> None:
    """B4: the files do not say it, and no default of another program is right for both sizes."""
    from mixtral.weights.consolidated import from_params, to_params

    values = {
        "dim": width,
        "n_layers": layers,
        "head_dim": 128,
        "hidden_dim": 512,
        "n_heads": 8,
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "vocab_size": 32000,
        "moe": {"num_experts": 8, "num_experts_per_tok": 2},
    }
    config = from_params(values)
    assert config.max_position_embeddings == context
    assert config.rope_theta == 1e6
    assert to_params(config) == {**values, "rope_theta": 1e6}
    assert from_params(to_params(config.replace(max_position_embeddings=99))).max_position_embeddings == 99


def test_pickled_archives_need_permission_and_only_hold_tensors(make: Make, tmp_path: Path) -> None:
    """C8."""
    folder = write(make(), "pth", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: a pickled archive.*--unpickle"):
        load_model(folder, device="cpu")

    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({**consolidated(make()), "norm.weight": Attack()}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="holds other things than tensors"):
        load_model(folder, device="cpu", unpickle=True)
    assert not (tmp_path / "ran").exists()


def _damage(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = torch.load(path, weights_only=True)
    change(values)
    torch.save(values, path)


def _set_zip_version(path: Path) -> None:
    """The version of the format that the first entry of the directory asks for: one that does not exist."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 200
    path.write_bytes(content)


BAD_ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-3000]), "truncated, or not a zip archive"),
    "empty": (lambda p: p.write_bytes(b""), "truncated, or not a zip archive"),
    "zip of the future": (_set_zip_version, r"not a zip archive as torch writes it \(zip file version 20\.0\)"),
    "a list": (lambda p: torch.save([1], p), "holds list; expected a dictionary"),
    "a number": (lambda p: _damage(p, lambda v: v.update(x=3)), "'x' is int; expected a named tensor"),
    "another tensor": (lambda p: _damage(p, lambda v: v.update(x=torch.ones(1))), "unexpected 'x'"),
    "a bias": (
        lambda p: _damage(p, lambda v: v.update({"output.bias": torch.ones(80)})),
        r"unexpected 'output.bias' \(a Mixtral has no biases\)",
    ),
    "missing": (lambda p: _damage(p, lambda v: v.pop("norm.weight")), r"missing 'norm.weight' \[64\]"),
    "strides": (
        lambda p: _damage(p, lambda v: v.update({"output.weight": torch.ones(64, 80).T})),
        "expected a contiguous tensor",
    ),
    "shared": (
        lambda p: _damage(p, lambda v: v.update({"output.weight": v["tok_embeddings.weight"]})),
        "shares memory with",
    ),
    "dtype": (
        lambda p: _damage(p, lambda v: v.update({"norm.weight": torch.ones(64, dtype=torch.float64)})),
        "'norm.weight' is torch.float64",
    ),
    "shape": (
        lambda p: _damage(p, lambda v: v.update({"norm.weight": torch.ones(65)})),
        r"'norm.weight' is \[65\], expected \[64\]",
    ),
    "twice": (lambda p: torch.save({"norm.weight": torch.ones(64)}, p.with_name("consolidated.01.pth")), "is also in"),
    "safetensors too": (
        lambda p: save_file({"x": torch.ones(1)}, p.with_name("consolidated.safetensors")),
        "holds both consolidated.safetensors and consolidated.00.pth",
    ),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_bad_archives(kind: str, make: Make, tmp_path: Path) -> None:
    folder = write(make(), "pth", tmp_path / "model")
    change, told = BAD_ARCHIVES[kind]
    change(folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=told):
        load_model(folder, device="cpu", unpickle=True)


BAD_PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({"moe": None}, "moe is None; expected an object"),
    "odd moe": ({"moe": {"num_experts": 3}}, "expected an object with num_experts and num_experts_per_tok"),
    "unknown key": ({"use_biases": True}, "unknown key 'use_biases'"),
    "layers": ({"n_layers": 3}, "params.json says num_hidden_layers 3, but the tensors have 2"),
    "experts": ({"moe": {"num_experts": 4, "num_experts_per_tok": 2}}, "num_local_experts 4, but the tensors have 3"),
    "vocabulary": ({"vocab_size": 81}, "vocab_size 81, but the tensors have 80"),
    "text": ({"dim": "64"}, "hidden_size is '64'; expected an integer"),
}


@pytest.mark.parametrize("kind", BAD_PARAMS)
def test_bad_params(kind: str, make: Make, tmp_path: Path) -> None:
    folder = write(make(), "safetensors", tmp_path / "model")
    changes, told = BAD_PARAMS[kind]
    (folder / "params.json").write_text(json.dumps({**params(make().config), **changes}))
    with pytest.raises(MixtralError, match=told):
        load_model(folder, device="cpu")


def test_params_that_cannot_be_read(make: Make, tmp_path: Path) -> None:
    folder = write(make(), "safetensors", tmp_path / "model")
    (folder / "params.json").write_text("{")
    with pytest.raises(ConfigError, match=r"params\.json: not JSON"):
        load_model(folder, device="cpu")
    (folder / "params.json").unlink()
    with pytest.raises(ConfigError, match=r"params\.json: no such file"):
        load_model(folder, device="cpu")


def test_hugging_face_files_win_where_the_hub_has_both(make: Make, tmp_path: Path) -> None:
    save_model(make(seed=1), tmp_path / "model")
    save_file(consolidated(make(seed=2)), tmp_path / "model" / "consolidated.safetensors")
    assert same(load_model(tmp_path / "model", device="cpu"), make(seed=1))


def test_values_of_the_random_models_differ(make: Make) -> None:
    """Else the comparisons above would prove nothing."""
    values = np.concatenate([value.detach().flatten().numpy() for value in make().parameters()])
    assert len(np.unique(values)) > 0.9 * len(values)
