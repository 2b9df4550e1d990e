"""A good checkpoint in every container, to be damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from damaged import CONFIG
from safetensors.torch import load_file

from mixtral.model.mixtral import Mixtral
from mixtral.weights import save_model
from mixtral.weights.convert import convert, convert_to_gguf


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind of checkpoint, and one with shards and an index."""
    generator = torch.Generator().manual_seed(3)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    home = tmp_path_factory.mktemp("good")
    save_model(model, home / "per-expert")
    save_model(model, home / "shards", shard_size_bytes=40_000)
    for layout in ("fused", "consolidated"):
        convert(home / "per-expert", home / layout, layout=layout)  # type: ignore[arg-type]
    shutil.copytree(home / "consolidated", home / "pth")
    tensors = load_file(home / "pth" / "consolidated.safetensors")
    (home / "pth" / "consolidated.safetensors").unlink()
    torch.save(tensors, home / "pth" / "consolidated.00.pth")
    (home / "gguf").mkdir()
    convert_to_gguf(home / "per-expert", home / "gguf" / "m.gguf", vocabulary=lambda size: {})
    return home
