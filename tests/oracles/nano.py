"""The sizes of a run that trains in a test."""

from __future__ import annotations

from typing import Any

MODEL: dict[str, Any] = {
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
}
DATA: dict[str, Any] = {"documents_per_step": 4, "trained_rows": 1400, "sample_documents": 200}
