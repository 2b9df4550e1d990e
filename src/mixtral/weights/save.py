"""Model -> checkpoint folder that transformers and this package open, in either style of names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.commit import Commit
from mixtral.files.safetensors import INDEX_NAME, Record, write_shard
from mixtral.model.mixtral import Mixtral
from mixtral.quant.modules import PackedEmbedding, PackedExperts, PackedLinear, SharedEmbedding, SharedHead
from mixtral.weights.consolidated import PARAMS_NAME, STEM, pickled_files, to_params
from mixtral.weights.names import Layout, Piece, is_router, parameter_shapes, tensors

__all__ = ["WRITABLE", "check_folder", "checked_parameters", "save_model", "to_json", "weight_files", "write_folder"]

WRITABLE: tuple[Layout, ...] = ("per-expert", "fused", "consolidated")


def save_model(
    model: Mixtral,
    folder: Path,
    *,
    layout: Layout = "per-expert",
    shard_size_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write the config and safetensors, complete or not at all. Tensors keep their dtype.

    A router (fp32 in memory) is written in the dtype of the other weights if that loses nothing, else in fp32.

    Raises:
        ConfigError: the layout is not one of ``WRITABLE``.
        CheckpointError: the folder is not empty (and not ``overwrite``), cannot be written, or the model is not a plain
            Mixtral.
    """
    folder = Path(folder)
    if layout not in WRITABLE:
        raise ConfigError(f"layout is {layout!r}; expected one of {', '.join(WRITABLE)}", param="layout")
    if shard_size_bytes < 1:
        raise CheckpointError(f"shard_size_bytes is {shard_size_bytes}; expected at least 1", param="shard_size_bytes")
    try:
        check_folder(folder, overwrite=overwrite)
        _write(model, folder, layout, shard_size_bytes)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a path that is no folder, or a folder with files in it unless ``overwrite``."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: not empty; choose another folder, or overwrite it explicitly")


def _write(model: Mixtral, folder: Path, layout: Layout, shard_size_bytes: int) -> None:
    parameters = checked_parameters(model)
    dtype = next(value.dtype for name, value in parameters.items() if not is_router(name))
    records = [_record(tensor, parameters[tensor[0].parameter], dtype) for tensor in tensors(model.config, layout)]
    write_folder(folder, model.config, layout, records, shard_size_bytes=shard_size_bytes)


def write_folder(
    folder: Path,
    config: MixtralConfig,
    layout: Layout,
    records: Sequence[Record],
    *,
    shard_size_bytes: int,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write config and safetensors of one of the ``WRITABLE`` layouts, complete or not at all; files of another
    checkpoint go. Mistral's tools want all tensors in one file, so ``shard_size_bytes`` counts only for the others.
    ``extra`` goes into ``config.json``.

    Raises:
        OSError: the folder cannot be written; it is as it was.
    """
    stem = STEM if layout == "consolidated" else "model"
    shards = [list(records)] if layout == "consolidated" else list(_shards(records, shard_size_bytes))
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    with Commit(folder) as commit:
        for name, shard in zip(names, shards, strict=True):
            write_shard(commit.path(name), shard, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
            sizes = {"total_size": sum(item.size_bytes for item in records)}
            commit.path(INDEX_NAME).write_text(to_json({"metadata": sizes, "weight_map": weight_map}), encoding="utf-8")
        if layout == "consolidated":
            commit.path(PARAMS_NAME).write_text(to_json(to_params(config)), encoding="utf-8")
        else:
            floats = Counter(
                item.dtype for item in records if item.dtype.is_floating_point and "_scale" not in item.name
            )
            dtype = floats.most_common(1)[0][0]
            values = {**config.to_dict(), **(extra or {}), "torch_dtype": str(dtype).removeprefix("torch.")}
            commit.path("config.json").write_text(to_json(values), encoding="utf-8")
        commit.finish(remove=weight_files(folder))


def weight_files(folder: Path) -> list[str]:
    """Names of the files of a folder that hold weights or tell where they are, in any layout of a folder."""
    found = [path.name for stem in ("model", STEM) for path in folder.glob(f"{stem}-*-of-*.safetensors")]
    found += [f"{stem}.safetensors{end}" for stem in ("model", STEM) for end in ("", ".index.json")]
    return [*found, *pickled_files(folder)]


def checked_parameters(model: Mixtral) -> dict[str, Tensor]:
    """The parameters by name, if they are exactly those of a Mixtral, in memory, and all but the routers of one dtype.

    What is packed is decoded to the dtype of the model, all of it, which takes as much memory.

    Raises:
        CheckpointError: naming the first parameter that is not.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        if isinstance(module, PackedEmbedding | PackedExperts | PackedLinear | SharedEmbedding | SharedHead):
            parameters |= {f"{prefix}.{name}": value for name, value in module.decoded(model.dtype).items()}
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


def _record(tensor: Sequence[Piece], parameter: Tensor, dtype: torch.dtype) -> Record:
    first = tensor[0]
    if is_router(first.parameter) and not torch.equal(parameter.detach().to(dtype).float(), parameter.detach()):
        dtype = parameter.dtype
    return Record(
        first.name, dtype, first.tensor_shape, lambda: (piece.to_file(piece.of(parameter)) for piece in tensor)
    )


def _shards(records: Sequence[Record], size_bytes: int) -> Iterator[list[Record]]:
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
