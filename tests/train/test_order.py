"""The order of fine-tuning: every example once per epoch, by seed and step alone; parts that keep it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral.train.order import at_least, in_parts, of_step


@given(count=st.integers(1, 40), per_step=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_epoch_has_every_example_once(count: int, per_step: int, seed: int) -> None:
    stream = [n for step in range(-(-3 * count // per_step)) for n in of_step(seed, step, count, per_step)]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_step_depends_on_the_seed_and_its_number_alone() -> None:
    forward = [of_step(1, step, 100, 7) for step in range(30)]
    assert [of_step(1, step, 100, 7) for step in reversed(range(30))] == forward[::-1]
    assert of_step(2, 0, 100, 7) != forward[0]
    epochs = [[of_step(1, step, 5, 5)] for step in range(4)]
    assert len({str(one) for one in epochs}) > 1


@given(parts=st.lists(st.lists(st.integers(), min_size=1)), count=st.integers(0, 12))
def test_parts_are_halved_until_there_are_enough_and_keep_the_order(parts: list[list[int]], count: int) -> None:
    items = [item for part in parts for item in part]
    found = at_least(parts, count)
    assert [item for part in found for item in part] == items
    assert len(found) == max(len(parts), min(count, len(items)))
    assert all(found)


@given(sizes=st.lists(st.integers(1, 30)), most=st.integers(1, 40))
def test_parts_keep_the_order_and_the_limit(sizes: list[int], most: int) -> None:
    parts = list(in_parts(sizes, lambda size: size, most))
    assert [size for part in parts for size in part] == sizes
    assert all(sum(part) <= most or len(part) == 1 for part in parts)
    for part, following in itertools.pairwise(parts):
        assert sum(part) + following[0] > most


@pytest.mark.parametrize("count", [2, 1000])
def test_the_order_is_mixed(count: int) -> None:
    firsts = Counter(of_step(seed, 0, count, 1)[0] for seed in range(200))
    assert len(firsts) > min(count, 100) // 2
