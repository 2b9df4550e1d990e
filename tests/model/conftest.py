"""Random models of odd sizes, the same model in transformers, and reading prompts through the paged cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.model import PAGE_SIZE, Batch, Mixtral, PagedCache

Peer = transformers.MixtralForCausalLM
DrawConfig = Callable[[int], MixtralConfig]
MakePeer = Callable[..., Peer]
Read = Callable[..., list[Tensor]]


@pytest.fixture(scope="session")
def draw_config() -> DrawConfig:
    """``draw_config(seed)``: odd sizes; the width is never heads times head size."""

    def draw(seed: int) -> MixtralConfig:
        source = random.Random(seed)
        groups, experts = source.randint(1, 3), source.randint(2, 8)
        return MixtralConfig(
            vocab_size=2 * source.randint(20, 90) + 1,
            hidden_size=2 * source.randint(8, 30) + 1,
            intermediate_size=2 * source.randint(4, 22) + 1,
            num_hidden_layers=source.randint(1, 4),
            num_attention_heads=groups * source.randint(1, 4),
            num_key_value_heads=groups,
            head_dim=2 * source.randint(2, 9),
            num_local_experts=experts,
            num_experts_per_tok=source.randint(1, min(3, experts)),
            max_position_embeddings=2048,
            rope_theta=source.choice([1e4, 1e6]),
            rms_norm_eps=source.choice([1e-5, 1e-6]),
        )

    return draw


@pytest.fixture(scope="session")
def make_peer() -> MakePeer:
    """``make_peer(config, seed=0)``: every part matters, and router logits are far apart (no near-ties)."""

    def make(config: MixtralConfig, *, seed: int = 0) -> Peer:
        values = {key: value for key, value in config.to_dict().items() if key != "architectures"}
        peer = Peer(transformers.MixtralConfig(**values)).eval()
        peer.set_experts_implementation("eager")  # the default refuses odd sizes
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in peer.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("norm.weight"):
                    parameter.copy_(1 + 0.3 * noise)
                elif name.endswith("embed_tokens.weight"):
                    parameter.copy_(noise)
                else:
                    scale = 4.0 if name.endswith("mlp.gate.weight") else 1.0
                    parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)
        return peer

    return make


@pytest.fixture(scope="session")
def read() -> Read:
    """``read(model, prompts, chunk=None)``: logits of every prompt, all prompts as one flat batch per chunk.

    Pages are given out in mixed order, and memory that was never written is NaN.
    """

    def through_cache(model: Mixtral, prompts: Sequence[Sequence[int]], *, chunk: int | None = None) -> list[Tensor]:
        counts = [-(-len(prompt) // PAGE_SIZE) for prompt in prompts]
        order = random.Random(0).sample(range(sum(counts) + 3), sum(counts))
        pages = [[order.pop() for _ in range(count)] for count in counts]
        weight = model.lm_head.weight
        cache = PagedCache(model.config, pages=sum(counts) + 3, device="cpu", dtype=weight.dtype)
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        found: list[list[Tensor]] = [[] for _ in prompts]
        size = chunk or max(map(len, prompts))
        for start in range(0, max(map(len, prompts)), size):
            live = [i for i, prompt in enumerate(prompts) if start < len(prompt)]
            parts = [list(prompts[i][start : start + size]) for i in live]
            batch = Batch(
                tokens_T=torch.tensor([id for part in parts for id in part]),
                positions_T=torch.cat([torch.arange(start, start + len(part)) for part in parts]),
                context=cache.view([(pages[i], start, len(part)) for i, part in zip(live, parts, strict=True)]),
            )
            with torch.inference_mode():
                logits = model.logits(model(batch).hidden_TD)
            for i, rows in zip(live, logits.split([len(part) for part in parts]), strict=True):
                found[i].append(rows)
        return [torch.cat(rows) for rows in found]

    return through_cache
