"""Importance ("imatrix") files, as ``llama-imatrix`` writes them: the squares of the inputs of each tensor, summed.

Two forms, told apart by their first bytes; all numbers are little-endian. GGUF, since July 2025: ``general.type`` is
"imatrix", and a tensor of the model has ``NAME.in_sum2`` (float32, the sums of its matrices one after the other) and
``NAME.counts`` (float32, the tokens that each matrix saw, or one number for all). Before that, without a magic number::

    int32 entries
    entries times:  int32 length, name; int32 calls; int32 n; n float32, sums of which 1 / calls is the mean
    int32 chunks; int32 length, name of the text         (later versions only)

Early writers left a tensor out if one of its experts saw no token; later ones gave such an expert the mean 1
throughout. Source: llama.cpp's ``tools/imatrix/imatrix.cpp`` and ``tools/quantize/quantize.cpp``. Every count is
compared with the size of the file before anything is allocated.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from mixtral.errors import CheckpointError
from mixtral.files.gguf import MAGIC, Gguf, read_gguf
from mixtral.files.read import Entry, ShardReader

__all__ = ["Imatrix", "Sums", "read_imatrix", "read_means"]

MAX_ENTRIES = 65_536
MAX_NAME_BYTES = 255
MAX_DATASET_BYTES = 65_535
_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4  # the shortest: a name of one letter and one value
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class Sums:
    """The entry of one tensor: where its sums are, and where its counts; in the older form the number of calls."""

    sums: Entry
    counts: Entry | int

    @property
    def size(self) -> int:
        """How many sums there are."""
        return math.prod(self.sums.shape)

    @property
    def count_size(self) -> int:
        """How many counts there are."""
        return 1 if isinstance(self.counts, int) else math.prod(self.counts.shape)


@dataclass(frozen=True, slots=True)
class Imatrix:
    """What a file holds: the entries by the name of the tensor, the chunks of text it was made from (0: not said), and
    the names of the texts, in which a byte that is not UTF-8 stands as a surrogate."""

    path: Path
    entries: dict[str, Sums]
    chunks: int
    datasets: tuple[str, ...]


def read_imatrix(path: Path) -> Imatrix:
    """Find the entries of a file of either form; the sums are not read.

    Raises:
        CheckpointError: no such file, another kind of file, or one that is truncated, damaged or says what cannot be.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected the importance file that llama-imatrix writes")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return _read_legacy(_Cursor(file, path), path)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from None
    return _from_gguf(read_gguf(path), path)


def read_means(found: Sums, matrices: int, reader: ShardReader) -> tuple[NDArray[np.float32], list[int | None]]:
    """The mean square of each input, [matrices, N], and the tokens that each matrix saw; None: the file does not say.

    Of a matrix that saw none (0) the row means nothing. The caller has compared the sizes with those of the model.

    Raises:
        CheckpointError: a number that is not finite, or a negative one.
    """
    sums = _numbers(found.sums, reader).reshape(matrices, -1)
    if isinstance(found.counts, int):
        counted, are_tokens = np.array([found.counts], np.float64), False
    else:
        # One count for several matrices is that of an older file that was read and written again.
        counted, are_tokens = _numbers(found.counts, reader), found.count_size == matrices
    counts = np.broadcast_to(counted, (matrices,))
    with np.errstate(over="ignore"):
        means = (sums / np.maximum(counts, np.finfo(np.float32).tiny)[:, None]).astype(np.float32)
    # What says the same of every input says nothing; 1 throughout is what writers put where there were no tokens.
    seen = (counts > 0) & (means > 0).any(axis=1) & (means != 1).any(axis=1)
    if not np.isfinite(means[seen]).all():
        raise CheckpointError(
            f"{found.sums.shard.name}: {found.sums.name!r}: sums up to {sums.max():.3g} over {counts.min():.3g} tokens "
            "have no mean in float32; the file is damaged"
        )
    told = [round(count) if are_tokens else None for count in counts.tolist()]
    return means, [count if saw else 0 for count, saw in zip(told, seen, strict=True)]


def _numbers(entry: Entry, reader: ShardReader) -> NDArray[np.float64]:
    """The values of a tensor of float32: finite and nowhere negative."""
    read = torch.empty(math.prod(entry.shape), dtype=torch.float32)
    reader.read(entry, read)
    values = read.numpy()
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        raise CheckpointError(
            f"{entry.shard.name}: value {bad[0]:,} of {entry.name!r} is {values[bad[0]]}; expected finite and >= 0"
        )
    return values.astype(np.float64)


def _from_gguf(found: Gguf, path: Path) -> Imatrix:
    label, metadata = path.name, found.metadata
    kind = metadata.get("general.type")
    if kind != "imatrix":
        raise CheckpointError(f"{label}: general.type is {kind!r:.40}; a file of importance has 'imatrix'")
    chunks = metadata.get("imatrix.chunk_count", 0)
    if type(chunks) is not int or chunks < 0:
        raise CheckpointError(f"{label}: imatrix.chunk_count is {chunks!r:.40}; expected a number of chunks")
    entries = {}
    # There may be more, such as the plain sums (in_sum) that later versions add.
    for name in dict.fromkeys(_stem(tensor) for tensor in found.tensors if _stem(tensor)):
        missing = [name + ending for ending in (_SUMS, _COUNTS) if name + ending not in found.tensors]
        if missing:
            raise CheckpointError(f"{label}: {missing[0]!r} is missing; sums and counts belong together")
        sums, counts = found.tensors[name + _SUMS], found.tensors[name + _COUNTS]
        for entry in (sums, counts):
            if entry.dtype != "F32":
                raise CheckpointError(f"{label}: {entry.name!r} is {entry.dtype}, expected F32")
        entries[name] = Sums(sums, counts)
    if not entries:
        raise CheckpointError(f"{label}: holds no tensor that ends in {_SUMS!r}; there is nothing to use")
    return Imatrix(path, entries, chunks, _datasets(metadata.get("imatrix.datasets", []), label))


def _stem(name: str) -> str:
    """The name of the tensor that sums or counts belong to; empty for anything else."""
    return next((name.removesuffix(ending) for ending in (_SUMS, _COUNTS) if name.endswith(ending)), "")


def _datasets(names: Any, label: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{label}: imatrix.datasets is {names!r:.40}; expected a list of names")
    return tuple(name for name in names if name)


class _Cursor:
    """Reads a file of the older form from its first byte on, never past its end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.label, self.left = path.name, os.fstat(file.fileno()).st_size
        self._file = file
        file.seek(0)

    def position(self) -> int:
        return self._file.tell()

    def need(self, count: int, what: str) -> None:
        if not 0 <= count <= self.left:
            raise CheckpointError(
                f"{self.label}: truncated or damaged, or no file of importance: {what} would take {count:,} of the "
                f"{self.left:,} bytes that are left"
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.label}: became shorter while it was read")
        self.left -= count
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self._file.seek(count, os.SEEK_CUR)
        self.left -= count

    def whole(self, what: str, least: int, most: int) -> int:
        """A number of 32 bits within limits."""
        value = int.from_bytes(self.take(4, what), "little", signed=True)
        if not least <= value <= most:
            raise CheckpointError(
                f"{self.label}: damaged, or no file of importance: {what} is {value:,}; expected {least:,} to {most:,}"
            )
        return value


def _read_legacy(cursor: _Cursor, path: Path) -> Imatrix:
    limit, label = 2**31 - 1, path.name
    count = cursor.whole("the number of entries", 1, MAX_ENTRIES)
    cursor.need(count * _ENTRY_BYTES, f"{count:,} entries")
    entries: dict[str, Sums] = {}
    for number in range(count):
        what = f"entry {number}"
        length = cursor.whole(f"the length of the name of {what}", 1, MAX_NAME_BYTES)
        data = cursor.take(length, f"the name of {what}")
        try:
            name = data.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{label}: the name of {what} is {data[:40]!r}, which is not UTF-8") from None
        if name in entries:
            raise CheckpointError(f"{label}: {name!r} appears twice")
        calls = cursor.whole(f"the number of calls of {name!r}", 0, limit)
        size = cursor.whole(f"the number of values of {name!r}", 1, limit)
        start = cursor.position()
        cursor.skip(4 * size, f"the values of {name!r}")
        entries[name] = Sums(Entry(name, path, "F32", (size,), start, start + 4 * size), calls)
    chunks = cursor.whole("the number of chunks", 0, limit) if cursor.left else 0
    dataset = b""
    if cursor.left:
        length = cursor.whole("the length of the name of the text", 0, MAX_DATASET_BYTES)
        dataset = cursor.take(length, "the name of the text")
    if cursor.left:
        raise CheckpointError(f"{label}: {cursor.left:,} bytes after its end; the file is damaged")
    return Imatrix(path, entries, chunks, _datasets([dataset.decode("utf-8", "surrogateescape")], label))
