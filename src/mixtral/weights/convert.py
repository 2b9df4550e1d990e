"""From one layout to another, a matrix at a time: values are moved, permuted or transposed, rounded only when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.read import DTYPES
from mixtral.files.safetensors import Record
from mixtral.quant.mixes import mix_of
from mixtral.quant.rtn import IntForm, int_form
from mixtral.weights.checkpoint import open_checkpoint, unchanged
from mixtral.weights.compact import is_compact, load_compact
from mixtral.weights.gguf_save import gguf_records, write_gguf_model
from mixtral.weights.importance import Coverage, coverage, read_importance
from mixtral.weights.integer_save import integer_config, integer_records, is_integer_piece, kept_integers
from mixtral.weights.load import checked_dtype
from mixtral.weights.matrices import CheckpointMatrices, Matrices, ModelMatrices
from mixtral.weights.names import Layout, Piece, is_router, tensors
from mixtral.weights.save import WRITABLE, check_folder, write_folder

__all__ = ["Change", "Moved", "convert", "convert_to_gguf", "opened"]

Progress = Callable[[int, int], None]
"""Called with the bytes of tensors that are written, and those that will be in the end."""

Change = Callable[[Matrices], Matrices]
"""What becomes of the matrices between reading and writing."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What a conversion did: layout and tensors of the source, config of the result, bytes of the tensors written, and
    what importance there was for them."""

    layout: str
    tensors: int
    config: MixtralConfig
    size_bytes: int
    coverage: Coverage | None = None


def convert(
    source: Path,
    folder: Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    form: str | None = None,
    vocab_size: int | None = None,
    unpickle: bool = False,
    overwrite: bool = False,
    shard_size_bytes: int = 5 * 10**9,
    change: Change = lambda matrices: matrices,
    progress: Progress = lambda done, total: None,
) -> Moved:
    """Read a checkpoint of any layout and write it in one of the ``WRITABLE`` ones, complete or not at all.

    At most one matrix of one expert, or one table, is in memory. Without ``dtype`` every tensor keeps its own, so the
    values are the same bit for bit. ``form`` is one of ``quant.rtn.INT_FORMS``, for the layout "per-expert": the
    matrices of attention and experts become integers. ``vocab_size`` moves between the vocabularies v1 (32,000) and v3
    (32,768). ``change`` stands between what is read and what is written.

    Raises:
        ConfigError: the config, layout, dtype or vocabulary is wrong.
        CheckpointError: the source is missing, damaged or pickled (and not ``unpickle``); the folder is not empty (and
            not ``overwrite``) or cannot be written; or values do not fit ``dtype``.
    """
    source, folder = Path(source), Path(folder)
    if layout not in WRITABLE:
        raise ConfigError(f"layout is {layout!r}; expected one of {', '.join(WRITABLE)}", param="layout")
    if dtype is not None:
        checked_dtype(dtype)
    integers = None if form is None else int_form(form)
    if integers is not None and layout != "per-expert":
        raise ConfigError(f"layout is {layout!r}; integers are written as 'per-expert'", param="layout")
    with _told(folder):
        if folder.exists() and source.exists() and folder.samefile(source):
            raise CheckpointError(f"{folder}: is what would be read; choose another folder for the result")
        check_folder(folder, overwrite=overwrite)
        with opened(source, vocab_size=vocab_size, unpickle=unpickle) as (matrices, told):
            found = change(matrices)
            counter = _Counter(progress)
            records, extra = _records(found, layout, dtype, integers, counter)
            counter.total = sum(record.size_bytes for record in records)
            write_folder(folder, found.config, layout, records, shard_size_bytes=shard_size_bytes, extra=extra)
            return Moved(*told, found.config, counter.total)


def convert_to_gguf(
    source: Path,
    path: Path,
    *,
    vocabulary: Callable[[int], Mapping[str, Any]],
    form: str | None = None,
    importance: Path | None = None,
    vocab_size: int | None = None,
    unpickle: bool = False,
    overwrite: bool = False,
    change: Change = lambda matrices: matrices,
    progress: Progress = lambda done, total: None,
) -> Moved:
    """Read a checkpoint of any layout and write one GGUF file with merged experts, complete or not at all.

    Without ``form`` every matrix keeps its format, blocks bit for bit; else it is one of ``quant.mixes.MIXES``. Norms
    and routers are float32. ``vocabulary`` gives the metadata of the tokenizer for a number of token ids, and
    ``importance`` is a file that says how much the columns of each matrix matter.

    Raises:
        ConfigError: the config, the form or the vocabulary is wrong, or no matrix can use the importance.
        CheckpointError: as ``convert``; or the file exists and not ``overwrite``.
    """
    source, path = Path(source), Path(path)
    mix = None if form is None else mix_of(form)
    with _told(path):
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; give the name of the file to write")
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path}: exists; choose another name, or overwrite it explicitly")
        if path.exists() and source.exists() and path.samefile(source):
            raise CheckpointError(f"{path}: is what would be read; choose another name for the result")
        with opened(source, vocab_size=vocab_size, unpickle=unpickle) as (matrices, told):
            found = change(matrices)
            weights = None if importance is None else read_importance(Path(importance), found.config)
            records = gguf_records(found, mix, weights)
            covered = None if weights is None else coverage(found, records, weights)
            metadata = {**vocabulary(found.config.vocab_size), **(weights.metadata() if weights else {})}
            size = write_gguf_model(path, found.config, metadata, mix, records, progress)
            return Moved(*told, found.config, size, covered)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or target}: {error.strerror or error}") from None


@contextmanager
def opened(
    source: Path, *, vocab_size: int | None = None, unpickle: bool = False
) -> Iterator[tuple[Matrices, tuple[str, int]]]:
    """The matrices of a checkpoint of any layout, its layout, and the number of its tensors.

    Raises:
        ConfigError, CheckpointError: as ``convert``.
    """
    if source.is_dir() and is_compact(source):
        model = load_compact(source, device="cpu").model
        if vocab_size not in (None, model.config.vocab_size):
            raise ConfigError(f"{source}: the compact format keeps its vocabulary", param="vocab_size")
        yield ModelMatrices(model), ("compact", sum(1 for _ in model.parameters()))
        return
    with unchanged(source):
        found = open_checkpoint(source, unpickle=unpickle)
        with CheckpointMatrices(found, vocab_size) as matrices:
            yield matrices, (found.layout, len(found.entries))


class _Counter:
    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self.total = progress, 0, 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self.total)


def _records(
    source: Matrices, layout: Layout, dtype: torch.dtype | None, form: IntForm | None, counter: _Counter
) -> tuple[list[Record], dict[str, Any]]:
    """What is written, and what the config says about it besides the sizes of the model."""
    wanted = tensors(source.config, layout)
    if form is None:
        return [_record(source, tensor, dtype, counter) for tensor in wanted], {}
    brought = kept_integers(source, [piece for tensor in wanted for piece in tensor if is_integer_piece(piece)], form)
    records: list[Record] = []
    for tensor in wanted:
        if is_integer_piece(tensor[0]):
            records += integer_records(source, tensor[0], form, brought, counter.add)
        else:
            # The dtype of the scales, where a table is quantised in the source and nobody chose one.
            packed = not source.formats(tensor) <= DTYPES.keys()
            records.append(_record(source, tensor, torch.float16 if packed and dtype is None else dtype, counter))
    return records, {"quantization_config": integer_config(form, brought)}


def _record(source: Matrices, tensor: Sequence[Piece], dtype: torch.dtype | None, counter: _Counter) -> Record:
    first = tensor[0]
    found = source.formats(tensor)
    own = DTYPES.get(next(iter(found))) if len(found) == 1 else None
    # A router keeps what it has: it is small, and the one matrix whose rounding changes which experts are chosen.
    chosen = (None if is_router(first.parameter) else dtype) or own
    if chosen is None:
        raise CheckpointError(
            f"{first.name!r} would be made of quantised values or of several dtypes; choose one for the result "
            "(float32 holds every value exactly)",
            param="dtype",
        )
    return Record(first.name, chosen, first.tensor_shape, lambda: _parts(source, tensor, chosen, counter))


def _parts(source: Matrices, tensor: Sequence[Piece], dtype: torch.dtype, counter: _Counter) -> Iterator[Tensor]:
    for piece in tensor:
        values = source.values(piece, dtype)
        yield values
        counter.add(values.numel() * values.itemsize)
