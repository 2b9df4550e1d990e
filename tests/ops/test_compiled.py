"""Compiled passes of training: gradients against float64 autograd, on every instruction set, for both dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral import ops
from mixtral.model import Documents
from mixtral.ops import compiled, native, reference

DTYPES = (torch.float32, torch.bfloat16)
# (query heads, key heads, head size, lengths of the documents): tiles that end anywhere, blocks of several lengths.
HEADS = [
    (8, 4, 32, (1, 5, 63, 64, 65, 200, 131)),
    (4, 2, 8, (3, 17, 40)),
    (32, 8, 128, (100, 1, 33)),
    (6, 2, 80, (70, 71)),
    (3, 3, 20, (130,)),
    (2, 1, 16, (700,)),
]


@pytest.fixture(params=native.kernel_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "level", lambda: request.param)
    return str(request.param)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, *, factor: float = 1.0) -> None:
    """The largest difference, as a part of the largest value: a bfloat16 is rounded to one of 256 steps."""
    limit = factor * (5e-6 if dtype == torch.float32 else 8e-3)
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= limit * max(1e-20, float(wanted.abs().max()))


def agrees(own: Callable[..., Tensor], wanted: Callable[..., Tensor], *inputs: Tensor, factor: float = 1.0) -> None:
    """Result and gradients of ``own`` are those of ``wanted`` in float64."""
    dtype = inputs[0].dtype
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    out, expected = own(*mine), wanted(*exact)
    assert out.dtype == dtype
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    close(out.detach(), expected.detach(), dtype, factor=factor)
    for x, y in zip(mine, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        close(x.grad, y.grad, dtype, factor=factor)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Document by document, with all scores."""
    outs = []
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    for queries, keys, values in parts:
        many = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(many, 1).transpose(0, 1) for x in (keys, values))
        scores = queries.transpose(0, 1) @ keys.mT * q.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        outs.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


def heads(case: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    queries, keys, size, lengths = case
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn((sum(lengths), n, size), generator=generator).to(dtype) for n in (queries, keys, keys)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HEADS)
def test_attention_inside_documents(
    level: str, case: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype
) -> None:
    lengths = case[3]
    agrees(
        lambda q, k, v: compiled.document_attention(q, k, v, lengths),
        lambda q, k, v: attention(q, k, v, lengths),
        *heads(case, dtype),
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def run() -> list[Tensor]:
        inputs = [x.requires_grad_() for x in heads(HEADS[0], torch.bfloat16)]
        out = compiled.document_attention(*inputs, HEADS[0][3])
        out.float().square().sum().backward()
        return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]

    expected = run()
    monkeypatch.setattr(native, "threads", lambda: threads)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_other_documents_change_no_bit() -> None:
    q, k, v = heads(HEADS[0], torch.bfloat16)
    together = compiled.document_attention(q, k, v, HEADS[0][3])
    some = slice(6, 69)  # the third one
    assert torch.equal(together[some], compiled.document_attention(q[some], k[some], v[some], [63]))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    inputs = [(60 * x).requires_grad_() for x in heads((2, 1, 16, (40,)), torch.float32)]
    out = compiled.document_attention(*inputs, [40])
    close(out.detach(), attention(*(x.detach().double() for x in inputs), (40,)), torch.float32, factor=50)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def test_what_is_not_a_number_stays_in_its_document() -> None:
    q, k, v = heads(HEADS[0], torch.float32)
    v[6 + 10] = torch.nan
    out = compiled.document_attention(q, k, v, HEADS[0][3])
    assert out[6 + 10 : 69].isnan().all()
    assert out[:6].isfinite().all()
    assert out[69:].isfinite().all()


def test_the_context_of_documents_has_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(HEADS[0], torch.float32)
    fast = Documents(HEADS[0][3]).attend(0, q, k, v)
    monkeypatch.setattr("mixtral.model.documents.is_compiled", lambda *tensors: False)
    torch.testing.assert_close(Documents(HEADS[0][3]).attend(0, q, k, v), fast)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (130, 256), (70, 33)])
def test_norms(level: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = (1 + 0.2 * torch.randn(shape[1], generator=generator)).to(dtype)
    agrees(lambda x, w: compiled.rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), x, weight, factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (50, 3, 32), (9, 2, 20)])
def test_rotation(level: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    angles = reference.rope_angles(torch.arange(shape[0]) * 7, shape[2], 1e4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = [angle.double() for angle in angles]
    agrees(lambda x: compiled.rope(x, *angles), lambda x: reference.rope(x, *exact), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 33, 300])
@pytest.mark.parametrize("copies", [1, 500])
def test_loss(level: str, columns: int, copies: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    scores = (3 * torch.randn((40, columns), generator=generator)).to(dtype)
    labels = torch.randint(0, max(1, columns - 1), (40,), generator=generator)
    weights = torch.rand(40, generator=generator)
    exact = scores.double().requires_grad_()
    more = torch.zeros(columns, dtype=torch.float64)
    more[-1] = torch.tensor(copies, dtype=torch.float64).log()
    logprobs = (exact + more).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (-(logprobs * weights).sum()).backward()
    found = torch.empty(40)
    untouched = scores.clone()
    compiled.call("train_loss", untouched, labels, weights, float(more[-1]), found, False)
    assert torch.equal(untouched, scores)
    compiled.call("train_loss", scores, labels, weights, float(more[-1]), found, True)
    torch.testing.assert_close(found.double(), logprobs.detach(), rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(scores.double(), exact.grad, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_score_that_is_not_a_number_is_seen() -> None:
    found = torch.empty(2)
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 2.0, 1.0]])
    compiled.call("train_loss", scores, torch.tensor([0, 1]), torch.ones(2), 0.0, found, True)
    assert found[0].isnan()
    assert found[1].isfinite()


HEAD = torch.zeros((4, 2, 8))
ROWS = torch.zeros((4, 8))
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "lengths": ("document_attention", (HEAD, HEAD, HEAD, [3], HEAD, torch.zeros((4, 2))), "add up to the tokens"),
    "an empty document": ("document_attention", (HEAD, HEAD, HEAD, [0, 4], HEAD, torch.zeros((4, 2))), "be positive"),
    "heads": ("document_attention", (HEAD, torch.zeros((4, 3, 8)), HEAD, [4], HEAD, torch.zeros((4, 2))), "multiple"),
    "dtypes": ("document_attention", (HEAD, HEAD, HEAD.bfloat16(), [4], HEAD, torch.zeros((4, 2))), "type of q"),
    "a column": ("train_loss", (ROWS, torch.tensor([0, 1, 8, 2]), torch.zeros(4), 0.0, torch.zeros(4), True), "column"),
    "a row": ("train_sort", (ROWS, torch.tensor([0, 4]), torch.zeros((2, 8))), "row that is not there"),
    "a place": ("train_combine", (ROWS, torch.tensor([[0, -1]]), None, torch.zeros((1, 8))), "row that is not there"),
    "sizes": ("train_gate", (ROWS, torch.zeros((4, 5))), r"out must be \[4, 4\]"),
    "a weight": ("train_norm", (ROWS, torch.zeros(7), 1e-5, ROWS, torch.zeros(4)), "weight must have 8 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    operation, values, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        compiled.call(operation, *values)


def test_angles_of_another_dtype_are_torchs() -> None:
    x, angles = torch.randn(5, 2, 8), reference.rope_angles(torch.arange(5), 8, 1e4)
    found = ops.rope(x, *(angle.bfloat16() for angle in angles))
    torch.testing.assert_close(found, reference.rope(x, *(angle.bfloat16() for angle in angles)))


def test_only_tensors_of_one_kind_are_taken() -> None:
    x = torch.zeros(2)
    assert compiled.is_compiled(x, x)
    assert compiled.is_compiled(x.bfloat16())
    assert not compiled.is_compiled(x, x.bfloat16())
    assert not compiled.is_compiled(x.double())
    assert not compiled.is_compiled(x.to("meta"))
