"""The page allocator: no page lost, none owned twice, nothing half done."""

from __future__ import annotations

import random

import pytest

from mixtral.engine.pages import PAGE_SIZE, PageAllocator, pages_for
from mixtral.errors import CapacityError


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (64, 1), (65, 2), (130, 3), (192, 3), (193, 4)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


def test_growth_keeps_the_pages_it_has() -> None:
    pages = PageAllocator(5)
    first = pages.grow(0, 100)
    assert len(first) == 2
    assert pages.grow(0, 128) == first
    assert pages.grow(0, 129)[:2] == first
    assert pages.used == 3


def test_allocation_is_all_or_nothing() -> None:
    pages = PageAllocator(3)
    pages.grow(0, 65)
    with pytest.raises(CapacityError, match=r"need 2 more pages of 64 tokens; 1 of 3 are free"):
        pages.grow(1, 128)
    assert (pages.used, pages.pages(1)) == (2, ())
    pages.check_integrity()


def test_random_use_keeps_integrity() -> None:
    """Serving invariants A1, A4, A8 after every operation."""
    rng, pages, lengths = random.Random(0), PageAllocator(20), {}
    for _ in range(2000):
        sequence = rng.randrange(6)
        if rng.random() < 0.2:
            pages.free(sequence)
            lengths.pop(sequence, None)
        else:
            wanted = lengths.get(sequence, 0) + rng.randrange(1, 90)
            try:
                pages.grow(sequence, wanted)
                lengths[sequence] = wanted
            except CapacityError:
                pass
        pages.check_integrity()
        assert {s: len(pages.pages(s)) for s in lengths} == {s: -(-n // PAGE_SIZE) for s, n in lengths.items()}
    for sequence in range(6):
        pages.free(sequence)
    assert pages.used == 0


def test_integrity_check_sees_a_stolen_page() -> None:
    pages = PageAllocator(4)
    pages.grow(0, 64)
    pages._free.append(pages.pages(0)[0])
    with pytest.raises(RuntimeError, match="owned twice"):
        pages.check_integrity()
