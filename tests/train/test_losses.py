"""The router's losses against brute force in float64, against transformers, and against what they are for."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mixtral.ops import Route
from mixtral.train.losses import balance_by_document, balance_loss, expert_load, router_losses, z_loss

Array = NDArray[np.float64]
EXPERTS, PER_TOKEN = 8, 2


def draw(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, picks, and a mask that leaves out about a third."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn((tokens, EXPERTS), generator=generator)
    return logits_TE, logits_TE.topk(PER_TOKEN).indices, torch.rand(tokens, generator=generator) > 0.33


def collapsed(pair: tuple[int, int], tokens: int = 12) -> Route:
    logits_TE = torch.full((tokens, EXPERTS), -40.0)
    logits_TE[:, list(pair)] = 40.0
    picks_TA = torch.tensor([pair] * tokens)
    return Route(logits_TE, picks_TA, torch.full((tokens, 2), 0.5))


def brute_balance(logits: Array, picks: NDArray[np.int64], mask: Array) -> float:
    total = 0.0
    real = [t for t in range(len(logits)) if mask[t]]
    for e in range(EXPERTS):
        chosen = sum(1 for t in real if e in picks[t])
        mass = sum(float(np.exp(logits[t, e]) / np.exp(logits[t]).sum()) for t in real)
        total += EXPERTS / (PER_TOKEN * len(real)) * chosen * mass / len(real)
    return total


def brute_z(logits: Array, mask: Array) -> float:
    return float(np.mean([np.log(np.exp(row).sum()) ** 2 for row, real in zip(logits, mask, strict=True) if real]))


def finite_differences(value: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    out = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        out[place] = (value(up) - value(down)) / (2 * step)
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_both_losses_and_their_gradients_equal_brute_force(masked: bool) -> None:
    logits_TE, picks_TA, mask_T = draw(13)
    mask_T = mask_T if masked else torch.ones_like(mask_T)
    logits, picks, mask = logits_TE.double().numpy(), picks_TA.numpy(), mask_T.double().numpy()
    given = mask_T if masked else None
    cases: list[tuple[Callable[[Tensor], Tensor], Callable[[Array], float]]] = [
        (lambda x: balance_loss(x, picks_TA, given), lambda x: brute_balance(x, picks, mask)),
        (lambda x: z_loss(x, given), lambda x: brute_z(x, mask)),
    ]
    for ours, brute in cases:
        leaf_TE = logits_TE.clone().requires_grad_()
        loss = ours(leaf_TE)
        assert float(loss.detach()) == pytest.approx(brute(logits), rel=1e-5)
        (grad_TE,) = torch.autograd.grad(loss, leaf_TE)
        np.testing.assert_allclose(grad_TE.numpy(), finite_differences(brute, logits), atol=2e-6, rtol=1e-4)
        assert not grad_TE[~mask_T].any()


def test_balance_is_one_when_even_and_experts_per_choice_when_collapsed() -> None:
    picks_TA = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert float(balance_loss(torch.zeros(4, EXPERTS), picks_TA)) == pytest.approx(1)
    assert expert_load(picks_TA, EXPERTS).tolist() == [1.0] * EXPERTS
    route = collapsed((2, 5))
    assert float(balance_loss(route.logits_TE, route.picks_TA)) == pytest.approx(EXPERTS / PER_TOKEN)
    assert expert_load(route.picks_TA, EXPERTS).tolist() == [0, 0, 4, 0, 0, 4, 0, 0]


def test_layers_that_collapse_on_different_experts_do_not_cancel_out() -> None:
    routes = tuple(collapsed((2 * layer, 2 * layer + 1)) for layer in range(4))
    balance, _ = router_losses(routes)
    assert float(balance) == pytest.approx(4)
    theirs = load_balancing_loss_func(tuple(route.logits_TE for route in routes), EXPERTS, PER_TOKEN)
    assert float(theirs) == pytest.approx(2)  # what perfect balance gives there


def test_router_losses_are_means_over_layers() -> None:
    routes = tuple(Route(logits, picks, picks.float()) for logits, picks, _ in (draw(9, 1), draw(9, 2)))
    balance, z = router_losses(routes)
    assert float(balance) == pytest.approx(sum(float(balance_loss(r.logits_TE, r.picks_TA)) for r in routes) / 2)
    assert float(z) == pytest.approx(sum(float(z_loss(r.logits_TE)) for r in routes) / 2)


@pytest.mark.parametrize("masked", [False, True])
def test_for_one_layer_transformers_value_is_twice_ours(masked: bool) -> None:
    logits_TE, picks_TA, mask_T = draw(24)
    mask_BS = mask_T.long().view(3, 8) if masked else None
    theirs = load_balancing_loss_func((logits_TE,), EXPERTS, PER_TOKEN, mask_BS)
    ours = balance_loss(logits_TE, picks_TA, mask_T if masked else None)
    assert float(theirs) == pytest.approx(PER_TOKEN * float(ours), rel=1e-5)


def test_padding_changes_nothing() -> None:
    logits_TE, picks_TA, _ = draw(10)
    noise_TE, noise_TA, _ = draw(7, seed=9)
    longer_TE, longer_TA = torch.cat((logits_TE, 5 * noise_TE)), torch.cat((picks_TA, noise_TA))
    mask_T = torch.arange(17) < 10
    torch.testing.assert_close(balance_loss(longer_TE, longer_TA, mask_T), balance_loss(logits_TE, picks_TA))
    torch.testing.assert_close(z_loss(longer_TE, mask_T), z_loss(logits_TE))
    torch.testing.assert_close(expert_load(longer_TA, EXPERTS, mask_T), expert_load(picks_TA, EXPERTS))


def test_descending_the_balance_loss_spreads_the_tokens() -> None:
    logits_TE, _, _ = draw(64)
    bias_E = torch.tensor([2.0, 2.0, 0, 0, 0, 0, 0, 0], requires_grad=True)

    def value() -> Tensor:
        shifted_TE = logits_TE + bias_E
        return balance_loss(shifted_TE, shifted_TE.detach().topk(PER_TOKEN).indices)

    first = float(value().detach())
    for _ in range(60):
        (grad_E,) = torch.autograd.grad(value(), bias_E)
        with torch.no_grad():
            bias_E -= 0.5 * grad_E
    assert first > 1.4
    assert float(value().detach()) < 1.1


def test_the_gradients_are_the_closed_forms_in_float64() -> None:
    logits_TE, picks_TA, mask_T = draw(13, seed=4)
    leaf_TE = logits_TE.double().requires_grad_()
    mask = mask_T.double()[:, None]
    p_TE, f_E = leaf_TE.detach().softmax(-1), expert_load(picks_TA, EXPERTS, mask_T).double()
    (balance_TE,) = torch.autograd.grad(balance_loss(leaf_TE, picks_TA, mask_T), leaf_TE)
    expected_TE = mask / mask.sum() * p_TE * (f_E - (p_TE * f_E).sum(-1, keepdim=True))
    torch.testing.assert_close(balance_TE, expected_TE, rtol=1e-5, atol=1e-8)  # softmax and logsumexp are float32
    (z_TE,) = torch.autograd.grad(z_loss(leaf_TE, mask_T), leaf_TE)
    expected_TE = 2 * mask / mask.sum() * leaf_TE.detach().logsumexp(-1, keepdim=True) * p_TE
    torch.testing.assert_close(z_TE, expected_TE, rtol=1e-5, atol=1e-8)


Routing = tuple[Tensor, Tensor]
SHAPES = st.sampled_from(["random", "all to one pair", "ties", "one expert without tokens"])


@st.composite
def routings(draw_from: st.DrawFn) -> Routing:
    """Logits and the picks that the router makes of them, some of them odd."""
    tokens, shape = draw_from(st.integers(1, 20)), draw_from(SHAPES)
    logits_TE = draw(tokens, seed=draw_from(st.integers(0, 99)))[0]
    if shape == "all to one pair":
        logits_TE[:, [2, 5]] += 50
    elif shape == "ties":
        logits_TE = torch.zeros_like(logits_TE)
    elif shape == "one expert without tokens":
        logits_TE[:, 3] -= 50
    order_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices
    return logits_TE, order_TE[:, :PER_TOKEN].contiguous()


@settings(deadline=None, max_examples=60)
@given(routings(), st.integers(0, 9), st.booleans())
def test_padding_changes_neither_losses_nor_gradients(routing: Routing, padding: int, before: bool) -> None:
    logits_TE, picks_TA = routing
    noise_TE = 9 * draw(max(1, padding), seed=1)[0][:padding]
    noise_TA = torch.zeros((padding, PER_TOKEN), dtype=torch.int64)
    parts = ((noise_TE, noise_TA), (logits_TE, picks_TA)) if before else ((logits_TE, picks_TA), (noise_TE, noise_TA))
    longer_TE, longer_TA = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    mask_T = torch.cat([torch.full((len(part),), part is logits_TE) for part, _ in parts])
    for loss in (balance_loss, lambda logits, _, mask=None: z_loss(logits, mask)):
        plain, padded = logits_TE.clone().requires_grad_(), longer_TE.clone().requires_grad_()
        short, whole = loss(plain, picks_TA), loss(padded, longer_TA, mask_T)
        torch.testing.assert_close(whole, short)
        (grad_plain,), (grad_padded,) = torch.autograd.grad(short, plain), torch.autograd.grad(whole, padded)
        torch.testing.assert_close(grad_padded[mask_T], grad_plain)
        assert not grad_padded[~mask_T].any()


@settings(deadline=None, max_examples=60)
@given(routings())
def test_the_balance_loss_stays_within_its_bounds(routing: Routing) -> None:
    logits_TE, picks_TA = routing
    leaf_TE = logits_TE.clone().requires_grad_()
    loss = balance_loss(leaf_TE, picks_TA)
    (grad_TE,) = torch.autograd.grad(loss, leaf_TE)
    assert 0 <= float(loss.detach()) <= EXPERTS / PER_TOKEN + 1e-4
    assert torch.isfinite(grad_TE).all()
    assert float(grad_TE.sum(-1).abs().max()) < 1e-5  # adding the same to all logits changes nothing
    load_E = expert_load(picks_TA, EXPERTS)
    assert float(load_E.sum()) == pytest.approx(EXPERTS, rel=1e-5)
    collapsed_pair = bool((logits_TE[:, [2, 5]] > 30).all())
    if collapsed_pair:
        assert float(loss.detach()) == pytest.approx(EXPERTS / PER_TOKEN)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 50), st.randoms(use_true_random=False))
def test_balance_by_document_is_that_of_every_document_in_any_order(
    lengths: list[int], seed: int, random: Random
) -> None:
    logits_TE, picks_TA, _ = draw(sum(lengths), seed)
    leaf_TE = logits_TE.clone().requires_grad_()
    whole = balance_by_document(leaf_TE, picks_TA, lengths)
    pieces = list(zip(torch.split(leaf_TE, lengths), torch.split(picks_TA, lengths), strict=True))
    each = sum(len(picks) / sum(lengths) * balance_loss(logits, picks) for logits, picks in pieces)
    assert isinstance(each, Tensor)
    torch.testing.assert_close(whole, each)
    (found,), (expected,) = torch.autograd.grad(whole, leaf_TE), torch.autograd.grad(each, leaf_TE)
    torch.testing.assert_close(found, expected)
    order = list(range(len(lengths)))
    random.shuffle(order)
    mixed = balance_by_document(
        torch.cat([pieces[n][0] for n in order]), torch.cat([pieces[n][1] for n in order]), [lengths[n] for n in order]
    )
    torch.testing.assert_close(mixed, whole)


def test_with_the_load_of_the_step_two_parts_are_balanced_as_one() -> None:
    """Each part is collapsed onto another pair; together they are even, and over both that is what counts."""
    logits_TE = torch.zeros(8, EXPERTS)
    picks_TA = torch.tensor([[0, 1], [2, 3]] * 2 + [[4, 5], [6, 7]] * 2)
    load_E = expert_load(picks_TA, EXPERTS)
    halves = [
        balance_loss(logits_TE[part] + torch.eye(EXPERTS)[picks_TA[part, 0]], picks_TA[part], load_E=load_E)
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert [float(half) for half in halves] == pytest.approx([1.0, 1.0])
    routes = (Route(logits_TE, picks_TA, picks_TA.float()),)
    balance, _ = router_losses(routes, loads_LE=load_E[None])
    torch.testing.assert_close(balance, balance_loss(logits_TE, picks_TA))
    balance, _ = router_losses(routes, lengths=[4, 4])
    torch.testing.assert_close(balance, balance_by_document(logits_TE, picks_TA, [4, 4]))
