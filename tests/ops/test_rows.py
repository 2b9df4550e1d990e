"""``gather_rows`` equals plain indexing with autograd's scatter-add, -1 rows included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral.ops import gather_rows


def indices(rows: int, taken: int, empty: int) -> tuple[Tensor, Tensor]:
    """``taken`` different rows of ``rows`` and ``empty`` rows of zeros, in mixed order; and the inverse."""
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.cat((torch.randperm(rows, generator=generator)[:taken], torch.full((empty,), -1)))
    index = chosen[torch.randperm(taken + empty, generator=generator)]
    inverse = torch.full((rows,), -1)
    for place, row in enumerate(index.tolist()):
        if row >= 0:
            inverse[row] = place
    return index, inverse


@pytest.mark.parametrize("tail", [(), (3,), (2, 5)])
@pytest.mark.parametrize(("rows", "taken", "empty"), [(1, 1, 0), (9, 9, 0), (9, 9, 4), (9, 5, 0), (9, 5, 7), (4, 0, 3)])
def test_equals_index_select(rows: int, taken: int, empty: int, tail: tuple[int, ...]) -> None:
    index, inverse = indices(rows, taken, empty)
    generator = torch.Generator().manual_seed(1)
    source = torch.randn((rows, *tail), generator=generator, dtype=torch.float64, requires_grad=True)
    found = gather_rows(source, index, inverse)
    expected = torch.cat((source, source.new_zeros((1, *tail)))).index_select(0, index % (rows + 1))
    assert torch.equal(found, expected)
    seed = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad(out, source, seed)[0] for out in (found, expected)]
    assert torch.equal(grads[0], grads[1])
    assert torch.autograd.gradcheck(lambda value: gather_rows(value, index, inverse), source)


def test_there_and_back() -> None:
    index, inverse = indices(50, 50, 20)
    source = torch.randn((50, 4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(gather_rows(gather_rows(source, index, inverse), inverse, index), source)
