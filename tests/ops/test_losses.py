"""The fused cross entropy equals the plain one on whole logits, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.ops import head_cross_entropy, losses, reference

pytestmark = pytest.mark.usefixtures("both_ways")

D, R = 9, 33
# Parts of one block of 128, its exact end, one token more, two and a bit.
TOKENS = [1, 70, 128, 129, 256, 300]


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CACHED_SCORES", 64 * R)
    monkeypatch.setattr(losses, "_FEWEST_ROWS", 128)


def case(tokens: int, rows: int = R) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head that want gradients; labels; weights, a third of them 0."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn((tokens, D), generator=generator)
    head = torch.randn((rows, D), generator=generator)
    labels = torch.randint(0, rows - 1, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) / tokens
    weights[torch.rand(tokens, generator=generator) < 0.33] = 0
    weights[0] = 1 / tokens
    return hidden.requires_grad_(), head.requires_grad_(), labels, weights


@pytest.mark.parametrize("copies", [1, 2, 700])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_cross_entropy_over_the_expanded_vocabulary(tokens: int, copies: int) -> None:
    """The last row stands for equal rows of the whole vocabulary: same loss, and gradients summed over the copies."""
    hidden, head, labels, weights = case(tokens)
    loss, logprobs = head_cross_entropy(hidden, head, labels, weights, copies_of_last=copies)
    found = torch.autograd.grad(3.0 * loss, (hidden, head))

    whole = torch.cat((head[:-1], head[-1:].expand(copies, D))).double()
    losses = F.cross_entropy(hidden.double() @ whole.T, labels, reduction="none")
    expected_loss = (losses * weights).sum()
    expected = torch.autograd.grad(3.0 * expected_loss, (hidden, head))

    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logprobs.double(), -losses, atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=2e-7, rtol=2e-5)
    assert not found[0][weights == 0].any()


def test_the_last_row_may_be_the_label_of_a_plain_vocabulary() -> None:
    hidden, head, _, weights = case(50)
    labels = torch.full((50,), R - 1)
    loss, _ = head_cross_entropy(hidden, head, labels, weights)
    expected = (F.cross_entropy(hidden @ head.T, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)


def test_dtypes_and_what_carries_gradients() -> None:
    hidden, head, labels, weights = case(20)
    loss, logprobs = head_cross_entropy(hidden.bfloat16(), head.bfloat16(), labels, weights)
    assert loss.dtype == logprobs.dtype == torch.float32
    assert loss.shape == ()
    assert loss.requires_grad
    assert not logprobs.requires_grad


def test_bfloat16_leaves() -> None:
    """Gradients come back in the leaves' dtype and near those of float32."""
    hidden, head, labels, weights = case(2100)
    narrow = [value.detach().bfloat16().requires_grad_() for value in (hidden, head)]
    wide = [value.detach().float().requires_grad_() for value in narrow]
    for leaves in (narrow, wide):
        head_cross_entropy(leaves[0], leaves[1], labels, weights)[0].backward()
    for a, b in zip(narrow, wide, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.float() - b.grad).norm() < 0.02 * b.grad.norm()


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing(frozen: str) -> None:
    hidden, head, labels, weights = case(2100)
    whole, _ = head_cross_entropy(hidden, head, labels, weights)
    expected = dict(zip(("hidden", "head"), torch.autograd.grad(whole, (hidden, head)), strict=True))
    leaves = {
        "hidden": hidden.detach().requires_grad_(frozen == "head"),
        "head": head.detach().requires_grad_(frozen == "hidden"),
    }
    loss, _ = head_cross_entropy(leaves["hidden"], leaves["head"], labels, weights)
    assert torch.equal(loss, whole)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    head = torch.eye(2).requires_grad_()
    loss, logprobs = head_cross_entropy(hidden, head, torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
    assert logprobs.tolist() == [0.0, -1000.0]
    assert loss.item() == 500.0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0, 0.0], [-0.5, 0.5]]


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels, weights = case(20)
    wanted, _ = head_cross_entropy(hidden, head, labels, weights)
    monkeypatch.setattr(torch, "mm", None)  # makes the gradient of the hidden states
    with torch.no_grad():
        assert torch.equal(head_cross_entropy(hidden, head, labels, weights)[0], wanted)
    with pytest.raises(TypeError):
        head_cross_entropy(hidden, head, labels, weights)


def test_a_second_derivative_is_refused() -> None:
    hidden, head, labels, weights = case(20)
    loss, _ = head_cross_entropy(hidden, head, labels, weights)
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("copies", [1, 700])
def test_equals_its_specification(copies: int) -> None:
    hidden, head, labels, weights = case(300)
    results = []
    for operation in (head_cross_entropy, reference.head_cross_entropy):
        loss, logprobs = operation(hidden, head, labels, weights, copies_of_last=copies)
        results.append([loss.detach(), logprobs.detach(), *torch.autograd.grad(loss, (hidden, head))])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-4)
