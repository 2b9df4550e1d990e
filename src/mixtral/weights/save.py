"""Model -> checkpoint folder that transformers and this package open, in either style of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mixtral.errors import CheckpointError, ConfigError
from mixtral.model.mixtral import Mixtral
from mixtral.weights.commit import Commit
from mixtral.weights.hf import INDEX_NAME, SINGLE_NAME, Record, write_shard
from mixtral.weights.names import Piece, Style, is_router, parameter_shapes, pieces

__all__ = ["checked_parameters", "save_model", "to_json", "weight_files"]


def save_model(
    model: Mixtral,
    folder: Path,
    *,
    style: Style = "per-expert",
    shard_size_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write ``config.json`` and sharded safetensors, complete or not at all. Tensors keep their dtype.

    A router (fp32 in memory) is written in the dtype of the other weights if that loses nothing, else in fp32.

    Raises:
        ConfigError: there is no such style.
        CheckpointError: the folder is not empty (and not ``overwrite``), cannot be written, or the model is not a plain
            Mixtral.
    """
    folder = Path(folder)
    if style not in get_args(Style):
        raise ConfigError(f"style is {style!r}; expected one of {', '.join(get_args(Style))}", param="style")
    if shard_size_bytes < 1:
        raise CheckpointError(f"shard_size_bytes is {shard_size_bytes}; expected at least 1", param="shard_size_bytes")
    try:
        _check_folder(folder, overwrite=overwrite)
        _write(model, folder, style, shard_size_bytes)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: not empty; choose another folder, or overwrite it explicitly")


def _write(model: Mixtral, folder: Path, style: Style, shard_size_bytes: int) -> None:
    parameters = checked_parameters(model)
    dtype = next(value.dtype for name, value in parameters.items() if not is_router(name))
    records = [_record(piece, parameters[piece.parameter], dtype) for piece in pieces(model.config, style)]
    shards = list(_shards(records, shard_size_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    with Commit(folder) as commit:
        for name, shard in zip(names, shards, strict=True):
            write_shard(commit.path(name), shard, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
            sizes = {"total_size": sum(item.size_bytes for item in records)}
            commit.path(INDEX_NAME).write_text(to_json({"metadata": sizes, "weight_map": weight_map}), encoding="utf-8")
        config = {**model.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
        commit.path("config.json").write_text(to_json(config), encoding="utf-8")
        commit.finish(remove=weight_files(folder))


def weight_files(folder: Path) -> list[str]:
    """Names of the files of a folder that hold weights or tell where they are, in any layout that is written here."""
    return [SINGLE_NAME, INDEX_NAME, *(path.name for path in folder.glob("model-*-of-*.safetensors"))]


def checked_parameters(model: Mixtral) -> dict[str, Tensor]:
    """The parameters by name, if they are exactly those of a Mixtral, in memory, and all but the routers of one dtype.

    Raises:
        CheckpointError: naming the first parameter that is not.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    expected = parameter_shapes(model.config)
    odd = sorted(parameters.keys() ^ expected.keys())
    if odd:
        what = "has no place in a checkpoint" if odd[0] in parameters else "is missing"
        raise CheckpointError(f"parameter {odd[0]!r} {what}; only a plain Mixtral can be saved")
    for name, value in parameters.items():
        if tuple(value.shape) != expected[name] or value.is_meta:
            raise CheckpointError(
                f"parameter {name!r} is {list(value.shape)} on {value.device}, not {list(expected[name])}"
            )
    dtypes = {str(value.dtype) for name, value in parameters.items() if not is_router(name)}
    if len(dtypes) > 1:
        raise CheckpointError(f"the parameters have several dtypes ({', '.join(sorted(dtypes))}); convert them to one")
    return parameters


def _record(piece: Piece, parameter: Tensor, dtype: torch.dtype) -> Record:
    if not is_router(piece.parameter):
        return Record(piece.name, dtype, piece.shape, _later(piece, parameter))
    lossless = torch.equal(parameter.detach().to(dtype).to(parameter.dtype), parameter.detach())
    return Record(piece.name, dtype if lossless else parameter.dtype, piece.shape, _later(piece, parameter))


def _later(piece: Piece, parameter: Tensor) -> Callable[[], Tensor]:
    return lambda: piece.of(parameter)


def _shards(records: list[Record], size_bytes: int) -> Iterator[list[Record]]:
    """Records in order, cut so that no shard exceeds the size, except by a single tensor that is larger."""
    shard: list[Record] = []
    used = 0
    for item in records:
        if shard and used + item.size_bytes > size_bytes:
            yield shard
            shard, used = [], 0
        shard.append(item)
        used += item.size_bytes
    if shard:
        yield shard


def to_json(values: dict[str, Any]) -> str:
    """The text of a small JSON file."""
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
