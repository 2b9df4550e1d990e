"""Which pages of the key-value cache belong to whom, and which full pages can be used again.

Plain numbers: the tensors live in ``model.cache``. A sequence of n tokens owns ceil(n / 64) pages, in order. A page
that is full of computed tokens may be published: then a sequence that begins with the same tokens, in the same scope,
shares it. A shared page is never written; the page that a sequence writes to is its own.

Example: 130 tokens own three pages, of which two can be published. A second sequence with the same 130 tokens shares
those two and owns a third one. When both are released, the two stay as idle pages and the others are free. Idle pages
count as available; the least recently used goes first, and a page before those that it continues.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mixtral import faults
from mixtral.errors import CapacityError

__all__ = ["PAGE_SIZE", "PageAllocator", "digest", "pages_for"]

PAGE_SIZE = 64  # tokens per page


def pages_for(tokens: int) -> int:
    """How many pages hold that many tokens."""
    return -(-tokens // PAGE_SIZE)


def digest(parent: bytes, tokens: bytes, scope: str) -> bytes:
    """What a page is looked up by: a hash of all tokens up to its end and of its scope."""
    return hashlib.blake2b(parent + tokens + scope.encode(), digest_size=16).digest()


@dataclass(slots=True, eq=False)
class _Entry:
    """A published page: its tokens, and the entry that it continues."""

    page: int
    key: bytes
    parent: _Entry | None
    tokens: bytes
    scope: str


@dataclass(slots=True)
class _Owner:
    """The pages of a sequence; the first ``len(chain)`` are published. A private one publishes no more."""

    scope: str
    table: list[int]
    chain: list[_Entry] = field(default_factory=list)
    private: bool = False


class PageAllocator:
    """Hands out the pages 0 .. total-1 to sequences, which are named by a number.

    ``hash`` makes the keys of published pages. It decides nothing: a hit also compares tokens and scope.
    """

    def __init__(
        self, total: int, *, publish: bool = True, hash: Callable[[bytes, bytes, str], bytes] = digest
    ) -> None:
        self.total = total
        self.caching = publish
        self._hash = hash
        self._free = list(range(total - 1, -1, -1))
        self._owners: dict[int, _Owner] = {}
        self._users = [0] * total  # sequences that have the page
        self._entries: dict[int, _Entry] = {}  # by page
        self._by_key: dict[bytes, list[_Entry]] = {}
        self._idle: dict[int, None] = {}  # published pages without users, the least recently used first
        self._dirty: set[int] = set()
        self._to_clear: list[int] = []

    @property
    def used(self) -> int:
        """Pages that belong to a sequence."""
        return self.total - len(self._free) - len(self._idle)

    @property
    def cached(self) -> int:
        """Published pages that belong to nobody at present."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Pages that a sequence can get."""
        return len(self._free) + len(self._idle)

    def pages(self, owner: int) -> list[int]:
        """The pages of a sequence, in order of its tokens; to be read only."""
        found = self._owners.get(owner)
        return [] if found is None else found.table

    def find(self, tokens: Sequence[int], most: int, scope: str = "") -> list[int]:
        """Published pages that hold the beginning of ``tokens``, at most ``most`` tokens of it."""
        found: list[int] = []
        parent: _Entry | None = None
        if not self._by_key:
            return found
        for start in range(0, min(most, len(tokens)) // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE):
            content = _content(tokens, start)
            entry = self._lookup(self._key(parent, content, scope), parent, content, scope)
            if entry is None:
                break
            found.append(entry.page)
            parent = entry
        return found

    def needed(self, shared: Sequence[int], tokens: int) -> int:
        """How many of the available pages ``open`` would take."""
        return pages_for(tokens) - sum(1 for page in shared if self._users[page])

    def open(self, owner: int, shared: Sequence[int], tokens: int, scope: str = "") -> None:
        """Give a new sequence the pages ``shared``, which must be full, and own ones up to ``tokens`` tokens.

        Raises:
            CapacityError: not enough pages are available; nothing was changed.
            RuntimeError: the sequence has pages already.
        """
        if owner in self._owners:
            raise RuntimeError(f"sequence {owner} has pages already")
        if self.needed(shared, tokens) > self.available or faults.fails("page"):
            raise self._full(tokens, self.needed(shared, tokens))
        found = _Owner(scope, list(shared), private=not self.caching)
        for page in shared:
            self._users[page] += 1
            self._idle.pop(page, None)
        for page in shared:
            if (entry := self._entries.get(page)) is None:
                break
            found.chain.append(entry)
        self._owners[owner] = found
        self._extend(found.table, tokens)

    def grow(self, owner: int, tokens: int) -> list[int]:
        """Make a sequence own enough pages for ``tokens`` tokens; returns its pages. All or nothing.

        Raises:
            CapacityError: not enough pages are available; nothing was changed.
        """
        table = self._owners[owner].table
        missing = pages_for(tokens) - len(table)
        if missing > self.available or (missing > 0 and faults.fails("page")):
            raise self._full(tokens, missing)
        return self._extend(table, tokens)

    def trim(self, owner: int, tokens: int) -> None:
        """Take back the pages beyond ``tokens`` tokens; none of them is published."""
        table = self._owners[owner].table
        while len(table) > pages_for(tokens):
            self._drop(table.pop())

    def fork(self, parent: int, tokens: int) -> list[int]:
        """The full pages of a sequence within its first ``tokens`` tokens, for ``open`` to share."""
        return self.pages(parent)[: tokens // PAGE_SIZE]

    def publish(self, owner: int, tokens: Sequence[int], computed: int) -> None:
        """Let others find the full pages of a sequence whose first ``computed`` tokens are stored.

        Where another sequence was first, its page takes the place of this one's: both hold the same numbers.
        """
        found = self._owners[owner]
        while not found.private and (len(found.chain) + 1) * PAGE_SIZE <= computed:
            at = len(found.chain)
            content = _content(tokens, at * PAGE_SIZE)
            parent = found.chain[-1] if found.chain else None
            key, page = self._key(parent, content, found.scope), found.table[at]
            entry = self._lookup(key, parent, content, found.scope)
            if entry is None:
                entry = _Entry(page, key, parent, content, found.scope)
                self._entries[page] = entry
                self._by_key.setdefault(key, []).append(entry)
            elif entry.page != page:
                self._users[entry.page] += 1
                self._idle.pop(entry.page, None)
                found.table[at] = entry.page
                self._drop(page)
            found.chain.append(entry)

    def release(self, owner: int, *, damaged: bool = False) -> None:
        """Take back all pages of a sequence; a sequence without pages is left alone.

        With ``damaged`` nobody finds them any more, nor what continues them, and each is cleared before its next use.
        """
        found = self._owners.pop(owner, None)
        if found is None:
            return
        if damaged:
            self._dirty.update(found.table)
            self._withdraw(set(found.table))
        for page in reversed(found.table):  # a page becomes idle before those that it continues
            self._drop(page)

    def take_dirty(self) -> list[int]:
        """Pages in use that must be cleared before anything is stored in them; each is named once."""
        found, self._to_clear = self._to_clear, []
        return found

    def forget(self) -> None:
        """Withdraw all published pages; those without users become free."""
        self._withdraw(set(self._entries))

    def _key(self, parent: _Entry | None, content: bytes, scope: str) -> bytes:
        return self._hash(b"" if parent is None else parent.key, content, scope)

    def _lookup(self, key: bytes, parent: _Entry | None, content: bytes, scope: str) -> _Entry | None:
        # The parent is the entry found before, so that equal tokens here are equal tokens from the beginning on.
        for entry in self._by_key.get(key, ()):
            if entry.parent is parent and entry.tokens == content and entry.scope == scope:
                return entry
        return None

    def _extend(self, table: list[int], tokens: int) -> list[int]:
        while len(table) < pages_for(tokens):
            table.append(self._take())
        return table

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page]
            self._unlist(page)
        self._users[page] = 1
        if page in self._dirty:
            self._dirty.discard(page)
            self._to_clear.append(page)
        return page

    def _drop(self, page: int) -> None:
        if self._users[page] < 1:
            raise RuntimeError(f"page {page} is given back, but belongs to nobody")
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._entries:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _unlist(self, page: int) -> None:
        entry = self._entries.pop(page)
        same = self._by_key[entry.key]
        same.remove(entry)
        if not same:
            del self._by_key[entry.key]

    def _withdraw(self, pages: set[int]) -> None:
        gone = {entry for page, entry in self._entries.items() if page in pages or _descends(entry, pages)}
        for entry in gone:
            self._unlist(entry.page)
            if self._users[entry.page] == 0:
                del self._idle[entry.page]
                self._free.append(entry.page)
        for owner in self._owners.values():
            kept = next((at for at, entry in enumerate(owner.chain) if entry in gone), len(owner.chain))
            if kept < len(owner.chain):
                del owner.chain[kept:]
                owner.private = True  # or it would publish them again

    def _full(self, tokens: int, missing: int) -> CapacityError:
        return CapacityError(
            f"{tokens} tokens need {missing} more pages of {PAGE_SIZE} tokens; "
            f"{self.available} of {self.total} are available",
            code="cache_exhausted",
        )

    def check_integrity(self) -> None:
        """Raise if a page is lost, owned twice, or counted wrongly. For tests and for idle moments."""
        if problems := list(self._problems()):
            raise RuntimeError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        used = Counter(page for owner in self._owners.values() for page in owner.table)
        states = Counter([*self._free, *self._idle, *used.keys()])
        if sorted(states) != list(range(self.total)) or any(count > 1 for count in states.values()):
            yield f"pages are lost or in two states: {sorted(states.elements())} instead of 0 .. {self.total - 1}"
        if wrong := [page for page in range(self.total) if self._users[page] != used[page]]:
            yield f"users of the pages {wrong} are counted wrongly"
        if unlisted := [page for page in self._idle if page not in self._entries]:
            yield f"the idle pages {unlisted} are not published"
        for number, owner in self._owners.items():
            if len(set(owner.table)) != len(owner.table):
                yield f"sequence {number} has a page twice: {owner.table}"
            if [entry.page for entry in owner.chain] != owner.table[: len(owner.chain)]:
                yield f"sequence {number} has other pages than it published"
        position = {page: at for at, page in enumerate(self._idle)}
        for page, entry in self._entries.items():
            if entry.page != page or entry not in self._by_key.get(entry.key, ()):
                yield f"page {page} is published, but not found"
            parent = entry.parent
            if parent is None:
                continue
            if self._entries.get(parent.page) is not parent:
                yield f"page {page} continues a page that is gone"
            if parent.page in position and position.get(page, self.total) > position[parent.page]:
                yield f"page {parent.page} would be taken before page {page}, which continues it"


def _content(tokens: Sequence[int], start: int) -> bytes:
    return array("q", tokens[start : start + PAGE_SIZE]).tobytes()


def _descends(entry: _Entry, pages: set[int]) -> bool:
    parent = entry.parent
    while parent is not None:
        if parent.page in pages:
            return True
        parent = parent.parent
    return False
