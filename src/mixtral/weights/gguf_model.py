"""A Mixtral in a GGUF file: which file of a folder it is, and its config from the metadata and back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.gguf import MAGIC, Gguf

__all__ = ["config_from_gguf", "find_gguf", "to_metadata"]

_KEYS: Mapping[str, str] = {
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_hidden_layers",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.rope.dimension_count": "head_dim",
    "llama.expert_count": "num_local_experts",
    "llama.expert_used_count": "num_experts_per_tok",
    "llama.context_length": "max_position_embeddings",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
}
_OPTIONAL = {"llama.rope.dimension_count", "llama.rope.freq_base"}
_TOKENS = "tokenizer.ggml.tokens"
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: the file itself, or the only one (or first part) in a folder; None if none.

    Raises:
        CheckpointError: the folder holds several models.
    """
    if path.is_file():
        with path.open("rb") as file:
            return path if file.read(4) == MAGIC or path.suffix == ".gguf" else None
    found = sorted(item for item in path.glob("*.gguf") if not _LATER_PART.search(item.name))
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: holds {len(found)} models in GGUF ({', '.join(item.name for item in found[:8])}); give the path "
            "of one of them"
        )
    return found[0] if found else None


def config_from_gguf(found: Gguf, source: str) -> MixtralConfig:
    """The config in the metadata; a Mixtral is a ``llama`` with at least two experts.

    Raises:
        ConfigError: it is another model, or a key is missing or wrong.

    Warns:
        UserWarning: the context is that of 8x7B in a model of the size of 8x22B.
    """
    metadata = found.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != "llama":
        raise ConfigError(f"{source}: architecture is {architecture!r:.40}; a Mixtral is 'llama' with experts")
    experts = metadata.get("llama.expert_count", 0)
    if not isinstance(experts, int) or experts < 2:
        raise ConfigError(f"{source}: a dense model (llama.expert_count is {experts!r:.40}); a Mixtral has experts")
    missing = [key for key in _KEYS if key not in metadata and key not in _OPTIONAL]
    if missing:
        raise ConfigError(f"{source}: the metadata has no {missing[0]}", param=missing[0])
    values = {ours: _number(metadata[key], key, source) for key, ours in _KEYS.items() if key in metadata}
    values["vocab_size"] = _vocab_size(found, source)
    for key, ours in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            values[ours] = metadata[f"tokenizer.ggml.{key}_token_id"]
    if (values["num_hidden_layers"], values["max_position_embeddings"]) == (56, 32768):
        warnings.warn(
            f"{source}: says a context of 32,768, which old converters wrote for every Mixtral; 8x22B was trained for "
            "65,536",
            stacklevel=2,
        )
    return MixtralConfig.from_dict(values, source=source)


def _number(value: Any, key: str, source: str) -> Any:
    """A float32 of the file as the decimal number that it came from: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{source}: {key} is {value!r:.40}; expected a number", param=key)
    with np.errstate(over="ignore"):  # infinity is refused with the other numbers
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _vocab_size(found: Gguf, source: str) -> int:
    tokens = found.metadata.get(_TOKENS)
    if isinstance(tokens, list):
        return len(tokens)
    size = found.metadata.get("llama.vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{source}: the metadata has neither {_TOKENS} nor llama.vocab_size", param=_TOKENS)
    return size


def to_metadata(config: MixtralConfig, name: str) -> dict[str, Any]:
    """The metadata of a model, without that of its tokenizer."""
    return {
        "general.architecture": "llama",
        "general.name": name,
        "general.quantization_version": 2,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        **{key: getattr(config, ours) for key, ours in _KEYS.items()},
    }
