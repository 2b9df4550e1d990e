"""Two ranks that serve all tests of a folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Ranks, started


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    with started(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    with started(4) as ranks:
        yield ranks
