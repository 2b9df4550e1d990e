"""LoRA on attention and on stacked experts: its arithmetic, what is trained, and the way back to the base."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from mixtral.adapters import Factors, LoraConfig, attach, attach_factors
from mixtral.adapters.factors import TARGETS, new_factors, target_of
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.ops import head_cross_entropy
from mixtral.weights.names import parameter_shapes

ALL = tuple(TARGETS)


def tokens(config: MixtralConfig, count: int = 90, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def logits(model: Mixtral, ids: Tensor) -> Tensor:
    context = Documents([len(ids)])
    return model.logits(model(Batch(ids, context.positions_T, context)).hidden_TD)


def loss(model: Mixtral, ids: Tensor) -> Tensor:
    context = Documents([len(ids)])
    hidden = model(Batch(ids, context.positions_T, context)).hidden_TD
    weights = torch.full((len(ids),), 1 / len(ids))
    return head_cross_entropy(hidden, model.lm_head.weight, ids.roll(-1), weights)[0]


def noise(factors: Mapping[str, Factors], seed: int = 5, size: float = 0.2) -> dict[str, Factors]:
    """The same kind of adapter, with values in b too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(a, torch.randn(b.shape, generator=generator, dtype=b.dtype) * size, scale)
        for name, (a, b, scale) in factors.items()
    }


def merged(model: Mixtral, factors: Mapping[str, Factors]) -> Mixtral:
    """A copy of a plain model with the additions multiplied out: the oracle."""
    other = Mixtral(model.config, dtype=model.dtype)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, (a, b, scale) in factors.items():
            added = torch.einsum("...or,...ri->...oi", b.double(), a.double()) * scale
            other.get_parameter(name).add_(added.to(model.dtype))
    return other


@pytest.mark.parametrize("targets", [ALL, ("q", "v"), ("gate_up", "down"), ("down",), ("router",)])
def test_equals_merged_weights(tiny_model: Mixtral, targets: tuple[str, ...]) -> None:
    """Outputs, and the gradients of a and b by the chain rule from those of the merged weights."""
    ids = tokens(tiny_model.config)
    lora = LoraConfig(rank=3, alpha=5.0, targets=targets, expert_rank=2)
    factors = noise(new_factors(tiny_model.config, lora, torch.float32))
    oracle = merged(tiny_model, factors)
    expected = logits(oracle, ids)
    loss(oracle, ids).backward()
    adapter = attach_factors(tiny_model, factors)
    torch.testing.assert_close(logits(tiny_model, ids), expected, atol=2e-5, rtol=1e-4)
    loss(tiny_model, ids).backward()
    found = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert len(found) == 2 * len(factors)
    for parameter, (a, b, scale) in factors.items():
        grad = oracle.get_parameter(parameter).grad
        assert grad is not None
        module = parameter.rpartition(".")[0]
        short = target_of(parameter) if "experts" in parameter else "lora"
        wanted = (scale * b.mT @ grad, scale * grad @ a.mT)
        for part, value in zip("ab", wanted, strict=True):
            made = found[f"{module}.{short}_{part}"]
            assert made is not None
            torch.testing.assert_close(made, value, atol=1e-6, rtol=1e-3)
            assert value.abs().max() > 1e-6


def test_starts_as_the_base_and_trains_nothing_else(tiny_model: Mixtral) -> None:
    ids = tokens(tiny_model.config)
    before, plain = logits(tiny_model, ids), [name for name, _ in tiny_model.named_parameters()]
    adapter = attach(tiny_model, LoraConfig(rank=4))
    torch.testing.assert_close(logits(tiny_model, ids), before, atol=1e-6, rtol=1e-6)
    wanted = {name for name, parameter in tiny_model.named_parameters() if parameter.requires_grad}
    assert wanted == dict(adapter.named_parameters()).keys()
    assert not any(".gate." in name for name in wanted)
    loss(tiny_model, ids).backward()
    assert {name for name, p in tiny_model.named_parameters() if p.grad is not None} == wanted
    adapter.detach()
    assert [name for name, _ in tiny_model.named_parameters()] == plain
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())
    assert torch.equal(logits(tiny_model, ids), before)


def test_disabled_is_the_base(tiny_model: Mixtral) -> None:
    """What DPO needs as its reference; it may be nested, and an error inside switches on again."""
    ids = tokens(tiny_model.config)
    before = logits(tiny_model, ids)
    adapter = attach_factors(
        tiny_model, noise(new_factors(tiny_model.config, LoraConfig(rank=4, targets=ALL), torch.float32))
    )
    changed = logits(tiny_model, ids)
    assert (changed - before).abs().max() > 0.1
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(logits(tiny_model, ids), before)
        assert torch.equal(logits(tiny_model, ids), before)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(logits(tiny_model, ids), changed)


def test_the_table_counts_what_is_trained(tiny_config: MixtralConfig, tiny_model: Mixtral) -> None:
    adapter = attach(tiny_model, LoraConfig(rank=4, expert_rank=2))
    table = {row.name: row for row in adapter.table()}
    assert len(table) == 2 * 6 * tiny_config.num_hidden_layers
    assert table["model.layers.1.mlp.experts.gate_up_a"].shape == (4, 2, 64)
    assert table["model.layers.1.mlp.experts.gate_up_b"].shape == (4, 192, 2)
    assert table["model.layers.0.self_attn.k_proj.lora_b"].shape == (32, 4)
    assert sum(row.numbers for row in table.values()) == sum(p.numel() for p in adapter.parameters())


def test_the_seed_decides_the_first_values(tiny_config: MixtralConfig) -> None:
    first, same, other = (new_factors(tiny_config, LoraConfig(seed=seed), torch.float32) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name].a, same[name].a)
        assert not torch.equal(first[name].a, other[name].a)
        assert not first[name].b.any()
        assert first[name].a.abs().max() <= parameter_shapes(tiny_config)[name][-1] ** -0.5
    stack = first["model.layers.0.mlp.experts.down_proj"].a
    assert not torch.equal(stack[0], stack[1])


def test_scales(tiny_config: MixtralConfig) -> None:
    plain = new_factors(tiny_config, LoraConfig(rank=16, alpha=8, expert_rank=4, targets=ALL), torch.float32)
    found = {target_of(name): (pair.rank, pair.scale) for name, pair in plain.items()}
    assert found["q"] == (16, 0.5)
    assert found["down"] == found["router"] == (4, 2.0)
    stabilised = new_factors(tiny_config, LoraConfig(rank=16, alpha=8, rslora=True), torch.float32)
    assert {pair.scale for pair in stabilised.values()} == {2.0}


def test_dropout_is_for_training_alone(tiny_model: Mixtral) -> None:
    ids = tokens(tiny_model.config)
    factors = noise(new_factors(tiny_model.config, LoraConfig(rank=4), torch.float32))
    adapter = attach_factors(tiny_model, factors, dropout=0.4)
    with torch.no_grad():
        exact = logits(tiny_model, ids)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(logits(tiny_model, ids).detach())
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-2
    assert (drawn[0] - exact).abs().max() > 1e-2
    tiny_model.eval()
    torch.testing.assert_close(logits(tiny_model, ids), exact, atol=1e-6, rtol=1e-6)
    tiny_model.train()
    with adapter.disabled():
        assert torch.equal(logits(tiny_model, ids), logits(tiny_model, ids))


def test_bfloat16_base_with_float32_adapter(tiny_config: MixtralConfig) -> None:
    model = Mixtral(tiny_config, dtype=torch.bfloat16)
    initialise(model, seed=1, std=0.2)
    factors = new_factors(tiny_config, LoraConfig(rank=4, targets=ALL), torch.float32)
    adapter = attach_factors(model, noise(factors, size=0.05))
    loss(model, tokens(tiny_config)).backward()
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


def test_what_does_not_fit_is_refused(tiny_model: Mixtral, tiny_config: MixtralConfig) -> None:
    factors = new_factors(tiny_config, LoraConfig(rank=4), torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b, scale = factors[name]
    bad = [
        ({}, "holds no adapter"),
        ({"model.layers.7.self_attn.q_proj.weight": factors[name]}, "another base"),
        ({"model.norm.weight": factors[name]}, "another base"),
        ({name: Factors(a[:, :-1], b, scale)}, r"has a \[4, 63\]"),
        ({name: Factors(a, b[:, :-1], scale)}, r"b \[64, 3\]"),
        ({name: Factors(a * torch.nan, b, scale)}, "not finite"),
    ]
    for given, told in bad:
        with pytest.raises(CheckpointError, match=told):
            attach_factors(tiny_model, given)
    attach(tiny_model, LoraConfig(rank=4))
    with pytest.raises(ConfigError, match="Detach an adapter"):
        attach(tiny_model, LoraConfig(rank=4))


def test_targets_may_be_a_list() -> None:
    """As TOML and JSON have them."""
    assert LoraConfig(targets=["q", "down"]) == LoraConfig(targets=("q", "down"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": True},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"targets": ()},
        {"targets": ("q", "q")},
        {"targets": ("w1",)},
        {"targets": "q"},
        {"expert_rank": -1},
        {"dropout": 1.0},
        {"seed": -1},
    ],
)
def test_configs_that_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**wrong)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(wrong))
