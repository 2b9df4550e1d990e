"""Checkpoint -> model: every tensor of the files is used once, every parameter is filled once."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.read import DTYPES, Entry, ShardReader
from mixtral.model.mixtral import Mixtral
from mixtral.weights.checkpoint import FLOAT_DTYPES, Checkpoint, open_checkpoint, unchanged
from mixtral.weights.names import Piece, is_router

__all__ = ["checked_dtype", "dtype_of", "load_model", "place"]

_NAMED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def load_model(
    path: Path, *, device: torch.device | str, dtype: torch.dtype | None = None, unpickle: bool = False
) -> Mixtral:
    """Load a checkpoint of any layout. ``dtype`` None keeps the file's own; routers are fp32.

    Raises:
        ConfigError: the config is missing or wrong, or ``dtype`` is not float32, float16 or bfloat16.
        CheckpointError: the files are missing or damaged, do not fit the config, or are pickled and not ``unpickle``.
    """
    path = Path(path)
    if dtype is not None:
        checked_dtype(dtype)
    with unchanged(path):
        found = open_checkpoint(path, unpickle=unpickle)
        model = Mixtral(found.config, device="meta", dtype=dtype or _own_dtype(found))
        _fill(model, found, torch.device(device))
    return model


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name; a dtype and None are given back.

    Raises:
        ConfigError: the name is unknown.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in _NAMED:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(_NAMED)}", param="dtype")
    return _NAMED[dtype]


def checked_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype, if a model can have it.

    Raises:
        ConfigError: it is not float32, float16 or bfloat16.
    """
    if dtype not in [DTYPES[name] for name in FLOAT_DTYPES]:
        raise ConfigError(f"dtype is {dtype}; a model is bfloat16, float16 or float32", param="dtype")
    return dtype


def place(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of the parameter of that name."""
    owner, _, leaf = name.rpartition(".")
    wanted = model.get_parameter(name).requires_grad
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=wanted))


def _own_dtype(found: Checkpoint) -> torch.dtype:
    """The dtype that all tensors have; GGUF files keep norms in float32 whatever the rest is in."""
    names = {p.name for p in found.plan if not is_router(p.parameter) and (len(p.shape) > 1 or not found.metadata)}
    counts = Counter(found.entries[name].dtype for name in names)
    packed = sorted(name for name in counts if name not in DTYPES)
    if packed:
        warnings.warn(
            f"{found.path}: the weights are {', '.join(packed)}, and are decoded to bfloat16 in memory; dtype= chooses "
            "another one",
            stacklevel=3,
        )
        return torch.bfloat16
    if len(counts) > 1:
        told = ", ".join(f"{count} tensors of {name}" for name, count in counts.most_common())
        raise CheckpointError(f"the checkpoint mixes dtypes ({told}); choose one with dtype=", param="dtype")
    return DTYPES[next(iter(counts))]


def _fill(model: Mixtral, found: Checkpoint, device: torch.device) -> None:
    """Allocate and fill one parameter after the other, in the order in which the files hold them."""
    by_parameter: dict[str, list[Piece]] = {}
    for piece in found.plan:
        by_parameter.setdefault(piece.parameter, []).append(piece)

    def position(name: str) -> tuple[Path, int]:
        return min((found.entries[piece.name].shard, found.entries[piece.name].start) for piece in by_parameter[name])

    with ShardReader() as reader, torch.no_grad():
        for name in sorted(by_parameter, key=position):
            wanted = model.get_parameter(name)
            # Not empty_like: the first operation on a meta tensor imports 0.4 s worth of modules.
            value = torch.empty(wanted.shape, dtype=wanted.dtype, device=device)
            for piece in by_parameter[name]:
                _read(reader, found.entries[piece.name], piece, piece.of(value))
            place(model, name, value)


def _read(reader: ShardReader, entry: Entry, piece: Piece, target: torch.Tensor) -> None:
    if piece.order == "same":
        reader.read(entry, target, first=piece.first)
        return
    values = torch.empty(piece.shape, dtype=target.dtype, device=target.device)
    reader.read(entry, values, first=piece.first)
    target.copy_(piece.to_ours(values))
