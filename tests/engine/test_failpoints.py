"""Failpoints inside an engine: one failure at each place in turn. What is broken ends, and nothing else is harmed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from driving import engine_of, expected, failed, finish, ids_of, submit, text
from hash_model import EOS, V

from mixtral import faults
from mixtral.engine.engine import Engine
from mixtral.engine.pages import PageAllocator
from mixtral.errors import CapacityError
from mixtral.wire import Constraint, Submit, Update


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    faults.install([])


def load() -> list[Submit]:
    return [submit("a", text(120), n=2), submit("b", text(60, 1)), submit("c", text(185, 2)), submit("d", text(40, 3))]


def run(engine: Engine) -> list[Update]:
    """All requests to their end; raises what leaves a step."""
    for one in load():
        engine.submit(one)
    return finish(engine)


def check(engine: Engine) -> None:
    """The engine holds nothing, and works."""
    assert (engine.has_work, engine.stats().pages_used) == (False, 0)
    engine.scheduler.check_integrity()
    updates = run(engine)
    for one in load():
        for sequence in range(one.n):
            assert ids_of(updates, one.request, sequence) == expected(one, sequence)
    engine.pages.forget()
    assert engine.pages.available == engine.pages.total == len(engine.pages._free)


@pytest.mark.parametrize("pages", [5, 6, 40])
@pytest.mark.parametrize(("kind", "error"), [("page", CapacityError), ("alloc", MemoryError)])
def test_every_allocation_can_fail(kind: str, error: type[Exception], pages: int) -> None:
    """The N-th one fails, for each N until none is left."""
    points = 0
    for failing in range(1, 500):
        faults.install([f"{kind}:fail:{failing}"])
        engine = engine_of(pages=pages, max_num_batched_tokens=64, max_num_seqs=4)
        try:
            run(engine)
        except error:
            points = failing
            faults.install([])
            check(engine)
        else:
            break
    else:
        pytest.fail("it never came to an end")
    print(f"{points} points of {kind} with {pages} pages")
    assert points >= (1 if kind == "alloc" else 5)


def test_the_loop_sees_a_page_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator that takes a page before it refuses is found."""

    def grow(self: PageAllocator, owner: int, tokens: int) -> list[int]:
        table = self._owners[owner].table
        if len(table) * 64 < tokens and faults.fails("page"):
            self._take()
            raise CapacityError("lost", code="cache_exhausted")
        return self._extend(table, tokens)

    monkeypatch.setattr(PageAllocator, "grow", grow)
    with pytest.raises((AssertionError, RuntimeError)):
        test_every_allocation_can_fail("page", CapacityError, 6)


class Anything:
    """A grammar of everything."""

    finished = False

    def matcher(self, constraint: Constraint) -> Anything:
        return self

    def mask(self, out: Any) -> None:
        out[:] = (1 << V) - 1 - (1 << EOS)

    def advance(self, id: int) -> None:
        pass


def test_a_matcher_in_its_error_state_ends_its_request_alone() -> None:
    faults.install(["matcher:error"])
    engine = engine_of(grammar=Anything())
    other = submit("b", text(30))
    engine.submit(submit("a", text(30), constraint=Constraint(text="")))
    engine.submit(other)
    updates = finish(engine)
    assert (failed(updates).request, failed(updates).code) == ("a", "grammar_failed")
    assert ids_of(updates, "b") == expected(other)
    faults.install([])
    engine.submit(submit("a", text(30), constraint=Constraint(text="")))
    assert len(ids_of(finish(engine), "a")) == 20


def constant(parent: bytes, tokens: bytes, scope: str) -> bytes:
    return b"\x00" * 16


def scoped(engine: Engine) -> list[tuple[Submit, list[Update]]]:
    """Requests with the same and other beginnings, of two scopes, one after the other; what came of each."""
    found = []
    for number in range(12):
        prompt = text(192, number % 3) + text(20, number)
        one = submit(f"{number}", prompt, scope="ab"[number // 3 % 2])
        engine.submit(one)
        found.append((one, finish(engine)))
    return found


@pytest.mark.parametrize("colliding", [False, True])
def test_a_foreign_prefix_is_never_used_not_even_if_all_hashes_are_equal(colliding: bool) -> None:
    engine = engine_of(pages=40, prefix_cache=True)
    if colliding:
        engine.pages._hash = constant
    hits: dict[tuple[str, int], int] = {}
    for one, updates in scoped(engine):
        assert ids_of(updates, one.request) == expected(one)
        (started,) = [update for update in updates if type(update).__name__ == "Started"]
        seen = (one.scope, int(one.request) % 3)
        assert started.cached[0] == hits.get(seen, 0)  # type: ignore[attr-defined]
        hits[seen] = 192


def test_a_cache_that_ignores_the_scope_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = PageAllocator.find
    monkeypatch.setattr(PageAllocator, "find", lambda self, tokens, most, scope="": find(self, tokens, most, "a"))
    with pytest.raises(AssertionError):
        test_a_foreign_prefix_is_never_used_not_even_if_all_hashes_are_equal(False)


def test_a_cache_that_trusts_its_hashes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(self: PageAllocator, key: bytes, parent: Any, content: bytes, scope: str) -> Any:
        return next((entry for entry in self._by_key.get(key, ()) if entry.parent is parent), None)

    monkeypatch.setattr(PageAllocator, "_lookup", trusting)
    with pytest.raises(AssertionError):
        test_a_foreign_prefix_is_never_used_not_even_if_all_hashes_are_equal(True)


def test_pages_that_belong_to_nobody_may_hold_anything() -> None:
    engine = engine_of(pages=6, max_num_seqs=3, max_num_batched_tokens=64, prefix_cache=False)
    for one in load():
        engine.submit(one)
    updates = []
    while engine.has_work:
        updates += engine.step()
        cache: Any = engine._runner._cache
        for page in engine.pages._free:
            cache.states[page * 64 : (page + 1) * 64] = [0xBAD] * 64
    for one in load():
        for sequence in range(one.n):
            assert ids_of(updates, one.request, sequence) == expected(one, sequence)
