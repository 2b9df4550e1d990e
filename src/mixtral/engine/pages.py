"""Which pages of the key-value cache belong to whom. Plain numbers: the tensors live in ``model.cache``.

A sequence of n tokens owns ceil(n / 64) pages, in order; a page has one owner. Example: 130 tokens own three pages;
growing to 192 tokens allocates nothing, token 193 needs a fourth.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixtral.errors import CapacityError

__all__ = ["PAGE_SIZE", "PageAllocator", "pages_for"]

PAGE_SIZE = 64  # tokens per page


def pages_for(tokens: int) -> int:
    """How many pages hold that many tokens."""
    return -(-tokens // PAGE_SIZE)


class PageAllocator:
    """Hands out the pages 0 .. total-1 to sequences, which are named by a number."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}

    @property
    def used(self) -> int:
        """Pages that belong to a sequence."""
        return self.total - len(self._free)

    def pages(self, sequence: int) -> Sequence[int]:
        """The pages of a sequence, in order of its tokens."""
        return tuple(self._owned.get(sequence, ()))

    def grow(self, sequence: int, tokens: int) -> Sequence[int]:
        """Make a sequence own enough pages for ``tokens`` tokens; returns its pages. All or nothing.

        Raises:
            CapacityError: not enough pages are free; nothing was changed.
        """
        owned = self._owned.get(sequence, [])
        missing = pages_for(tokens) - len(owned)
        if missing > len(self._free):
            raise CapacityError(
                f"{tokens} tokens need {missing} more pages of {PAGE_SIZE} tokens; "
                f"{len(self._free)} of {self.total} are free"
            )
        if missing > 0:
            self._owned[sequence] = owned + [self._free.pop() for _ in range(missing)]
        return self.pages(sequence)

    def free(self, sequence: int) -> None:
        """Take back all pages of a sequence; a sequence without pages is left alone."""
        self._free.extend(reversed(self._owned.pop(sequence, [])))

    def check_integrity(self) -> None:
        """Raise if a page is lost or has two owners. For tests and for idle moments."""
        everywhere = [*self._free, *(page for pages in self._owned.values() for page in pages)]
        if sorted(everywhere) != list(range(self.total)):
            raise RuntimeError(f"pages are lost or owned twice: {sorted(everywhere)} instead of 0 .. {self.total - 1}")
