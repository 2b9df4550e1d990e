"""A model as one GGUF file with merged experts, as llama.cpp reads it: formats, metadata, bytes of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.blocks import encode
from mixtral.weights.commit import Commit
from mixtral.weights.gguf_model import to_metadata
from mixtral.weights.gguf_write import GgufRecord, write_gguf
from mixtral.weights.matrices import Matrices
from mixtral.weights.names import Piece, is_router, tensors

__all__ = ["FORMS", "checked_format", "gguf_records", "write_gguf_model"]

# What a user calls it -> the format of the matrices, and llama.cpp's number for such a file (``llama_ftype``).
FORMS: Mapping[str, tuple[str, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3),
    "q5_0": ("Q5_0", 8),
    "q5_1": ("Q5_1", 9),
}
_FILE_TYPES = {name: number for name, number in FORMS.values()}


def checked_format(form: str | None) -> str | None:
    """The form, if there is one of that name.

    Raises:
        ConfigError: there is none.
    """
    if form is not None and form not in FORMS:
        raise ConfigError(f"format is {form!r}; expected one of {', '.join(FORMS)}", param="format")
    return form


def gguf_records(source: Matrices, form: str | None) -> list[GgufRecord]:
    """Every tensor of the file, in order; nothing is read yet.

    Raises:
        CheckpointError: matrices that share a tensor in the file have several formats, and no form was chosen.
    """
    return [_record(source, tensor, form) for tensor in tensors(source.config, "gguf")]


def _record(source: Matrices, tensor: Sequence[Piece], form: str | None) -> GgufRecord:
    first = tensor[0]
    found = source.formats(tensor)
    if len(first.tensor_shape) == 1 or is_router(first.parameter):
        chosen = "F32"
    elif form is not None:
        chosen = FORMS[form][0]
    elif len(found) == 1:
        chosen = next(iter(found))
    else:
        raise CheckpointError(
            f"{first.name!r} would be made of {', '.join(sorted(found))}; choose one format for the result",
            param="format",
        )
    return GgufRecord(
        first.name, chosen, first.tensor_shape, lambda: _parts(source, tensor, chosen, same=found == {chosen})
    )


def _parts(source: Matrices, tensor: Sequence[Piece], form: str, *, same: bool) -> Iterator[Tensor]:
    for piece in tensor:
        rows = source.blocks(piece) if same else None
        yield encode(source.values(piece, torch.float32), form) if rows is None else rows


def write_gguf_model(
    path: Path,
    config: MixtralConfig,
    vocabulary: Mapping[str, Any],
    records: Sequence[GgufRecord],
    progress: Callable[[int, int], None],
) -> int:
    """Write the file, complete or not at all; returns the bytes of its tensors.

    Raises:
        OSError: it cannot be written.
    """
    counts: dict[str, int] = {}
    for item in records:
        if len(item.shape) > 2:  # the experts, which are nearly all of the file
            counts[item.format] = counts.get(item.format, 0) + item.size_bytes
    metadata = to_metadata(config, path.stem)
    kind = max(counts, key=lambda name: counts[name])
    if kind in _FILE_TYPES:
        metadata["general.file_type"] = _FILE_TYPES[kind]
    with Commit(path.parent) as commit:
        write_gguf(commit.path(path.name), {**metadata, **vocabulary}, records, progress=progress)
        commit.finish()
    return sum(item.size_bytes for item in records)
