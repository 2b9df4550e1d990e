"""A model of random weights, written in any form in which we write models: quickly, and with little memory.

Norms are 1, routers random float32, all matrices random with a standard deviation of 0.02. That of the embedding is 1:
smaller rows drown in what attention adds to them, which is nearly the same at every position, and then all tokens go to
the same experts. A part of a tensor is made in the format of the file, written and forgotten; nothing is ever encoded.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.gguf_write import GgufRecord
from mixtral.files.safetensors import Record
from mixtral.quant.formats import FORMATS
from mixtral.quant.mixes import MIXES, Mix
from mixtral.quant.random_blocks import STD, random_blocks, random_bytes, random_scales
from mixtral.quant.recode import Kept
from mixtral.quant.rtn import INT_FORMS, IntForm
from mixtral.weights.gguf_save import write_gguf_model
from mixtral.weights.integer_save import integer_config, is_integer_piece
from mixtral.weights.names import EMBEDDING, Piece, is_router, layer_of, tensors
from mixtral.weights.save import check_folder, weight_files, write_folder

__all__ = ["FORMS", "Created", "create_model"]

FLOAT_FORMS: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMS = (*MIXES, *INT_FORMS)
_PART_BYTES = 1 << 22  # made at a time: it stays in the cache until it is written
_HEADERS = 1 << 24  # room for headers, index and vocabulary, generously
_SHARD_BYTES = 5 * 10**9
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Created:
    """What was written: the GGUF file or the folder to be loaded, its tensors and their bytes."""

    path: Path
    tensors: int
    size_bytes: int


def create_model(
    config: MixtralConfig,
    target: Path,
    *,
    form: str,
    name: str,
    vocabulary: Callable[[int], Mapping[str, Any]],
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Created:
    """Write a model, complete or not at all; the same arguments give the same bytes.

    ``form`` is one of ``FORMS``. Where ``target`` ends in ``.gguf`` it is the GGUF file to write, else a folder. In a
    folder floats and integers are safetensors with Hugging Face's names per expert; a quantised mix is one file,
    ``NAME.FORM.gguf``. ``vocabulary`` gives the metadata of a GGUF file's tokenizer for a number of token ids.
    ``progress`` is told the bytes written and those in all.

    Raises:
        ConfigError: there is no such form, or not in a file of that kind; or the seed is negative.
        CheckpointError: ``target`` is there already (and not ``overwrite``) or cannot be written, the disk has too
            little room, or the rows do not divide into blocks of the form.
    """
    target = Path(target)
    if form not in FORMS:
        raise ConfigError(
            f"format is {form!r}; a GGUF file can be {', '.join(MIXES)}; a folder of safetensors "
            f"{', '.join((*FLOAT_FORMS, *INT_FORMS))}",
            param="format",
        )
    if seed < 0:
        raise ConfigError(f"seed is {seed}; expected 0 or more", param="seed")
    as_file = target.suffix == ".gguf"
    if as_file and form in INT_FORMS:
        raise ConfigError(f"{target}: no GGUF file holds {form}; give a folder, or choose another format")
    try:
        if as_file or (form not in FLOAT_FORMS and form not in INT_FORMS):
            path = target if as_file else target / f"{name}.{form}.gguf"
            _check_file(path, target, overwrite=overwrite)
            return _write_file(config, path, MIXES[form], vocabulary(config.vocab_size), seed, progress)
        check_folder(target, overwrite=overwrite)
        return _write_folder(config, target, form, seed, progress)
    except OSError as error:
        raise CheckpointError(f"{error.filename or target}: {error.strerror or error}") from None


def _check_file(path: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse to replace anything unasked, and to leave two models in a folder, of which a reader would pick one."""
    if path == target:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; give the name of the file to write, or another folder")
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path}: exists; choose another name, or overwrite it explicitly")
        return
    check_folder(target, overwrite=overwrite)
    if target.is_dir():
        names = {file.name for file in target.iterdir()}
        others = sorted(n for n in names if n != path.name and (n.endswith(".gguf") or n in weight_files(target)))
        if others:
            raise CheckpointError(f"{target}: holds another model ({', '.join(others[:8])}); choose another folder")


def _check_room(target: Path, needed: int) -> None:
    """Raise unless the disk of ``target`` has that many bytes left."""
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + _HEADERS:
        raise CheckpointError(
            f"{target}: needs {needed / 1e9:,.2f} GB, but its disk has {free / 1e9:,.2f} GB left; choose fewer layers, "
            "a smaller format or another disk"
        )


def _write_file(
    config: MixtralConfig,
    path: Path,
    mix: Mix,
    vocabulary: Mapping[str, Any],
    seed: int,
    progress: Callable[[int, int], None],
) -> Created:
    records = []
    for first, *_ in tensors(config, "gguf"):
        form = mix.of(first.parameter, layer_of(first.parameter), config.num_hidden_layers)
        _check_blocks(first, form)
        records.append(GgufRecord(first.name, form, first.tensor_shape, _raw(first, form, seed)))
    _check_room(path, sum(record.size_bytes for record in records))
    size = write_gguf_model(path, config, vocabulary, mix, records, progress)
    return Created(path, len(records), size)


def _check_blocks(piece: Piece, form: str) -> None:
    try:
        FORMATS[form].size_bytes(piece.tensor_shape)
    except CheckpointError as error:
        raise CheckpointError(
            f"{piece.name!r}: {error}; choose a format with smaller blocks, such as q8_0", param="format"
        ) from None


def _write_folder(
    config: MixtralConfig, folder: Path, form: str, seed: int, progress: Callable[[int, int], None]
) -> Created:
    dtype = FLOAT_FORMS.get(form, torch.bfloat16)
    records: list[Record] = []
    for first, *_ in tensors(config, "per-expert"):
        if form in INT_FORMS and is_integer_piece(first):
            records += _integers(first, INT_FORMS[form], seed)
        else:
            own = torch.float32 if is_router(first.parameter) else dtype
            records.append(Record(first.name, own, first.tensor_shape, _floats(first, own, seed)))
    total = sum(record.size_bytes for record in records)
    _check_room(folder, total)
    done = 0

    def told(record: Record) -> Record:
        def parts() -> Iterator[Tensor]:
            nonlocal done
            for part in record.parts():
                yield part
                done += part.numel() * part.itemsize
                progress(done, total)

        return Record(record.name, record.dtype, record.shape, parts)

    extra = {"quantization_config": integer_config(INT_FORMS[form], Kept(False, False))} if form in INT_FORMS else {}
    write_folder(
        folder, config, "per-expert", [told(one) for one in records], shard_size_bytes=_SHARD_BYTES, extra=extra
    )
    return Created(folder, len(records), total)


def _bits(name: str, seed: int) -> np.random.BitGenerator:
    """Of a tensor: its values do not depend on which others there are."""
    return np.random.SFC64([seed, zlib.crc32(name.encode())])


def _raw(piece: Piece, form: str, seed: int) -> Callable[[], Iterator[Tensor]]:
    """The bytes of a tensor, a part at a time; norms are 1."""
    kind = FORMATS[form]
    count = kind.size_bytes(piece.tensor_shape) // kind.bytes

    def parts() -> Iterator[Tensor]:
        if len(piece.shape) == 1:
            yield torch.ones(piece.shape, dtype=_dtype(form)).view(torch.uint8)
            return
        bits, step = _bits(piece.name, seed), _PART_BYTES // kind.bytes
        std = 1.0 if piece.parameter == EMBEDDING else STD
        for start in range(0, count, step):
            yield torch.from_numpy(random_blocks(form, min(step, count - start), bits, std=std)).view(-1)

    return parts


def _dtype(form: str) -> torch.dtype:
    return next(dtype for dtype, name in _NAMES.items() if name == form)


def _floats(piece: Piece, dtype: torch.dtype, seed: int) -> Callable[[], Iterator[Tensor]]:
    raw = _raw(piece, _NAMES[dtype], seed)
    return lambda: (part.view(dtype) for part in raw())


def _integers(piece: Piece, form: IntForm, seed: int) -> list[Record]:
    """The tensors of a matrix of integers, named and packed as compressed-tensors does."""
    rows, columns = piece.shape
    try:
        groups = columns // form.columns(columns)
    except CheckpointError as error:
        raise CheckpointError(f"{piece.name!r}: {error}", param="format") from None
    stem = piece.name.removesuffix(".weight")
    words = rows * columns * form.bits // 32

    def codes() -> Iterator[Tensor]:
        bits, step = _bits(f"{stem}.weight_packed", seed), _PART_BYTES // 4
        for start in range(0, words, step):
            yield torch.from_numpy(random_bytes(4 * min(step, words - start), bits)).view(torch.int32)

    def scales() -> Iterator[Tensor]:
        yield torch.from_numpy(random_scales(form.bits, rows * groups, _bits(f"{stem}.weight_scale", seed)))

    return [
        Record(f"{stem}.weight_packed", torch.int32, (rows, columns * form.bits // 32), codes),
        Record(f"{stem}.weight_shape", torch.int64, (2,), lambda: [torch.tensor([rows, columns])]),
        Record(f"{stem}.weight_scale", torch.float16, (rows, groups), scales),
    ]
