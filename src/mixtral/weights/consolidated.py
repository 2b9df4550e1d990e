"""Mistral's own folders: ``params.json`` beside ``consolidated.*``, as safetensors or as pickled archives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.pth import read_archives
from mixtral.files.read import Entry
from mixtral.files.safetensors import inside, read_checkpoint, read_json

__all__ = ["PARAMS_NAME", "STEM", "from_params", "pickled_files", "read_consolidated", "read_params", "to_params"]

PARAMS_NAME = "params.json"
STEM = "consolidated"

_KEYS: Mapping[str, str] = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
}
_MOE_KEYS: Mapping[str, str] = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
# The files rarely say how long a context the model was trained for; the size of the model does.
_CONTEXTS: Mapping[tuple[int, int], int] = {(4096, 32): 32768, (6144, 56): 65536}
_DEFAULT_CONTEXT = 32768


def read_params(folder: Path) -> MixtralConfig:
    """The config in ``params.json``, whose keys are Mistral's, or those of ``config.json`` in the eight-file form.

    Raises:
        ConfigError: it is missing, unreadable, lacks a key or has an unknown one, or describes no Mixtral.
    """
    path = folder / PARAMS_NAME
    if not path.exists():
        raise ConfigError(f"{path}: no such file; {STEM}.* needs it beside it")
    try:
        values = read_json(inside(folder, PARAMS_NAME), PARAMS_NAME)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    return from_params(values)


def from_params(values: Mapping[str, Any], *, source: str = PARAMS_NAME) -> MixtralConfig:
    """The config that the contents of a ``params.json`` describe.

    Raises:
        ConfigError: as ``read_params``.
    """
    if "dim" not in values:
        found = dict(values)
    else:
        found = {_KEYS.get(key, key): value for key, value in values.items() if key != "moe"}
        moe = values.get("moe")
        if not isinstance(moe, Mapping) or moe.keys() != _MOE_KEYS.keys():
            raise ConfigError(
                f"{source}: moe is {moe!r:.80}; expected an object with num_experts and num_experts_per_tok: a Mixtral "
                "has experts",
                param="moe",
            )
        found |= {_MOE_KEYS[key]: value for key, value in moe.items()}
    if "max_seq_len" in found:
        found["max_position_embeddings"] = found.pop("max_seq_len")
    found.setdefault("max_position_embeddings", _context(found))
    return MixtralConfig.from_dict(found, source=source)


def _context(found: Mapping[str, Any]) -> int:
    size = (found.get("hidden_size"), found.get("num_hidden_layers"))
    return next((context for known, context in _CONTEXTS.items() if known == size), _DEFAULT_CONTEXT)


def to_params(config: MixtralConfig) -> dict[str, Any]:
    """The contents of a ``params.json``; the context is only in it where the size of the model does not tell it."""
    values = {ours: getattr(config, ours) for ours in (*_KEYS.values(), *_MOE_KEYS.values())}
    params: dict[str, Any] = {theirs: values[ours] for theirs, ours in _KEYS.items()}
    params["moe"] = {theirs: values[ours] for theirs, ours in _MOE_KEYS.items()}
    if config.max_position_embeddings != _context(values):
        params["max_seq_len"] = config.max_position_embeddings
    return params


def pickled_files(folder: Path) -> list[str]:
    """Names of the ``consolidated.*`` archives of a folder that only an unpickler can read, in order."""
    return sorted(path.name for path in folder.glob(f"{STEM}.*") if path.suffix in (".pth", ".pt"))


def read_consolidated(folder: Path, *, unpickle: bool) -> dict[str, Entry]:
    """Every tensor of ``consolidated.*`` in a folder.

    Raises:
        CheckpointError: there is none, or safetensors and archives side by side, or an archive and not ``unpickle``, or
            a file is damaged.
    """
    archives = pickled_files(folder)
    safe = sorted(path.name for path in folder.glob(f"{STEM}*.safetensors*"))
    if archives and safe:
        raise CheckpointError(f"{folder} holds both {safe[0]} and {archives[0]}; keep one of the two checkpoints")
    if not archives:
        return read_checkpoint(folder, STEM)
    if not unpickle:
        raise CheckpointError(
            f"{archives[0]}: a pickled archive, and a pickle can carry code. Convert it where that does no harm, with "
            "mixtral convert --unpickle, or take a safetensors file"
        )
    return read_archives([inside(folder, name) for name in archives])
