"""Training memory: the kept part against the real plan of every rank, activations against what autograd saves."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from mixtral.adapters import LoraConfig
from mixtral.adapters.factors import new_factors
from mixtral.config import MixtralConfig, preset
from mixtral.errors import ConfigError
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.parallel.plan import Axes, region
from mixtral.parallel.shards import shapes_of
from mixtral.plan import (
    activation_bytes_per_token,
    adapter_parameters,
    count_parameters,
    training_memory,
    tuning_memory,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training.md"


@pytest.mark.parametrize("name", ["8x7b", "8x22b"])
@pytest.mark.parametrize("text", ["dp=1", "dp=8", "dp=64", "dp=8,ep=8", "dp=8,tp=8", "dp=16,tp=4,ep=8"])
def test_values_are_those_of_the_fullest_rank(name: str, text: str) -> None:
    config, axes = preset(name), Axes.parse(text)
    shapes = shapes_of(config)
    held = max(sum(math.prod(region(n, s, axes, place).size) for n, s in shapes.items()) for place in axes.places())
    memory = training_memory(config, dp=axes.dp, tp=axes.tp, ep=axes.ep)
    assert memory.values == pytest.approx(4 * held, rel=1e-3)
    assert memory.gradients == memory.values
    # Muon has one moment, AdamW two: 12 bytes a value and a little more, gradients included.
    assert 3 * memory.values < memory.kept + memory.gradients < 3.2 * memory.values


def test_activations_are_what_autograd_saves() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    model = Mixtral(config, dtype=torch.bfloat16)
    initialise(model, seed=1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = 512
    context = Documents((256, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(Batch(torch.arange(tokens) % 64, context.positions_T, context)).hidden_TD.sum()
    measured = sum(storage.nbytes() for storage in saved.values()) / tokens
    assert measured == pytest.approx(activation_bytes_per_token(config), rel=0.12)  # rows of experts are padded


def test_axes_that_cannot_be_are_refused() -> None:
    for axes in ({"dp": 4, "ep": 3}, {"dp": 0}, {"tp": 0}):
        with pytest.raises(ConfigError, match="ep a divisor of dp"):
            training_memory(preset("8x7b"), **axes)


def test_the_table_of_the_document_is_computed() -> None:
    rows = re.findall(r"^\| (8x\d+B) \| `(dp=[^`]+)` \|(.+)\|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 6
    for name, text, cells in rows:
        axes = Axes.parse(text)
        memory = training_memory(preset(name.lower()), dp=axes.dp, tp=axes.tp, ep=axes.ep)
        found = [memory.kept, memory.gradients, memory.gathered, memory.activations, memory.total]
        assert [cell.strip() for cell in cells.split("|")] == [str(axes.world), *(f"{n / 1e9:.1f}" for n in found)]


@pytest.mark.parametrize(("rank", "expert_rank"), [(16, 16), (16, 4), (8, 0), (0, 8)])
def test_adapters_have_as_many_numbers(rank: int, expert_rank: int) -> None:
    config = preset("tiny")
    attention, experts = ("q", "k", "v", "o"), ("gate_up", "down")
    targets = (attention if rank else ()) + (experts if expert_rank else ())
    lora = LoraConfig(rank=rank or expert_rank, expert_rank=expert_rank or None, targets=targets)
    factors = new_factors(config, lora, torch.float32).values()
    assert adapter_parameters(config, rank=rank, expert_rank=expert_rank) == sum(
        pair.a.numel() + pair.b.numel() for pair in factors
    )


def test_a_quantised_base_takes_less() -> None:
    config = preset("8x7b")
    found = [
        tuning_memory(config, trained=1000, adapter=True, precision=precision) for precision in ("bf16", "int4-g32")
    ]
    assert found[0].total - found[1].total == found[0].base - found[1].base > 60e9
    assert found[0].trained == 20_000
    with pytest.raises(ConfigError, match="trained is 0"):
        tuning_memory(config, trained=0, adapter=True)


def test_the_table_of_recipes_is_computed() -> None:
    rows = re.findall(r"^\| (8x\d+B) \| (\w.+?) \|(.+)\|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 10
    for name, what, cells in rows:
        config = preset(name.lower())
        expert = 3 * config.hidden_size * config.intermediate_size
        trained, precision = {
            "all weights": (count_parameters(config).total, "bf16"),
            "one expert per layer": (config.num_hidden_layers * expert, "bf16"),
            "LoRA": (adapter_parameters(config, rank=16, expert_rank=16), "bf16"),
            "LoRA, attention": (adapter_parameters(config, rank=16, expert_rank=0), "bf16"),
            "QLoRA": (adapter_parameters(config, rank=16, expert_rank=16), "int4-g32"),
        }[what]
        memory = tuning_memory(config, trained=trained, adapter="LoRA" in what, precision=precision)
        found = [memory.base, memory.trained, memory.activations, memory.total]
        assert [cell.strip() for cell in cells.split("|")] == [
            f"{trained / 1e6:,.0f}",
            *(f"{n / 1e9:.1f}" for n in found),
        ]
