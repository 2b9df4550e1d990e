"""A model as one GGUF file with merged experts, as llama.cpp reads it: formats, metadata, bytes of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.files.commit import Commit
from mixtral.files.gguf_write import GgufRecord, write_gguf
from mixtral.files.read import DTYPES
from mixtral.quant.encode import encode_rows
from mixtral.quant.formats import FORMATS
from mixtral.quant.mixes import MIXES, Mix
from mixtral.weights.gguf_model import to_metadata
from mixtral.weights.importance import Importance
from mixtral.weights.matrices import Matrices, warn_again
from mixtral.weights.names import Piece, is_router, layer_of, tensors

__all__ = ["gguf_records", "write_gguf_model"]


def gguf_records(source: Matrices, mix: Mix | None, importance: Importance | None = None) -> list[GgufRecord]:
    """Every tensor of the file, in order; nothing is read yet. Without a mix every matrix keeps its format.
    ``importance`` is for matrices that are encoded, in a format that takes it.

    Raises:
        CheckpointError: matrices that share a tensor in the file have several formats, and no mix was chosen; or
            their rows do not divide into its blocks.

    Warns:
        UserWarning: matrices that are quantised already are quantised anew.
    """
    records: list[GgufRecord] = []
    again: set[str] = set()
    for tensor in tensors(source.config, "gguf"):
        records.append(_record(source, tensor, mix, importance))
        found, chosen = source.formats(tensor), records[-1].format
        if found != {chosen} and chosen not in DTYPES:
            again |= found - DTYPES.keys()
    warn_again(again)
    return records


def _record(source: Matrices, tensor: Sequence[Piece], mix: Mix | None, importance: Importance | None) -> GgufRecord:
    first = tensor[0]
    found = source.formats(tensor)
    if mix is not None:
        chosen = mix.of(first.parameter, layer_of(first.parameter), source.config.num_hidden_layers)
    elif len(first.tensor_shape) == 1 or is_router(first.parameter):
        chosen = "F32"
    elif len(found) == 1:
        chosen = next(iter(found))
    else:
        raise CheckpointError(
            f"{first.name!r} would be made of {', '.join(sorted(found))}; choose one format for the result",
            param="format",
        )
    if chosen not in FORMATS:
        raise CheckpointError(
            f"{first.name!r} would be made of {chosen} weights, which no GGUF format holds exactly; choose one for the "
            "result",
            param="format",
        )
    try:
        FORMATS[chosen].size_bytes(first.tensor_shape)
    except CheckpointError as error:
        raise CheckpointError(f"{first.name!r}: {error}; choose a format with smaller blocks, such as q8_0") from None
    return GgufRecord(
        first.name,
        chosen,
        first.tensor_shape,
        lambda: _parts(source, tensor, chosen, importance, same=found == {chosen}),
    )


def _parts(
    source: Matrices, tensor: Sequence[Piece], form: str, importance: Importance | None, *, same: bool
) -> Iterator[Tensor]:
    for piece in tensor:
        rows = source.blocks(piece) if same else None
        if rows is None:
            weights = None if importance is None else importance.of(piece)
            rows = encode_rows(_two(source.values(piece, torch.float32)), form, weights)
        yield rows


def _two(values: Tensor) -> Tensor:
    """A vector as a matrix of one row."""
    return values.view(-1, values.shape[-1])


def write_gguf_model(
    path: Path,
    config: MixtralConfig,
    vocabulary: Mapping[str, Any],
    mix: Mix | None,
    records: Sequence[GgufRecord],
    progress: Callable[[int, int], None],
) -> int:
    """Write the file, complete or not at all; returns the bytes of its tensors.

    Raises:
        OSError: it cannot be written.
    """
    metadata = to_metadata(config, path.stem)
    formats = {item.format for item in records if len(item.shape) > 2}  # of the experts, nearly all of the file
    kinds = [mix.file_type] if mix else [one.file_type for one in MIXES.values() if {one.base} == formats][:1]
    if kinds:
        metadata["general.file_type"] = kinds[0]
    with Commit(path.parent, only=path.name) as commit:
        write_gguf(commit.path(path.name), {**metadata, **vocabulary}, records, progress=progress)
        commit.finish()
    return sum(item.size_bytes for item in records)
