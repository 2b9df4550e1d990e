"""``mixtral verify`` finds a flipped bit, a NaN and a file of another list."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from mixtral.cli import main
from mixtral.config import MixtralConfig
from mixtral.model.mixtral import Mixtral
from mixtral.weights import save_model
from mixtral.weights.convert import convert_to_gguf

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)


def build(folder: Path, *, broken: bool = False) -> Path:
    generator = torch.Generator().manual_seed(5)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if broken:
            model.get_parameter("model.layers.0.mlp.experts.down_proj")[1, 3, 4] = torch.nan
    save_model(model, folder, shard_size_bytes=30_000)
    return folder


def test_whole(tmp_path: Path, capsys: Capture) -> None:
    folder = build(tmp_path / "model")
    assert main(["verify", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"{folder}: per-expert, 16 tensors, every value finite\n"
    (tmp_path / "sums").write_text(captured.out)
    subprocess.run(["sha256sum", "--check", "--strict", str(tmp_path / "sums")], cwd=folder, check=True)
    assert main(["verify", str(folder), "--against", str(tmp_path / "sums")]) == 0
    convert_to_gguf(folder, tmp_path / "m.gguf", form="q8_0", vocabulary=lambda size: {})
    assert main(["verify", str(tmp_path / "m.gguf")]) == 0


def test_damaged(tmp_path: Path, capsys: Capture) -> None:
    folder = build(tmp_path / "model")
    assert main(["verify", str(folder)]) == 0
    lines = capsys.readouterr().out
    (tmp_path / "sums").write_text(lines)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(folder), "--against", str(tmp_path / "sums")]) == 2
    assert f"{shard.name}: sha256 is " in capsys.readouterr().err
    (tmp_path / "sums").write_text("\n".join(lines.splitlines()[1:]))
    assert main(["verify", str(folder), "--against", str(tmp_path / "sums")]) == 2
    assert f"{shard.name}: the list of sha256 sums does not have it" in capsys.readouterr().err
    (tmp_path / "sums").write_text("no sum at all\n")
    assert main(["verify", str(folder), "--against", str(tmp_path / "sums")]) == 2
    assert "line 1 is 'no sum at all'; expected sha256" in capsys.readouterr().err


def test_values_that_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    folder = build(tmp_path / "model", broken=True)
    assert main(["verify", str(folder)]) == 2
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert f"{name!r}, expert 1: 1 values are NaN or infinite" in capsys.readouterr().err
