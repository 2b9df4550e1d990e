"""The page allocator: no page lost or owned by the wrong sequences, hits only for equal tokens, nothing half done.

A state machine plays sequences that write what they are into their pages, as the model does, and reads it back.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from mixtral.engine import pages as module
from mixtral.engine.pages import PAGE_SIZE, PageAllocator, digest, pages_for
from mixtral.errors import CapacityError


def prompt(*symbols: int, tail: int = 0) -> list[int]:
    """A page full of each symbol, and some tokens of another page."""
    return [symbol for symbol in symbols for _ in range(PAGE_SIZE)] + [7] * tail


def filled(pages: PageAllocator, owner: int, tokens: list[int], scope: str = "") -> list[int]:
    """Open a sequence on what is found, compute all of it, publish; the pages that were found."""
    shared = pages.find(tokens, len(tokens) - 1, scope)
    pages.open(owner, shared, len(tokens), scope)
    pages.publish(owner, tokens, len(tokens))
    return shared


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (64, 1), (65, 2), (130, 3), (192, 3), (193, 4)])
def test_pages_for(tokens: int, count: int) -> None:
    assert pages_for(tokens) == count


def test_growth_keeps_the_pages_it_has() -> None:
    pages = PageAllocator(5)
    pages.open(0, [], 100)
    first = list(pages.pages(0))
    assert len(first) == 2
    assert pages.grow(0, 128) == first
    assert pages.grow(0, 129)[:2] == first
    assert pages.used == 3
    pages.trim(0, 64)
    assert (pages.pages(0), pages.used) == (first[:1], 1)


def test_allocation_is_all_or_nothing() -> None:
    pages = PageAllocator(3)
    pages.open(0, [], 65)
    for call in (lambda: pages.open(1, [], 128), lambda: pages.grow(0, 250)):
        with pytest.raises(CapacityError, match=r"need 2 more pages of 64 tokens; 1 of 3 are available"):
            call()
    assert (pages.used, pages.pages(1), len(pages.pages(0))) == (2, [], 2)
    pages.check_integrity()


def test_the_same_beginning_is_found_in_the_same_scope_only() -> None:
    pages = PageAllocator(20)
    tokens = prompt(1, 2, 3, tail=9)
    filled(pages, 0, tokens)
    own = list(pages.pages(0))
    assert pages.find(tokens, len(tokens)) == own[:3]
    assert pages.find(tokens, 191) == own[:2]
    assert pages.find(prompt(1, 2, 4), 192) == own[:2]
    assert pages.find(prompt(2, 2, 3), 192) == []
    assert pages.find(tokens, 192, "other") == []
    pages.release(0)
    assert (pages.used, pages.cached, pages.available) == (0, 3, 20)
    assert filled(pages, 1, tokens) == own[:3]
    assert (pages.used, pages.cached) == (4, 0)


def test_of_two_that_compute_the_same_only_one_copy_stays() -> None:
    pages = PageAllocator(20)
    tokens = prompt(1, 2, tail=1)
    for owner in (0, 1):
        pages.open(owner, [], len(tokens))
    assert pages.used == 6
    for owner in (0, 1):
        pages.publish(owner, tokens, len(tokens))
    assert pages.pages(0)[:2] == pages.pages(1)[:2]
    assert pages.used == 4
    pages.check_integrity()


def test_the_least_recently_used_goes_first_and_the_end_of_a_text_before_its_beginning() -> None:
    pages = PageAllocator(6)
    for owner, first in enumerate((1, 2, 3)):
        filled(pages, owner, prompt(first, 9))
        pages.release(owner)
    assert pages.cached == 6
    filled(pages, 5, prompt(1, 9, 9))  # used again: now the most recent; takes the end of the second text
    pages.release(5)
    assert [len(pages.find(prompt(first, 9), 128)) for first in (1, 2, 3)] == [2, 1, 2]
    pages.open(6, [], 2 * PAGE_SIZE)
    assert [len(pages.find(prompt(first, 9), 128)) for first in (1, 2, 3)] == [2, 0, 1]


def test_without_publishing_pages_are_shared_by_fork_only() -> None:
    pages = PageAllocator(10, publish=False)
    tokens = prompt(1, 2, tail=5)
    filled(pages, 0, tokens)
    assert pages.find(tokens, len(tokens)) == []
    shared = pages.fork(0, len(tokens) - 1)
    assert len(shared) == 2
    pages.open(1, shared, len(tokens))
    assert (pages.used, pages.pages(1)[:2]) == (4, pages.pages(0)[:2])
    pages.release(0)
    assert pages.used == 3
    pages.release(1)
    assert (pages.used, pages.cached) == (0, 0)


def test_damaged_pages_are_cleared_before_their_next_use_and_found_by_nobody() -> None:
    pages = PageAllocator(6)
    tokens = prompt(1, 2, tail=3)
    filled(pages, 0, tokens)
    filled(pages, 1, prompt(1, 3))
    damaged = list(pages.pages(0))
    pages.release(0, damaged=True)
    assert pages.find(tokens, 192) == []
    assert pages.find(prompt(1, 3), 128) == []  # it continues a damaged page
    assert pages.take_dirty() == []
    pages.open(2, [], 4 * PAGE_SIZE)
    assert sorted(pages.take_dirty()) == sorted(damaged[1:])
    pages.publish(1, prompt(1, 3), 128)
    assert pages.find(prompt(1, 3), 128) == []  # its beginning is still the damaged page
    pages.release(1)
    pages.release(2)
    pages.open(3, [], 6 * PAGE_SIZE)
    assert pages.take_dirty() == damaged[:1]


def test_wrong_use_is_an_error() -> None:
    pages = PageAllocator(2)
    pages.open(0, [], 5)
    with pytest.raises(RuntimeError, match="has pages already"):
        pages.open(0, [], 5)
    page = pages.pages(0)[0]
    pages.release(0)
    pages.release(0)
    with pytest.raises(RuntimeError, match=f"page {page} is given back"):
        pages._drop(page)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda p: p._free.append(p.pages(0)[0]), "in two states"),
        (lambda p: p._free.pop(), "lost"),
        (lambda p: p._users.__setitem__(p.pages(0)[0], 2), "counted wrongly"),
        (lambda p: p.pages(0).append(p.pages(0)[0]), "twice"),
        (lambda p: p.pages(0).reverse(), "other pages than it published"),
        (lambda p: p._idle.update({page: p._idle.pop(page) for page in list(p._idle)[:1]}), "taken before"),
        (lambda p: p._by_key.clear(), "not found"),
    ],
)
def test_the_integrity_check_sees_harm(harm: Any, told: str) -> None:
    pages = PageAllocator(9)
    filled(pages, 1, prompt(5, 5))
    filled(pages, 0, prompt(1, 2, tail=1))
    pages.release(1)
    pages.check_integrity()
    harm(pages)
    with pytest.raises(RuntimeError, match=told):
        pages.check_integrity()


# --- state machine ----------------------------------------------------------------------------------------------------


class PagesMachine(RuleBasedStateMachine):
    """Sequences come, grow and go. ``content`` is what each place of each page holds: all tokens up to there."""

    allocator: ClassVar[type[PageAllocator]] = PageAllocator
    steps: ClassVar[int] = 0
    hash: ClassVar[Any] = staticmethod(digest)

    @initialize(total=st.integers(1, 12), publish=st.sampled_from([True, True, False]))
    def start(self, total: int, publish: bool) -> None:
        self.pages = self.allocator(total, publish=publish, hash=self.hash)
        self.content: dict[int, tuple[str, list[int]]] = {}  # page -> scope, tokens to its end
        self.tokens: dict[int, list[int]] = {}
        self.scopes: dict[int, str] = {}
        self.number = 0

    def store(self, owner: int, start: int) -> None:
        """What the model does with the tokens from ``start`` on."""
        tokens, table = self.tokens[owner], self.pages.pages(owner)
        assert len(table) == pages_for(len(tokens))
        for place in range(start // PAGE_SIZE, len(table)):
            page = table[place]
            assert sum(page in self.pages.pages(other) for other in self.tokens) == 1, "a shared page is written"
            self.content[page] = (self.scopes[owner], tokens[: (place + 1) * PAGE_SIZE])
        self.pages.take_dirty()

    @rule(symbols=st.lists(st.integers(0, 1), max_size=4), tail=st.integers(1, 64), scope=st.sampled_from(["", "b"]))
    def open(self, symbols: list[int], tail: int, scope: str) -> None:
        tokens = prompt(*symbols, tail=tail)
        shared = self.pages.find(tokens, len(tokens) - 1, scope)
        for place, page in enumerate(shared, 1):
            assert self.content[page] == (scope, tokens[: place * PAGE_SIZE])
        before, fits = self.pages.available, self.pages.needed(shared, len(tokens)) <= self.pages.available
        owner, self.number = self.number, self.number + 1
        try:
            self.pages.open(owner, shared, len(tokens), scope)
        except CapacityError:
            assert not fits
            assert (before, self.pages.pages(owner)) == (self.pages.available, [])
            return
        assert fits
        self.tokens[owner], self.scopes[owner] = tokens, scope
        self.store(owner, len(shared) * PAGE_SIZE)
        self.pages.publish(owner, tokens, len(tokens))

    @rule(data=st.data(), count=st.integers(1, 70), ahead=st.integers(0, 70))
    def grow(self, data: st.DataObject, count: int, ahead: int) -> None:
        if not self.tokens:
            return
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        tokens = self.tokens[owner]
        try:
            self.pages.grow(owner, len(tokens) + count + ahead)
        except CapacityError:
            assert len(self.pages.pages(owner)) == pages_for(len(tokens))
            return
        start = len(tokens)
        self.pages.trim(owner, start + count)
        tokens.extend([data.draw(st.integers(0, 1))] * count)
        self.store(owner, start)
        self.pages.publish(owner, tokens, len(tokens))

    @rule(data=st.data(), tail=st.integers(0, 5))
    def fork(self, data: st.DataObject, tail: int) -> None:
        if not self.tokens:
            return
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        tokens = self.tokens[parent][: max(1, len(self.tokens[parent]) - tail)]
        shared = self.pages.fork(parent, len(tokens) - 1)
        assert len(shared) == (len(tokens) - 1) // PAGE_SIZE
        owner, self.number = self.number, self.number + 1
        try:
            self.pages.open(owner, shared, len(tokens), self.scopes[parent])
        except CapacityError:
            return
        self.tokens[owner], self.scopes[owner] = tokens, self.scopes[parent]
        self.store(owner, len(shared) * PAGE_SIZE)

    @rule(data=st.data(), damaged=st.sampled_from([False, False, True]))
    def release(self, data: st.DataObject, damaged: bool) -> None:
        if self.tokens:
            owner = data.draw(st.sampled_from(sorted(self.tokens)))
            del self.tokens[owner], self.scopes[owner]
            self.pages.release(owner, damaged=damaged)

    @rule()
    def forget(self) -> None:
        self.pages.forget()
        assert self.pages.cached == 0

    @invariant()
    def whole(self) -> None:
        PagesMachine.steps += 1
        pages = self.pages
        pages.check_integrity()
        assert pages.used + pages.available == pages.total
        assert pages.used == len({page for owner in self.tokens for page in pages.pages(owner)})
        for owner, tokens in self.tokens.items():
            table = pages.pages(owner)
            assert len(table) == pages_for(len(tokens))
            for place, page in enumerate(table):
                scope, stored = self.content[page]
                assert scope == self.scopes[owner]
                assert stored[: len(tokens)] == tokens[: (place + 1) * PAGE_SIZE][: len(stored)]
                assert len(stored) >= min(len(tokens), (place + 1) * PAGE_SIZE)

    def teardown(self) -> None:
        for owner in self.tokens:
            self.pages.release(owner)
        assert self.pages.used == 0
        self.pages.forget()
        assert len(self.pages._free) == self.pages.total
        self.pages.check_integrity()


class ConstantHash(PagesMachine):
    """All keys are equal: only the comparison of tokens tells pages apart."""

    hash = staticmethod(lambda parent, tokens, scope: b"same")


def settings_of(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("machine", [PagesMachine, ConstantHash])
def test_random_use(machine: type[PagesMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings_of(40, 30))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("machine", [PagesMachine, ConstantHash])
def test_random_use_at_length(machine: type[PagesMachine]) -> None:
    """At least 100,000 steps each."""
    PagesMachine.steps = 0
    run_state_machine_as_test(machine, settings=settings_of(1500, 100))
    print(f"{PagesMachine.steps} steps")
    assert PagesMachine.steps >= 100_000


class KeysAreTrusted(PageAllocator):
    def _lookup(self, key: bytes, parent: Any, content: bytes, scope: str) -> Any:
        return next(iter(self._by_key.get(key, ())), None)


class ScopeIsForgotten(PageAllocator):
    def find(self, tokens: Any, most: int, scope: str = "") -> list[int]:
        return super().find(tokens, most, "")


class PartialPagesAreShared(PageAllocator):
    def fork(self, parent: int, tokens: int) -> list[int]:
        return self.pages(parent)[: pages_for(tokens)]


class SharedPagesAreFreed(PageAllocator):
    def _drop(self, page: int) -> None:
        self._users[page] = 1
        super()._drop(page)


class NewestGoesFirst(PageAllocator):
    def _take(self) -> int:
        if not self._free:
            self._idle = dict.fromkeys(reversed(list(self._idle)))
        return super()._take()


@pytest.mark.parametrize(
    "fault", [KeysAreTrusted, ScopeIsForgotten, PartialPagesAreShared, SharedPagesAreFreed, NewestGoesFirst]
)
def test_the_machine_sees_a_planted_fault(fault: type[PageAllocator]) -> None:
    class Faulty(ConstantHash if fault is KeysAreTrusted else PagesMachine):  # type: ignore[misc]
        allocator = fault

    with pytest.raises(Exception):  # noqa: B017 - whatever notices first
        run_state_machine_as_test(Faulty, settings=settings_of(200, 40))


def test_page_sizes_agree() -> None:
    from mixtral.model import cache

    assert cache.PAGE_SIZE == module.PAGE_SIZE
