"""The sizes of a run that trains in a test."""

from __future__ import annotations

import json
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
DATA: dict[str, Any] = {
    "documents_per_step": 4,
    "trained_rows": 1400,
    "sample_documents": 200,
    "mixture": {"chat": 36, "calls": 20, "records": 14, "sums": 24, "story": 6},  # notes are long
}

_SMALL = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}


def toml(**changes: dict[str, Any]) -> str:
    """The file of a run for the command, smaller still, with these changes: tables by name."""
    tables: dict[str, dict[str, Any]] = {
        "model": MODEL | _SMALL,
        "data": DATA | {"trained_rows": 1300, "sample_documents": 100},
        "optim": {"warmup_steps": 1},
        "run": {"threads": 1},
    }
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_value(value)}" for key, value in (table | changes.get(name, {})).items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_value(inner)}' for key, inner in value.items())} }}"
    return json.dumps(value)
