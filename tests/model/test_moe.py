"""The router-and-experts layer of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.model.moe import MixtureOfExperts
from mixtral.ops import reference


def layer_of(config: MixtralConfig, dtype: torch.dtype = torch.float32) -> MixtureOfExperts:
    layer = MixtureOfExperts(config, device=None, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return layer


@pytest.fixture
def layer(tiny_config: MixtralConfig) -> MixtureOfExperts:
    return layer_of(tiny_config)


def inputs(tokens: int) -> Tensor:
    return torch.randn((tokens, 64), generator=torch.Generator().manual_seed(1))


def test_equals_the_specification(layer: MixtureOfExperts) -> None:
    x = inputs(200)
    out, route = layer(x)
    expected = reference.route(x, layer.gate.weight, 2)
    assert torch.equal(route.picks_TA, expected.picks_TA)
    parts = (expected.picks_TA, expected.weights_TA, layer.experts.gate_up_proj, layer.experts.down_proj)
    torch.testing.assert_close(out, reference.experts(x, *parts), atol=1e-5, rtol=1e-5)


def test_all_tokens_to_one_pair_and_none_is_dropped(layer: MixtureOfExperts) -> None:
    """A6: 1,000 tokens for experts 3 and 1; every row is that of the token alone."""
    x = inputs(1000)
    x[:, 0] = 1
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[3, 0], layer.gate.weight[1, 0] = 50.0, 49.0
        out, route = layer(x)
        assert route.picks_TA.tolist() == [[3, 1]] * 1000
        assert (out.abs().amax(1) > 1e-2).all()
        share = torch.tensor(1.0).sigmoid()
        dense = [reference.swiglu(x @ layer.experts.gate_up_proj[e].T) @ layer.experts.down_proj[e].T for e in (3, 1)]
        torch.testing.assert_close(out, share * dense[0] + (1 - share) * dense[1], atol=1e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_the_load(layer: MixtureOfExperts) -> None:
    """A6: the same row among 1, 7 and 500 others."""
    x = inputs(501)
    with torch.no_grad():
        alone = layer(x[:1])[0][0]
        for others in (1, 7, 500):
            torch.testing.assert_close(layer(x[: others + 1])[0][0], alone, atol=1e-5, rtol=1e-5)


def test_swapping_gate_and_up_changes_the_output(layer: MixtureOfExperts) -> None:
    """A5."""
    x = inputs(50)
    with torch.no_grad():
        before = layer(x)[0]
        weight = layer.experts.gate_up_proj
        weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
        assert (layer(x)[0] - before).abs().max() > 0.1


def test_idle_experts_get_zero_gradients(layer: MixtureOfExperts) -> None:
    """F7: zeros, not None; and the router learns through the two weights alone."""
    x = inputs(30)
    x[:, 0] = 1
    with torch.no_grad():
        layer.gate.weight[:, 0] = torch.tensor([-90.0, 40.0, -90.0, 40.0])
    out, route = layer(x)
    out.pow(2).sum().backward()
    assert set(route.picks_TA.unique().tolist()) == {1, 3}
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).tolist() == [False, True, False, True]


def test_bfloat16_experts_under_a_float32_router(tiny_config: MixtralConfig) -> None:
    """A3, A7."""
    layer = layer_of(tiny_config, torch.bfloat16)
    out, route = layer(inputs(20).bfloat16())
    assert (out.dtype, route.logits_TE.dtype, route.weights_TA.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    out.float().sum().backward()
    assert layer.gate.weight.grad is not None
    assert layer.gate.weight.grad.dtype == torch.float32
