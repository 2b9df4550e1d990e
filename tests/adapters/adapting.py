"""Logits of a small model with and without an adapter, here and in transformers; and adapters that change much."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mixtral.adapters import Factors, LoraConfig, attach_factors
from mixtral.adapters.factors import new_factors
from mixtral.config import MixtralConfig
from mixtral.model import Batch, Documents, Mixtral
from mixtral.weights import save_model

__all__ = ["IDS", "factors_of", "ours", "peer_of", "theirs"]

IDS = torch.arange(3, 60)


def ours(model: Mixtral, factors: Mapping[str, Factors] | None = None) -> Tensor:
    adapter = attach_factors(model, factors) if factors else None
    context = Documents([len(IDS)])
    with torch.no_grad():
        found = model.logits(model(Batch(IDS, context.positions_T, context)).hidden_TD)
    if adapter is not None:
        adapter.detach()
    return found


def peer_of(model: Mixtral, folder: Path) -> transformers.MixtralForCausalLM:
    save_model(model, folder, layout="per-expert", overwrite=True)
    peer = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer.set_experts_implementation("eager")
    return peer


def theirs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def factors_of(config: MixtralConfig, seed: int = 5, size: float = 0.1, **options: Any) -> dict[str, Factors]:
    """A new adapter with values of that size in b."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (a, b, scale) in new_factors(config, LoraConfig(**options), torch.float32).items():
        found[name] = Factors(a, torch.randn(b.shape, generator=generator) * size, scale)
    return found
