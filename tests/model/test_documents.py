"""Packed documents: every document is computed as if it were alone, forward and backward."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from mixtral.model import Batch, Documents, Mixtral
from mixtral.ops import attention

LENGTHS = {
    "one token": [1],
    "mixed": [5, 200, 1, 32, 33, 48, 49, 64, 65, 1, 97, 129, 2],
    "equal": [40] * 6,
    "random": [random.Random(0).randint(1, 200) for _ in range(25)],
    "plain and fused": [383, 20, 384, 385, 700, 257, 1],
    "every padding": [31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129],
}


def qkv(tokens: int, heads: int = 4, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn((tokens, count, 6), generator=generator).requires_grad_() for count in (heads, groups, groups)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (3, 1)])
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_attention_per_document(name: str, heads: int, groups: int) -> None:
    """F10: forward and gradients of q, k and v."""
    lengths = LENGTHS[name]
    parts = qkv(sum(lengths), heads, groups)
    found = Documents(lengths).attend(0, *parts)
    expected = torch.cat([attention(*one) for one in zip(*(part.split(lengths) for part in parts), strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for gradient, wanted in zip(
        torch.autograd.grad(found, parts, seed), torch.autograd.grad(expected, parts, seed), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LENGTHS)
def test_positions_restart(name: str) -> None:
    """B7."""
    lengths = LENGTHS[name]
    documents = Documents(lengths)
    assert documents.positions_T.tolist() == [place for length in lengths for place in range(length)]
    assert documents.positions_T.dtype == torch.int64
    assert documents.total == sum(lengths)


@pytest.mark.parametrize("name", ["mixed", "plain and fused"])
def test_one_document_never_reaches_another(name: str) -> None:
    """F10: NaN in one document stays there, and its neighbours' gradients through it are exactly zero."""
    lengths = LENGTHS[name]
    documents = Documents(lengths)
    for broken in range(len(lengths)):
        parts = [part.detach() for part in qkv(sum(lengths))]
        for part in parts:
            part.split(lengths)[broken].fill_(torch.nan)
        wrong = [bool(torch.isnan(out).any()) for out in documents.attend(0, *parts).split(lengths)]
        assert wrong == [number == broken for number in range(len(lengths))]
    parts = qkv(sum(lengths))
    outs = documents.attend(0, *parts).split(lengths)
    for number in range(len(lengths)):
        # Through v: a lone token's q and k have no gradient at all.
        gradient = torch.autograd.grad(outs[number].sum(), parts[2], retain_graph=True)[0].split(lengths)
        assert [bool(part.any()) for part in gradient] == [other == number for other in range(len(lengths))]


def test_a_model_over_packed_documents_equals_each_alone(tiny_model: Mixtral) -> None:
    """F10: hidden states, and the summed gradients of all parameters."""
    lengths = [37, 1, 90, 12, 64]
    ids = torch.tensor(random.Random(1).choices(range(320), k=sum(lengths)))

    def run(ids: Tensor, lengths: list[int]) -> Tensor:
        documents = Documents(lengths)
        hidden: Tensor = tiny_model(Batch(ids, documents.positions_T, documents)).hidden_TD
        return hidden

    parameters = list(tiny_model.model.parameters())
    packed = run(ids, lengths)
    alone = torch.cat([run(part, [len(part)]) for part in ids.split(lengths)])
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=0)
    seed = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(
        torch.autograd.grad(packed, parameters, seed), torch.autograd.grad(alone, parameters, seed), strict=True
    ):
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_changed_token_changes_its_document_from_there_on(tiny_model: Mixtral) -> None:
    """F10: the token's document from the token on, and nothing else."""
    lengths = [30, 50, 40]
    documents = Documents(lengths)
    ids = torch.tensor(random.Random(2).choices(range(320), k=120))
    other = ids.clone()
    other[45] = (ids[45] + 1) % 320
    with torch.inference_mode():
        hidden = [tiny_model(Batch(tokens, documents.positions_T, documents)).hidden_TD for tokens in (ids, other)]
    change = (hidden[0] - hidden[1]).abs().amax(1)
    assert change[:45].max() < 1e-4
    assert change[45:80].min() > 1e-3
    assert change[80:].max() < 1e-4


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2], [4, -1]])
def test_refuses_empty_documents(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one, each at least 1"):
        Documents(lengths)
