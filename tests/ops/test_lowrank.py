"""Low-rank pairs and chosen slices in the expert operation: values and gradients, and what is never built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral import ops
from mixtral.ops import grouped, reference

pytestmark = pytest.mark.usefixtures("both_ways")

D, F, E, R = 11, 7, 6, 3
SCALE = 0.7


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def picks_of(tokens: int, unused: tuple[int, ...] = (), choices: int = 2) -> Tensor:
    scores = random(tokens, E, seed=5)
    scores[:, list(unused)] = -1e9
    return scores.topk(choices).indices


def leaves_of(picks: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weights, and a and b of either pair."""
    tokens, choices = picks.shape
    made = [
        random(tokens, D, dtype=dtype),
        random(tokens, choices, seed=1).softmax(-1).to(dtype),
        random(E, R, D, seed=6, dtype=dtype) / D**0.5,
        random(E, 2 * F, R, seed=7, dtype=dtype),
        random(E, R + 1, F, seed=8, dtype=dtype) / F**0.5,
        random(E, D, R + 1, seed=9, dtype=dtype),
    ]
    return [value.requires_grad_() for value in made]


def bases(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random(E, 2 * F, D, seed=2, dtype=dtype) / D**0.5, random(E, D, F, seed=3, dtype=dtype) / F**0.5


def pairs_of(factors: list[Tensor]) -> tuple[ops.Pair, ops.Pair]:
    return ops.Pair(factors[0], factors[1], SCALE), ops.Pair(factors[2], factors[3], 2 * SCALE)


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts to float32 leave float64 alone, so that finite differences see the formulas and not the rounding."""
    cast = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda value: value if value.dtype == torch.float64 else cast(value), raising=True
    )


CASES = {
    "pairs": picks_of(200),
    "three": picks_of(77, choices=3),
    "empty experts": picks_of(90, (0, 3)),
    "one takes all": torch.full((131, 1), 2),
    "one token": torch.tensor([[4, 0]]),
}


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("which", ["both", "gate_up", "down"])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_and_multiplied_out_weights(
    name: str, which: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and all gradients; experts without tokens get zeros, not None."""
    monkeypatch.setattr(grouped, "row_multiple", lambda numel: multiple)
    picks, (gate_up, down) = CASES[name], bases()
    results = []
    for way in ("grouped", "reference", "weights"):
        x, weights, *factors = leaves = leaves_of(picks)
        first, second = pairs_of(factors)
        pairs = (first if which != "down" else None, second if which != "gate_up" else None)
        if way == "grouped":
            out = grouped.experts(x, picks, weights, gate_up, down, pairs=pairs)
        elif way == "reference":
            out = reference.experts(x, picks, weights, gate_up, down, pairs=pairs)
        else:
            whole = [
                base if pair is None else base + pair.scale * pair.b_EOR @ pair.a_ERI
                for base, pair in zip((gate_up, down), pairs, strict=True)
            ]
            out = reference.experts(x, picks, weights, *whole)
        grads = torch.autograd.grad(out, leaves, random(*out.shape, seed=10), allow_unused=True)
        results.append(
            [out.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(leaves, grads, strict=True))]
        )
    for found, *expected in zip(*results, strict=True):
        for value in expected:
            torch.testing.assert_close(found, value, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(seed: int) -> None:
    """Numbers of experts, widths, ranks and choices drawn anew."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    experts, width, hidden, tokens = draw(2, 9), draw(1, 20), draw(1, 20), draw(1, 150)
    choices, ranks = draw(1, min(3, experts)), (draw(1, 9), draw(1, 9))
    gate_up, down = values(experts, 2 * hidden, width), values(experts, width, hidden)
    shapes = [(ranks[0], width), (2 * hidden, ranks[0]), (ranks[1], hidden), (width, ranks[1])]
    factors = [values(experts, *shape) for shape in shapes]
    picks = values(tokens, experts).topk(choices).indices
    leaves = [values(tokens, width), values(tokens, choices), *factors, gate_up, down]
    seed_TD, results = values(tokens, width).detach(), []
    for operation in (grouped.experts, reference.experts):
        out = operation(leaves[0], picks, leaves[1], gate_up, down, pairs=pairs_of(factors))
        grads = torch.autograd.grad(out, leaves, seed_TD, allow_unused=True)
        zeros = [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, grads, strict=True)]
        results.append([out.detach(), *zeros])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradcheck(dropout: float) -> None:
    """With dropout the same inputs are left out again in every call."""
    experts, width, hidden, rank = 3, 3, 2, 2
    picks = torch.tensor([[0, 2], [2, 1], [0, 1]])
    gate_up, down = random(experts, 2 * hidden, width), random(experts, width, hidden, seed=1)
    shapes = [(rank, width), (2 * hidden, rank), (rank, hidden), (width, rank)]
    factors = [random(experts, *shape, seed=2 + i) for i, shape in enumerate(shapes)]
    leaves = [value.requires_grad_() for value in (random(3, width, seed=7), random(3, 2, seed=8), *factors)]

    def call(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return grouped.experts(x, picks, weights, gate_up, down, pairs=pairs_of(list(factors)), dropout=dropout)

    assert torch.autograd.gradcheck(call, leaves)


def test_dropout_keeps_the_mean_and_spares_the_base() -> None:
    """On the linear part: a pair of ``down`` alone, whose mean over draws is the value without dropout."""
    picks, (gate_up, down) = picks_of(40), bases()
    x, weights, *factors = (value.detach() for value in leaves_of(picks))
    pair = pairs_of(factors)[1]

    def run(some: ops.Pair | None, dropout: float = 0.0) -> Tensor:
        return grouped.experts(x, picks, weights, gate_up, down, pairs=(None, some), dropout=dropout)

    torch.manual_seed(0)
    draws = torch.stack([run(pair, 0.3) for _ in range(600)])
    base, exact = run(None), run(pair)
    assert torch.equal(run(None, 0.3), base)
    error = (draws.mean(0) - exact).norm() / (exact - base).norm()
    assert error < 0.06
    assert (draws[0] - exact).norm() > 0.1 * (exact - base).norm()


def test_gradients_of_chosen_slices_alone() -> None:
    """ESFT: those of the whole tensors, for the chosen experts; nobody computes the others."""
    picks = CASES["empty experts"]
    x, weights = (value.detach().requires_grad_() for value in leaves_of(picks)[:2])
    whole = [base.requires_grad_() for base in bases()]
    seed = random(len(picks), D, seed=10)
    expected = torch.autograd.grad(grouped.experts(x, picks, weights, *whole), (x, weights, *whole), seed)
    stacked = [base.detach() for base in whole]
    chosen = (0, 1, 4)  # 0 has no tokens
    slices = {e: (stacked[0][e].requires_grad_(), stacked[1][e].requires_grad_()) for e in chosen}
    out = grouped.experts(x, picks, weights, stacked[0], stacked[1], slices=slices)
    leaves = [x, weights, *(slices[e][0] for e in chosen), *(slices[e][1] for e in chosen)]
    found = torch.autograd.grad(out, leaves, seed)
    wanted = [*expected[:2], *(expected[2][e] for e in chosen), *(expected[3][e] for e in chosen)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert not found[2].any()


class _Sizes(TorchDispatchMode):
    """The sizes of all tensors that any operation gives back, those inside the backward pass too; of memory that was
    there before, such as the weights, nothing counts."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {value.untyped_storage().data_ptr() for value in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(value.numel())
        return result


def largest(*, multiplied_out: bool) -> int:
    """The largest tensor that forward and backward make, for matrices that are much larger than the rows."""
    width, hidden, tokens = 96, 160, 8
    gate_up, down = random(E, 2 * hidden, width, dtype=torch.float32), random(E, width, hidden, dtype=torch.float32)
    x = random(tokens, width, dtype=torch.float32).requires_grad_()
    a1, b1 = random(E, R, width, dtype=torch.float32), random(E, 2 * hidden, R, dtype=torch.float32)
    a2, b2 = random(E, R, hidden, dtype=torch.float32), random(E, width, R, dtype=torch.float32)
    factors = [value.requires_grad_() for value in (a1, b1, a2, b2)]
    picks = picks_of(tokens)
    weights = torch.full((tokens, 2), 0.5)
    pairs = pairs_of(factors)
    with _Sizes(gate_up, down) as made:
        if multiplied_out:
            whole = [w + p.scale * p.b_EOR @ p.a_ERI for w, p in zip((gate_up, down), pairs, strict=True)]
            out = grouped.experts(x, picks, weights, whole[0], whole[1])
        else:
            out = grouped.experts(x, picks, weights, gate_up, down, pairs=pairs)
        out.pow(2).sum().backward()
    assert all(factor.grad is not None for factor in factors)
    return max(made.sizes)


def test_no_sum_of_weights_and_no_dense_gradient_is_made() -> None:
    """Nothing as large as one expert's matrix, while multiplying out makes all experts'."""
    assert largest(multiplied_out=False) < 96 * 160
    assert largest(multiplied_out=True) == E * 320 * 96
