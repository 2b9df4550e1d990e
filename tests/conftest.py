"""Fixtures for the whole test-suite: one torch thread, a tiny configuration, a seeded tiny model."""

from __future__ import annotations

import pytest
import torch

from mixtral.config import MixtralConfig
from mixtral.model import Mixtral, initialise

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the long tests of random requests are, and how often a training is killed."""
    parser.addoption(
        "--raw-requests", type=int, default=20_000, help="raw HTTP requests of tests/security/test_fuzz.py"
    )
    parser.addoption("--kills", type=int, default=10, help="kills in a save of tests/train/test_kills.py")


@pytest.fixture(scope="session")
def tiny_config() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )


@pytest.fixture
def tiny_model(tiny_config: MixtralConfig) -> Mixtral:
    model = Mixtral(tiny_config)
    initialise(model, seed=1, std=0.2)
    return model
