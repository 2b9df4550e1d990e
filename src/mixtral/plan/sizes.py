"""Parameter counts, bytes of weights and of key-value cache: exact formulas over the config.

D width, L layers, H query heads, G key-value heads, K head size, F expert hidden size, E experts, A experts per token,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError

__all__ = [
    "PRECISIONS",
    "ParameterCounts",
    "Precision",
    "TensorCounts",
    "count_parameters",
    "count_tensors",
    "expected_experts",
    "kv_bytes",
    "kv_bytes_per_token",
    "memory_bytes",
    "overlap_chance",
    "step_cost",
    "weight_bytes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """How many parameters each part of the model has, over all layers."""

    embedding: int  # the input table; the output head is a second table of the same size
    head: int
    attention: int
    routers: int
    norms: int
    expert_in_one_layer: int
    expert_in_all_layers: int
    experts: int
    active_experts: int

    @property
    def shared(self) -> int:
        """Everything except the experts."""
        return self.embedding + self.head + self.attention + self.routers + self.norms

    @property
    def total(self) -> int:
        """All parameters."""
        return self.shared + self.experts

    @property
    def active(self) -> int:
        """Parameters that take part in the computation of one token."""
        return self.shared + self.active_experts

    @property
    def read_per_token(self) -> int:
        """Parameters read to decode a token: the active ones without the embedding table, of which it reads a row."""
        return self.active - self.embedding

    @property
    def one_expert_model(self) -> int:
        """A model with one expert per layer and the shared rest: what "8x7B" has eight of."""
        return self.shared + self.expert_in_all_layers


def count_parameters(config: MixtralConfig) -> ParameterCounts:
    """Exact parameter counts of a config."""
    width, layers = config.hidden_size, config.num_hidden_layers
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    table = config.vocab_size * width
    expert = 3 * width * config.intermediate_size
    return ParameterCounts(
        embedding=table,
        head=table,
        attention=layers * (2 * width * q_width + 2 * width * kv_width),
        routers=layers * config.num_local_experts * width,
        norms=(2 * layers + 1) * width,
        expert_in_one_layer=expert,
        expert_in_all_layers=layers * expert,
        experts=layers * config.num_local_experts * expert,
        active_experts=layers * config.num_experts_per_tok * expert,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCounts:
    """How many tensors a checkpoint has in each layout."""

    per_expert: int  # three tensors for each expert
    fused: int  # gate_up_proj and down_proj of all experts stacked
    gguf: int  # gate, up and down of all experts stacked


def count_tensors(config: MixtralConfig) -> TensorCounts:
    """Tensors per layer: two norms, four projections, one router, and the experts; three more outside the layers."""
    layers = config.num_hidden_layers
    return TensorCounts(
        per_expert=3 + layers * (7 + 3 * config.num_local_experts), fused=3 + layers * 9, gguf=3 + layers * 10
    )


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits per value, scales included, of the matrices (attention, experts) and of the rest (tables, norms)."""

    matrix_bits: float
    rest_bits: int
    router_bits: int
    meaning: str


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(32, 32, 32, "32-bit floats"),
    "bf16": Precision(16, 16, 16, "16-bit floats"),
    "int8-g32": Precision(8.5, 16, 32, "8 bits, one fp16 scale per 32 values; tables and norms bf16, routers fp32"),
    "int4-g128": Precision(4.125, 16, 32, "4 bits, one fp16 scale per 128 values; tables and norms bf16, routers fp32"),
    "int4-g32": Precision(4.5, 16, 32, "4 bits, one fp16 scale per 32 values; tables and norms bf16, routers fp32"),
}


def weight_bytes(config: MixtralConfig, precision: str) -> int:
    """Bytes of the weights in files of that precision, headers not counted.

    Raises:
        ConfigError: the precision is unknown.
    """
    kind = _precision(precision)
    counts = count_parameters(config)
    matrices = counts.attention + counts.experts
    rest = counts.embedding + counts.head + counts.norms
    bits = matrices * kind.matrix_bits + rest * kind.rest_bits + counts.routers * kind.router_bits
    return math.ceil(bits / 8)


def memory_bytes(config: MixtralConfig, precision: str) -> int:
    """Bytes of the weights once loaded: as in files, but routers are always fp32.

    Raises:
        ConfigError: the precision is unknown.
    """
    routers = count_parameters(config).routers
    return weight_bytes(config, precision) + routers * (32 - _precision(precision).router_bits) // 8


def kv_bytes_per_token(config: MixtralConfig, *, bytes_per_value: int = 2) -> int:
    """Bytes of key-value cache that one token takes: 2 L G K values."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value


def kv_bytes(config: MixtralConfig, tokens: int, *, bytes_per_value: int = 2) -> int:
    """Bytes of key-value cache for that many tokens."""
    return tokens * kv_bytes_per_token(config, bytes_per_value=bytes_per_value)


def expected_experts(config: MixtralConfig, tokens: int) -> float:
    """How many distinct experts of a layer that many independent, uniformly routed tokens use on average."""
    missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** tokens
    return config.num_local_experts * (1 - missed)


def step_cost(config: MixtralConfig, tokens: int) -> float:
    """Weights read by a decoding step over ``tokens`` sequences, relative to a step over one."""
    counts = count_parameters(config)
    shared = counts.shared - counts.embedding
    return (shared + expected_experts(config, tokens) * counts.expert_in_all_layers) / counts.read_per_token


def overlap_chance(config: MixtralConfig) -> float:
    """Chance that two uniformly routed tokens have at least one expert of a layer in common."""
    experts, picked = config.num_local_experts, config.num_experts_per_tok
    return 1 - math.comb(experts - picked, picked) / math.comb(experts, picked)


def _precision(name: str) -> Precision:
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ConfigError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}") from None
