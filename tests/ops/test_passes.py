"""The norm and the rotation made for speed equal their specification, forward and backward, and a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.ops import passes, reference

pytestmark = pytest.mark.usefixtures("both_ways")

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(operation: object, leaves: list[Tensor], *rest: object) -> list[Tensor]:
    """The output, then the gradient of every leaf under one random direction."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = operation(*leaves, *rest)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape, seed=9, dtype=out.dtype))]


def distance(value: Tensor, wanted: Tensor) -> float:
    """Relative to the size of what is wanted."""
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    return reference.rope_angles(torch.arange(tokens) * 977, size, 1e6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 256), (3, 4, 32)], ids=str)
def test_the_norm_equals_its_specification(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaves = [random(*shape, dtype=dtype) * 3, random(shape[-1], seed=1, dtype=dtype)]
    fast, plain = (gradients(operation, leaves, 1e-5) for operation in (passes.rms_norm, reference.rms_norm))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert [a.dtype for a in fast] == [b.dtype for b in plain]
    assert distance(fast[0], plain[0]) <= (1e-6 if dtype == torch.float32 else 2e-3)
    # With one channel the output does not depend on the input: both gradients are rounding errors around zero.
    pairs = zip(fast[1:], plain[1:], strict=True) if shape[-1] > 1 else [(fast[2], plain[2])]
    assert max(distance(a, b) for a, b in pairs) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 2), (9, 3, 6), (40, 8, 32)])
def test_the_rotation_equals_its_specification(tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    leaf = random(tokens, heads, size, dtype=dtype)
    fast, plain = (gradients(operation, [leaf], *angles(tokens, size)) for operation in (passes.rope, reference.rope))
    assert [a.dtype for a in fast] == [b.dtype for b in plain]
    limit = 1e-6 if dtype == torch.float32 else 2e-3
    assert max(distance(a, b) for a, b in zip(fast, plain, strict=True)) <= limit


def test_the_norm_equals_a_float64_oracle() -> None:
    x, weight = random(50, 48) * 100, random(48, seed=1)
    grad = random(50, 48, seed=9).double()
    x64 = x.double()
    scale = (x64.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    inner = grad * weight.double()
    wanted = (inner - x64 * scale.square() * (inner * x64).mean(-1, keepdim=True)) * scale
    out, grad_x, grad_weight = gradients(passes.rms_norm, [x, weight], 1e-5)
    assert distance(out, x64 * scale * weight.double()) <= 1e-6
    assert distance(grad_x, wanted) <= 1e-5
    assert distance(grad_weight, (grad * x64 * scale).sum(0)) <= 1e-5


def test_the_rotation_is_undone_by_its_gradient() -> None:
    x = random(20, 4, 8).requires_grad_()
    out = passes.rope(x, *angles(20, 8))
    (back,) = torch.autograd.grad(out, x, out.detach())
    assert distance(back, x.detach()) <= 1e-6


def test_inputs_are_left_alone() -> None:
    x, weight = random(6, 4, 8), random(8, seed=1)
    before = x.clone()
    passes.rms_norm(x, weight, 1e-5)
    passes.rope(x, *angles(6, 8))
    assert torch.equal(x, before)


def test_a_frozen_weight_costs_no_gradient() -> None:
    x, weight = random(6, 8).requires_grad_(), random(8, seed=1)
    passes.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_an_empty_batch_passes() -> None:
    assert passes.rms_norm(random(0, 8), random(8), 1e-5).shape == (0, 8)
    assert passes.rope(random(0, 2, 8), *angles(0, 8)).shape == (0, 2, 8)


def test_a_second_derivative_of_the_norm_is_refused() -> None:
    x = random(6, 8).requires_grad_()
    (grad,) = torch.autograd.grad(passes.rms_norm(x, random(8), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
