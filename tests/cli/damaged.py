"""Checkpoints of every container, the commands that read them, and ways to write a damaged one. Shared by tests."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.cli import main
from mixtral.config import MixtralConfig
from mixtral.files.gguf import read_gguf
from mixtral.files.gguf_write import GgufRecord, write_gguf

Capture = pytest.CaptureFixture[str]
Tensors = dict[str, Tensor]
CONFIG = MixtralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
KINDS = ("per-expert", "fused", "consolidated", "pth", "gguf")
WEIGHTS = {
    "per-expert": "model.safetensors",
    "fused": "model.safetensors",
    "consolidated": "consolidated.safetensors",
    "pth": "consolidated.00.pth",
    "gguf": "m.gguf",
}
CONFIGS = {"consolidated": "params.json", "pth": "params.json", "gguf": "m.gguf"}  # the others: config.json
ROUTER = {
    "per-expert": "model.layers.1.block_sparse_moe.gate.weight",
    "fused": "model.layers.1.mlp.gate.weight",
    "gguf": "blk.1.ffn_gate_inp.weight",
}
HEAD = {"per-expert": "lm_head.weight", "fused": "lm_head.weight"}
EXPERT = {  # the one with the highest number: a tensor of it, or that of all
    "per-expert": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "fused": "model.layers.1.mlp.experts.gate_up_proj",
    "gguf": "blk.1.ffn_gate_exps.weight",
}
OTHER_EXPERT = {"per-expert": EXPERT["fused"], "fused": EXPERT["per-expert"], "gguf": "blk.1.ffn_gate.3.weight"}
for names, mistral in (
    (ROUTER, "layers.1.feed_forward.gate.weight"),
    (HEAD, "output.weight"),
    (EXPERT, "layers.1.feed_forward.experts.3.w1.weight"),
    (OTHER_EXPERT, "layers.1.block_sparse_moe.w1"),
):
    names |= {kind: mistral for kind in KINDS if kind not in names}


def commands(kind: str, folder: Path, target: Path) -> list[list[str]]:
    trusted = ["--unpickle"] if kind == "pth" else []  # a checkpoint that needs it is never generated from
    found = [["inspect", str(folder), *trusted], ["verify", str(folder), *trusted]]
    found.append(["convert", str(folder), str(target), "--to", "hf", *trusted])
    return found if trusted else [*found, ["generate", "--model", str(folder), "--ids", "1", "--max-tokens", "1"]]


def all_refuse(kind: str, folder: Path, told: list[str], capsys: Capture) -> None:
    """Every command ends with code 2 and one line that holds each of the sentences."""
    target = folder.parent / "target"
    for command in commands(kind, folder, target):
        start = time.perf_counter()
        code = main(command)
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, ""), captured
        assert captured.err.startswith("mixtral: error: "), captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert all(text in captured.err for text in told), captured.err
        assert len(captured.err) < 2_500
        assert time.perf_counter() - start < 60
        assert not target.exists()


def read(kind: str, folder: Path) -> Tensors:
    path = folder / WEIGHTS[kind]
    if kind == "pth":
        return dict(torch.load(path, weights_only=True))
    if kind != "gguf":
        return load_file(path)
    data = path.read_bytes()
    return {
        name: torch.frombuffer(bytearray(data[entry.start : entry.stop]), dtype=torch.float32).view(entry.shape)
        for name, entry in read_gguf(path).tensors.items()
    }


def rewrite(kind: str, folder: Path, tensors: Tensors, **keys: Any) -> None:
    path = folder / WEIGHTS[kind]
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    if kind == "pth":
        torch.save(tensors, path)
    elif kind != "gguf":
        save_file(tensors, path)
    else:
        metadata = {k: v for k, v in (read_gguf(path).metadata | keys).items() if v is not None}
        forms = {torch.float32: "F32", torch.float16: "F16"}
        records = [
            GgufRecord(name, forms[value.dtype], tuple(value.shape), lambda v=value: [v.view(-1).view(torch.uint8)])
            for name, value in tensors.items()
        ]
        write_gguf(path, metadata, records)


def members(change: Callable[[str, bytes], bytes | None], *, compressed: bool = False) -> Callable[[Path], None]:
    """Write the archive again with other contents of its members; None leaves one out."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            found = [(member.filename, archive.read(member)) for member in archive.infolist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
            for name, data in found:
                if (new := change(name.partition("/")[2], data)) is not None:
                    archive.writestr(name, new)

    return damage


def pickled(raw: bytes) -> Callable[[Path], None]:
    return members(lambda name, data: raw if name == "data.pkl" else data)
