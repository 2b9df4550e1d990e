"""A and B of correctness: routing, norms, rotary positions and attention against float64 and against other formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtral.ops import attention, rms_norm, rope, rope_angles, route

THETA = 1e6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def routed(logits: list[list[float]], per_token: int = 2) -> tuple[list[list[int]], Tensor]:
    """Picks and weights for given logits: the router matrix is the identity."""
    result = route(torch.tensor(logits), torch.eye(len(logits[0])), per_token)
    return result.picks_TA.tolist(), result.weights_TA


def test_route_equals_softmax_topk_renormalise() -> None:
    """A1: the published form; the form without renormalisation is another function."""
    x, gate = random(500, 24), random(8, 24, seed=1)
    found = route(x, gate, 2)
    top, picks = (x @ gate.T).softmax(-1).topk(2)
    assert torch.equal(found.picks_TA, picks)
    torch.testing.assert_close(found.weights_TA, top / top.sum(-1, keepdim=True), atol=1e-6, rtol=0)
    assert (found.weights_TA - top).abs().max() > 0.05
    assert found.picks_TA.dtype == torch.int64
    assert found.picks_TA.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_route_computes_in_float32(dtype: torch.dtype) -> None:
    """A1: the product is one of float32 numbers, whatever the hidden states are."""
    x, gate = random(64, 200).to(dtype), random(8, 200, seed=1)
    found = route(x, gate, 2)
    exact = x.double() @ gate.double().T
    assert found.logits_TE.dtype == found.weights_TA.dtype == torch.float32
    assert (found.logits_TE - exact).abs().max() < 1e-4
    assert ((x @ gate.to(dtype).T).double() - exact).abs().max() > 1e-3


@pytest.mark.parametrize("gap", [104.0, 200.0, 1e30])
def test_route_survives_gaps_that_underflow_a_softmax(gap: float) -> None:
    """A2: among probabilities everything but the first expert is zero."""
    logits = [gap, 0.0, 1.0, -1.0, -2.0, 0.5, 0.0, -3.0]
    picks, weights = routed([logits, logits[::-1]])
    assert picks == [[0, 2], [7, 5]]
    assert weights[0].tolist() == [1.0, pytest.approx(math.exp(1 - gap), abs=1e-45)]
    assert routed([logits], 3)[0] == [[0, 2, 5]]


def test_route_ties_go_to_the_lower_expert() -> None:
    """A1, A2."""
    rows = [[0.0] * 8, [0, 1, 0, 1, 0, 1, 0, 1], [2, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 2], [-5.0] * 8]
    picks, weights = routed([[float(value) for value in row] for row in rows])
    assert picks == [[0, 1], [1, 3], [0, 1], [7, 0], [0, 1]]
    assert weights[:2].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    many = torch.zeros(3, 64)
    assert route(many, torch.zeros(64, 64), 4).picks_TA.tolist() == [[0, 1, 2, 3]] * 3


def test_route_of_all_experts_and_of_one() -> None:
    x, gate = random(9, 5), random(4, 5, seed=1)
    assert route(x, gate, 1).weights_TA.tolist() == [[1.0]] * 9
    every = route(x, gate, 4)
    torch.testing.assert_close(every.weights_TA, every.logits_TE.softmax(-1).sort(-1, descending=True).values)


def test_rms_norm_equals_float64_with_eps_inside_the_root() -> None:
    """A8: rows around the size where eps matters, and a row of zeros."""
    x = random(40, 33) * torch.logspace(-6, 3, 40)[:, None]
    x[7] = 0
    weight = random(33, seed=1)
    wide = x.double()
    expected = weight.double() * wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=1e-6, rtol=1e-6)
    outside = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5)
    assert (expected - outside).abs().max() > 0.1
    assert rms_norm(x, weight, 1e-5)[7].abs().max() == 0


def test_rms_norm_casts_before_it_scales() -> None:
    """A8: normalise in float32, cast, then multiply: other bits than multiplying first."""
    x, weight = random(50, 64).bfloat16(), random(64, seed=1).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, weight * normed.bfloat16())
    assert not torch.equal(found, (weight.float() * normed).bfloat16())


@pytest.mark.parametrize(("last", "bound"), [(4095, 3.2e-4), (32767, 2.6e-3), (65535, 5.2e-3)])
def test_rope_angles_against_float64(last: int, bound: float) -> None:
    """B5: float32 frequencies times float32 positions: two roundings and that of the power, at every position."""
    positions = torch.arange(last % 5, last + 1, 5)
    assert positions[-1] == last
    cos, sin = rope_angles(positions, 128, THETA)
    assert cos.dtype == sin.dtype == torch.float32
    exact = positions.double()[:, None] * THETA ** (-torch.arange(0, 128, 2).double() / 128)
    turned = torch.atan2(sin.double(), cos.double()) - exact
    error = (torch.remainder(turned + math.pi, 2 * math.pi) - math.pi).abs()
    assert error.max() < bound
    assert (error <= 2.4e-7 * exact + 2e-7).all()


def test_rope_angles_do_not_depend_on_the_chunk() -> None:
    """B5, B7: bitwise, for any chunking."""
    whole = torch.stack(rope_angles(torch.arange(3000), 20, THETA))
    for size in (1, 7, 64, 999):
        chunks = torch.arange(3000).split(size)
        parts = [torch.stack(rope_angles(chunk, 20, THETA)) for chunk in (chunks if size > 1 else chunks[::50])]
        expected = whole if size > 1 else whole[:, ::50]
        assert torch.equal(torch.cat(parts, dim=1), expected)


def test_rope_pairs_the_halves() -> None:
    """B1: element i with element i + K/2, as a complex rotation; not neighbours."""
    x, positions = random(30, 3, 10), torch.arange(30) * 7
    found = rope(x, *rope_angles(positions, 10, 100.0))
    turn = torch.exp(1j * positions.double()[:, None] * 100.0 ** (-torch.arange(0, 10, 2).double() / 10))[:, None, :]

    def rotated(first: Tensor, second: Tensor) -> Tensor:
        return torch.complex(first.double(), second.double()) * turn

    half = rotated(x[..., :5], x[..., 5:])
    torch.testing.assert_close(found.double(), torch.cat((half.real, half.imag), -1), atol=1e-4, rtol=0)
    near = rotated(x[..., ::2], x[..., 1::2])
    assert (found - torch.stack((near.real, near.imag), -1).flatten(-2)).abs().max() > 0.5
    assert rope(x.bfloat16(), *rope_angles(positions, 10, 100.0)).dtype == torch.bfloat16


def test_rope_products_depend_on_the_distance_alone() -> None:
    q, k = random(1, 1, 16).expand(50, 1, 16), random(1, 1, 16, seed=1).expand(50, 1, 16)
    products = []
    for shift in (0, 300):
        positions = torch.arange(50) + shift
        turned = rope(q, *rope_angles(positions + 11, 16, THETA)) * rope(k, *rope_angles(positions, 16, THETA))
        products.append(turned.sum(-1))
    torch.testing.assert_close(products[0], products[0][:1].expand(50, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(products[0], products[1], atol=1e-4, rtol=0)
    other = rope(q, *rope_angles(torch.arange(50) + 12, 16, THETA)) * rope(k, *rope_angles(torch.arange(50), 16, THETA))
    assert (other.sum(-1) - products[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("new", "seen"), [(1, 1), (1, 9), (5, 5), (3, 9), (2, 3), (64, 130), (70, 70)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (5, 1)])
def test_attention_equals_a_loop_in_float64(new: int, seen: int, heads: int, groups: int) -> None:
    q, k, v = random(new, heads, 6), random(seen, groups, 6, seed=1), random(seen, groups, 6, seed=2)
    found = attention(q, k, v)
    for t in range(new):
        visible = seen - new + t + 1
        for head in range(heads):
            group = head // (heads // groups)
            scores = k[:visible, group].double() @ q[t, head].double() / math.sqrt(6)
            expected = scores.softmax(0) @ v[:visible, group].double()
            torch.testing.assert_close(found[t, head].double(), expected, atol=1e-5, rtol=0)
