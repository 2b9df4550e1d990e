"""Two ranks, and four, that serve all tests of this folder; a run small enough to train in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from nano import DATA, MODEL
from pool import Ranks, started

Tables = dict[str, dict[str, Any]]
NANO: Tables = {
    "model": MODEL,
    "data": DATA,
    "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "balance_scope": "global"},
    "run": {"steps": 4, "save_every": 2, "keep_last": 9, "dtype": "float32", "threads": 1},
}


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    with started(2) as ranks:
        ranks("jobs:parity", "dp=2")  # imports, and first calls of everything
        yield ranks


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    with started(4) as ranks:
        ranks("jobs:parity", "dp=4")
        yield ranks


@pytest.fixture(scope="session")
def nano() -> Callable[..., Tables]:
    """``nano(optim={...}, run={...})``: the tables of the nano configuration with some values changed."""

    def make(**changes: dict[str, Any]) -> Tables:
        return {name: table | changes.get(name, {}) for name, table in NANO.items()}

    return make
