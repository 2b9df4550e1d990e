"""A run small enough to train in a test: two layers of width 32 over the town desk's own documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mixtral.tokenizer import Tokenizer
from mixtral.train.config import DataConfig, PretrainConfig
from mixtral.train.data import choose_trained_ids

NANO: Mapping[str, dict[str, Any]] = {
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
    "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
    "run": {"steps": 6, "save_every": 3, "dtype": "float32", "threads": 1},
}


@pytest.fixture(scope="session")
def nano() -> Callable[..., PretrainConfig]:
    """``nano(data={...}, run={...})``: the nano configuration with some values changed."""

    def make(**changes: dict[str, Any]) -> PretrainConfig:
        tables = {name: table | changes.get(name, {}) for name, table in NANO.items()}
        return PretrainConfig.from_dict(tables, source="nano")

    return make


@pytest.fixture(scope="session")
def trained_ids() -> list[int]:
    config = DataConfig(trained_rows=1400, sample_documents=200)
    return choose_trained_ids(Tokenizer.from_version("v3"), config)
