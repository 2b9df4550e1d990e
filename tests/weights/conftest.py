from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixtral.config import MixtralConfig
from mixtral.model.mixtral import Mixtral
from mixtral.weights.names import is_router, parameter_shapes
from mixtral.weights.save import save_model

Make = Callable[..., Mixtral]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small() -> MixtralConfig:
    """Odd enough that no two sizes are equal, G < H, and every row a multiple of 32."""
    return MixtralConfig(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )


@pytest.fixture
def make(small: MixtralConfig) -> Make:
    """A random model of the small config; ``coarse_router`` makes router values that bfloat16 holds."""

    def build(dtype: torch.dtype = torch.float32, *, coarse_router: bool = False, seed: int = 0) -> Mixtral:
        generator = torch.Generator().manual_seed(seed)
        model = Mixtral(small, device="cpu", dtype=dtype)
        with torch.no_grad():
            for name, shape in parameter_shapes(small).items():
                values = torch.randn(shape, generator=generator) * 0.3
                if is_router(name) and coarse_router:
                    values = values.to(torch.bfloat16)
                model.get_parameter(name).copy_(values)
        return model

    return build


@pytest.fixture
def folder(tmp_path: Path, make: Make) -> Path:
    """A sharded per-expert checkpoint in float32."""
    path = tmp_path / "model"
    save_model(make(), path, shard_size_bytes=60_000)
    return path
