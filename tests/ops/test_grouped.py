"""The grouped expert operation equals its specification, forward and backward, and a float64 oracle."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtral import ops
from mixtral.ops import grouped, reference

pytestmark = pytest.mark.usefixtures("both_ways")

ORACLE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "oracles" / "moe.py"))["moe"]
COUNTS = [*range(10), 15, 16, 17, 31, 33, 64, 65, 129]
D, F = 11, 7


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(picks: Tensor, experts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Leaves that want gradients: x, weights, gate_up, down."""
    tokens, choices = picks.shape
    weights = random(tokens, choices, seed=1).softmax(-1).to(dtype)
    made = [
        random(tokens, D, dtype=dtype),
        weights,
        random(experts, 2 * F, D, seed=2, dtype=dtype) / D**0.5,
        random(experts, D, F, seed=3, dtype=dtype) / F**0.5,
    ]
    return [value.requires_grad_() for value in made]


def both(picks: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Output and the four gradients, (grouped, reference) each."""
    results = []
    for operation in (grouped.experts, reference.experts):
        x, weights, gate_up, down = leaves = inputs(picks, experts)
        out = operation(x, picks, weights, gate_up, down)
        seed = random(*out.shape, seed=9)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, seed, allow_unused=True)])
    return [(a, torch.zeros_like(a) if b is None else b) for a, b in zip(*results, strict=True)]


@pytest.fixture(params=[1, 64])
def _multiple(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "row_multiple", lambda numel: request.param)


@pytest.fixture
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts to float32 leave float64 alone, so that finite differences see the formulas and not the rounding."""
    cast = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda value: value if value.dtype == torch.float64 else cast(value), raising=True
    )


def one_choice_each() -> Tensor:
    """Every expert gets its number of COUNTS of the tokens, in mixed order."""
    picks = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    return picks[torch.randperm(len(picks), generator=torch.Generator().manual_seed(0))][:, None]


def several(tokens: int, choices: int, experts: int, unused: tuple[int, ...] = ()) -> Tensor:
    """Different experts per token, some experts never."""
    scores = random(tokens, experts, seed=5)
    scores[:, list(unused)] = -1e9
    return scores.topk(choices).indices


CASES = {
    "all sizes": (one_choice_each(), len(COUNTS)),
    "pairs": (several(200, 2, 8), 8),
    "triples": (several(77, 3, 4), 4),
    "empty experts": (several(90, 2, 8, (0, 3, 7)), 8),
    "one takes all": (torch.full((131, 1), 2), 5),
    "one pair takes all": (torch.tensor([[3, 1]]).expand(131, 2).contiguous(), 5),
    "one token": (torch.tensor([[4, 0]]), 5),
    "every expert": (several(40, 4, 4), 4),
}


@pytest.mark.usefixtures("_multiple")
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_forward_and_backward(name: str) -> None:
    """A5, A6: and experts without tokens get gradients of exact zeros, not None (F7)."""
    picks, experts = CASES[name]
    results = both(picks, experts)
    for found, expected in results:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    used = torch.bincount(picks.reshape(-1), minlength=experts) > 0
    for grad, _ in results[3:]:
        assert torch.equal(grad.flatten(1).abs().amax(1) > 0, used)


@pytest.mark.usefixtures("_double", "_multiple")
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 1, 2), (5, 2, 3), (9, 3, 4)])
def test_gradcheck(tokens: int, choices: int, experts: int) -> None:
    picks = several(tokens, choices, experts)
    leaves = inputs(picks, experts, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w, g, d: grouped.experts(x, picks, w, g, d), leaves)


def test_no_tokens() -> None:
    picks = torch.empty((0, 2), dtype=torch.int64)
    leaves = inputs(picks, 3)
    out = grouped.experts(leaves[0], picks, *leaves[1:])
    assert out.shape == (0, D)
    out.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_router_gradient_through_softmax() -> None:
    """The router's weight gets the gradient that autograd finds through the specification."""
    x, gate = random(60, D), random(6, D, seed=4).requires_grad_()
    gate_up, down = inputs(torch.zeros((1, 1), dtype=torch.int64), 6)[2:]
    grads = []
    for operation in (ops.experts, reference.experts):
        route = ops.route(x, gate, 2)
        out = operation(x, route.picks_TA, route.weights_TA, gate_up, down)
        grads.append(torch.autograd.grad((out * random(60, D, seed=8)).sum(), gate)[0])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)
    assert grads[0].abs().max() > 0.1


@pytest.mark.parametrize("operation", [grouped.experts, reference.experts])
@pytest.mark.parametrize("choices", [1, 2, 3])
def test_whole_layer_equals_the_oracle(operation: object, choices: int) -> None:
    """A1, A5, A6: router and experts, with ties (experts 2 and 5 have equal router rows)."""
    assert callable(operation)
    x, gate = random(120, D), random(8, D, seed=4)
    gate[5] = gate[2]
    gate_up, down = (value.detach() for value in inputs(torch.zeros((1, 1), dtype=torch.int64), 8)[2:])
    route = ops.route(x, gate, choices)
    found = operation(x, route.picks_TA, route.weights_TA, gate_up, down)
    expected = ORACLE(*(value.double().numpy() for value in (x, gate, gate_up, down)), choices)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_swapped_halves_are_another_function() -> None:
    """A5: gate rows come first."""
    picks, experts = CASES["pairs"]
    x, weights, gate_up, down = (value.detach() for value in inputs(picks, experts))
    swapped = gate_up.roll(F, dims=1)
    right, wrong = (grouped.experts(x, picks, weights, matrix, down) for matrix in (gate_up, swapped))
    assert (right - wrong).abs().max() > 0.1


def test_dispatch_order_cannot_change_a_bit() -> None:
    """A7: other expert numbers and the other order of the two choices give the same bits."""
    picks, experts = CASES["pairs"]
    x, weights, gate_up, down = (value.detach() for value in inputs(picks, experts))
    expected = grouped.experts(x, picks, weights, gate_up, down)
    assert torch.equal(grouped.experts(x, picks.flip(1), weights.flip(1), gate_up, down), expected)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(1))
    renamed = torch.argsort(order)[picks]
    assert torch.equal(grouped.experts(x, renamed, weights, gate_up[order], down[order]), expected)


def test_combines_in_float32() -> None:
    """A7: bfloat16 products are weighted and summed in float32 and rounded once."""
    picks, experts = CASES["pairs"]
    x, weights, gate_up, down = (value.detach() for value in inputs(picks, experts))
    x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    out = grouped.experts(x, picks, weights, gate_up, down)
    one = torch.ones(len(x), 1)
    parts = [grouped.experts(x, picks[:, a : a + 1], one, gate_up, down).float() for a in range(2)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (parts[0] * weights[:, :1] + parts[1] * weights[:, 1:]).bfloat16())


def test_bfloat16_gradients_have_the_dtype_of_their_leaves() -> None:
    picks, experts = CASES["empty experts"]
    x, weights, gate_up, down = (value.detach() for value in inputs(picks, experts))
    leaves = [x.bfloat16(), weights, gate_up.bfloat16(), down.bfloat16()]
    exact = [x, weights, gate_up, down]
    for values in (leaves, exact):
        for value in values:
            value.requires_grad_()
        grouped.experts(values[0], picks, *values[1:]).float().pow(2).sum().backward()
    for narrow, wide in zip(leaves, exact, strict=True):
        assert narrow.grad is not None
        assert wide.grad is not None
        assert narrow.grad.dtype == narrow.dtype
        assert (narrow.grad.float() - wide.grad).norm() < 0.03 * wide.grad.norm()


def test_a_broken_token_stays_alone() -> None:
    """Padding repeats no token: NaN in token 0 reaches its own output and the gradients of its own experts alone."""
    picks, experts = CASES["pairs"]
    x, weights, gate_up, down = inputs(picks, experts)
    broken = x.detach().clone()
    broken[0] = torch.nan
    broken.requires_grad_()
    out = grouped.experts(broken, picks, weights, gate_up, down)
    assert torch.isnan(out[0]).all()
    assert torch.equal(out[1:], grouped.experts(x, picks, weights, gate_up, down)[1:])
    grads = torch.autograd.grad(out.sum(), (broken, gate_up, down))
    assert torch.isfinite(grads[0][1:]).all()
    others = [expert for expert in range(experts) if expert not in picks[0].tolist()]
    assert all(torch.isfinite(grad[others]).all() for grad in grads[1:])


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_assign(multiple: int) -> None:
    """Every assignment has its own row, of its expert and token; the rest is padding, within its promise."""
    for picks, experts in CASES.values():
        plan = grouped.assign(picks, experts, multiple)
        places = plan.places_TA.reshape(-1)
        assert len(set(places.tolist())) == picks.numel()
        tokens = torch.arange(len(picks)).repeat_interleave(picks.shape[1])
        assert torch.equal(plan.rows_N[places], tokens)
        assert int((plan.rows_N < 0).sum()) == len(plan.rows_N) - picks.numel()
        end = 0
        for expert, (start, stop) in enumerate(plan.bounds):
            assert start == end
            end = stop
            count, rows = int((picks == expert).sum()), plan.rows_N[start:stop]
            assert rows[:count].tolist() == tokens[picks.reshape(-1) == expert].tolist()
            assert (rows[count:] < 0).all()
            if multiple > 1 and count <= 32:
                assert stop - start == (1 << (count - 1).bit_length() if count else 0)
            else:
                assert (stop - start) % multiple == 0
                assert stop - start - count < multiple
        assert end == len(plan.rows_N)


def test_row_multiple() -> None:
    """Small matrices are padded to few shapes; those of 8x7B not at all."""
    assert grouped.row_multiple(512 * 256) == 64
    assert grouped.row_multiple(2 * 14336 * 4096) == 1


@st.composite
def choices_of_tokens(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Picks as a router makes them: spread, all to the same experts, of equal scores, or with experts left out."""
    tokens, experts = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    choices = draw(st.integers(1, experts))
    scores = random(tokens, experts, seed=draw(st.integers(0, 99)))
    shape = draw(st.sampled_from(["spread", "same", "equal", "left out"]))
    if shape == "same":
        scores[:] = scores[:1]
    elif shape == "equal":
        scores[:] = 0
    elif shape == "left out":
        scores[:, : experts - choices] -= 100
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :choices].contiguous(), experts


@settings(deadline=None, max_examples=60)
@given(choices_of_tokens())
def test_equals_reference_for_any_choice(made: tuple[Tensor, int]) -> None:
    picks, experts = made
    for found, expected in both(picks, experts):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    *_, gate_up, down = both(picks, experts)
    unused = [expert for expert in range(experts) if expert not in picks]
    assert not gate_up[0][unused].any()
    assert not down[0][unused].any()
