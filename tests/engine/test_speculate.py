"""Drafts: what is proposed, and when it is worth a step with more rows."""

from __future__ import annotations

import pytest

from mixtral.engine.speculate import Costs, Drafter


class Flat:
    """A step costs 1 and ``extra`` for each token beyond the first."""

    def __init__(self, extra: float) -> None:
        self.extra = extra

    def of(self, tokens: int) -> float:
        return 1.0 + self.extra * (tokens - 1)


def propose(drafter: Drafter, tokens: list[int], *, most: int = 99, extra: float = 0.0) -> list[int]:
    return drafter.propose(tokens, most, 1, 0, Flat(extra))  # type: ignore[arg-type]


def test_what_followed_the_last_time_is_proposed() -> None:
    text = [1, 2, 3, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 9, 1, 2, 3]
    assert propose(Drafter(), text) == text[3:19]
    assert propose(Drafter(), text, most=5) == text[3:8]
    assert propose(Drafter(), text, most=0) == []
    again = [*text, 77, 78, 79, 80, 1, 2, 3]
    assert propose(Drafter(), again)[:4] == [77, 78, 79, 80]  # the most recent one


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 1, 2, 9, 1, 2]])
def test_nothing_without_three_equal_tokens(text: list[int]) -> None:
    assert propose(Drafter(), text) == []


def test_a_text_that_goes_round_is_continued_round() -> None:
    assert propose(Drafter(), [7] * 4) == [7] * 16
    assert propose(Drafter(), [5, 6] * 3) == [5, 6] * 8
    assert propose(Drafter(), [5, 6, 8] * 2) == [5, 6, 8] * 5 + [5]


def test_a_text_may_grow_by_any_number_of_tokens() -> None:
    drafter, text = Drafter(), [3 * place % 17 for place in range(100)]
    for end in (4, 5, 30, 31, 64, 100):
        assert propose(drafter, text[:end]) == propose(Drafter(), text[:end])


def test_nothing_is_drafted_that_costs_more_than_it_promises() -> None:
    short = [1, 2, 3, 4, 5, 1, 2, 3]
    long = list(range(40)) * 2
    assert propose(Drafter(), short, extra=0.0)
    assert propose(Drafter(), short, extra=0.5) == []
    assert len(propose(Drafter(), long, extra=0.2)) == 16
    assert propose(Drafter(), long, extra=1.0) == []


def test_the_record_of_a_sequence_decides() -> None:
    drafter, text = Drafter(), list(range(40)) * 2
    for _ in range(30):
        if not (found := propose(drafter, text, extra=0.2)):
            break
        drafter.observe(len(found), 0)
    assert propose(drafter, text, extra=0.2) == []
    tries = 0
    for _ in range(2000):  # now and then it tries again
        if found := propose(drafter, text, extra=0.2):
            drafter.observe(len(found), 0)
            tries += 1
    assert 1 <= tries <= 50
    for _ in range(10):
        drafter.observe(16, 16)
    assert len(propose(drafter, text, extra=0.2)) == 16


def test_costs_are_what_was_seen_and_else_follow_the_experts() -> None:
    costs = Costs(8, 2)
    assert [round(costs.of(rows) / costs.of(1), 1) for rows in (2, 4, 8, 16)] == [1.7, 2.5, 3.3, 3.7]
    for _ in range(100):
        costs.observe(1, 0.010)
        costs.observe(12, 0.015)
    assert costs.of(1) == pytest.approx(0.010)
    assert costs.of(12) == pytest.approx(0.015)
    assert costs.of(1) < costs.of(2) < costs.of(3)
    costs.observe(1, 60.0)  # the process was stopped: of little weight
    assert costs.of(1) < 0.012
