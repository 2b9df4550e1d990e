"""Two ranks, and four, that serve all tests of this folder; a run small enough to train in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pool import Ranks, started

Tables = dict[str, dict[str, Any]]
NANO: Tables = {
    "model": {
        "vocab_size": 32768,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
    },
    "data": {"documents_per_step": 4, "trained_rows": 1400, "sample_documents": 200},
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
