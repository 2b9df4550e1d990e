"""Logits with and without an adapter, here and in transformers; adapters that change much; packed bases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import integers
import torch
import transformers
from torch import Tensor

from mixtral.adapters import Factors, LoraConfig, attach_factors
from mixtral.adapters.factors import new_factors
from mixtral.config import MixtralConfig
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.weights import save_model
from mixtral.weights.convert import convert, convert_to_gguf

__all__ = ["FORMS", "IDS", "WIDE", "factors_of", "ours", "packed_folder", "peer_of", "theirs"]

WIDE = MixtralConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)
# What is trained over -> most bytes per number of the experts.
FORMS = {
    "gptq 4, zeros, order": 0.75,
    "awq": 0.75,
    "ct 3": 0.75,
    "ct int8": 1.1,
    "int4_g32": 0.5625,
    "int8_g128": 1.02,
    "q4_k_m": 0.83,  # some of its matrices are Q6_K
    "q8_0": 1.0625,
}
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


def packed_folder(form: str, folder: Path, config: MixtralConfig = WIDE) -> Path:
    """A model on disk whose experts are in that form; ``config`` counts for those that are converted."""
    if form in integers.FORMS:
        return integers.write(folder, integers.FORMS[form]).folder
    model = Mixtral(config)
    initialise(model, seed=1, std=0.1)
    save_model(model, folder / "plain")
    if form.startswith("int"):
        convert(folder / "plain", folder / "packed", layout="per-expert", form=form)
        return folder / "packed"
    convert_to_gguf(folder / "plain", folder / "packed.gguf", vocabulary=lambda count: {}, form=form)
    return folder / "packed.gguf"
