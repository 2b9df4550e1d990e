"""``mixtral quantize --importance``: what it reports, and what it refuses before it writes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtral.cli import main
from mixtral.config import MixtralConfig
from mixtral.files.gguf import read_gguf
from mixtral.model.mixtral import Mixtral
from mixtral.weights import save_model

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=128,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(5)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).to(torch.bfloat16))
    folder = tmp_path_factory.mktemp("models") / "source"
    save_model(model, folder)
    return folder


def write(path: Path, names: list[str], width: int = 256) -> Path:
    """A file of the older form, in which the second expert saw no token."""
    data = struct.pack("<i", len(names))
    for name in names:
        values = np.linspace(0.1, 9, width, dtype=np.float32)
        if "_exps" in name:
            values = np.concatenate([values, np.full(width, 5, np.float32)])  # 5 calls: a mean of 1 throughout
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 5, values.size) + values.tobytes()
    path.write_bytes(data + struct.pack("<ii", 5, 9) + b"calib.txt")
    return path


EXPERTS = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]


def test_it_says_what_the_importance_covers(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    file, target = write(tmp_path / "i.dat", ["blk.0.attn_q.weight", *EXPERTS]), tmp_path / "m.gguf"
    command = ["quantize", str(folder), str(target), "--format", "q4_k_m"]
    assert main(command) == 0
    assert "importance" not in capsys.readouterr().out
    plain = target.read_bytes()
    assert main([*command, "--overwrite", "--importance", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert target.read_bytes() != plain
    assert "i.dat: 4 entries matrices with importance 4 matrices" in said
    # Embedding, head, the output projection, and three of the second expert.
    names = [
        "token_embd",
        "blk.0.attn_output",
        "blk.0.ffn_gate_exps",
        "blk.0.ffn_up_exps",
        "blk.0.ffn_down_exps",
        "output",
    ]
    assert "matrices without 6: " + ", ".join(f"{name}.weight" for name in names) in said
    assert "in formats that take none, or copied 3 " in said  # keys, values, router
    assert said.endswith("experts without tokens or entries 1: expert 1 of layer 0")
    assert "less than" not in said
    metadata = read_gguf(target).metadata
    assert {key: metadata[f"quantize.imatrix.{key}"] for key in ("file", "dataset", "entries_count")} == {
        "file": "i.dat",
        "dataset": "calib.txt",
        "entries_count": 4,
    }


def test_what_is_refused_before_anything_is_written(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    good, other = write(tmp_path / "i.dat", EXPERTS), write(tmp_path / "o.dat", EXPERTS, width=128)
    few, target = write(tmp_path / "f.dat", ["blk.0.attn_k.weight"]), tmp_path / "m.gguf"
    for file, form, told in [
        (good, "q8_0", "i.dat: importance would change nothing: only Q2_K"),
        (few, "q4_k_m", "f.dat: has importance for no matrix that could use it"),
        (other, "q4_k_m", "o.dat: 3 of 3 entries do not fit; is the file of another model?"),
        (tmp_path / "none", "q4_k_m", "none: no such file"),
    ]:
        assert main(["quantize", str(folder), str(target), "--format", form, "--importance", str(file)]) == 2
        assert told in capsys.readouterr().err
        assert not target.exists()


@pytest.mark.filterwarnings("default::UserWarning")
def test_quantising_again_is_told(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    assert main(["quantize", str(folder), str(first), "--format", "q4_0"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["quantize", str(first), str(second), "--format", "q2_k"]) == 0
    assert "warning: matrices that are quantised already (Q4_0) are quantised anew" in capsys.readouterr().err
    assert main(["quantize", str(first), str(second), "--format", "q4_0", "--overwrite"]) == 0
    assert capsys.readouterr().err == ""
