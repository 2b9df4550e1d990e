"""The container GGUF, read: metadata, and where the bytes of every tensor lie, also across the parts of a split file.

Written from the format's description (ggml's ``docs/gguf.md``): versions 2 and 3, little-endian. Only the header is
read. Every count, length and offset is compared with the size of the file before anything is allocated, and a header
takes at most three times its size and 64 MiB of memory.
"""

from __future__ import annotations

import math
import os
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mixtral.errors import CheckpointError
from mixtral.files.read import Entry
from mixtral.files.safetensors import inside
from mixtral.quant.formats import BY_ID, FORMATS, Format

__all__ = [
    "ALIGNMENT_KEY",
    "ARRAY",
    "BOOL",
    "DEFAULT_ALIGNMENT",
    "MAGIC",
    "MAX_COUNT",
    "MAX_DIMENSIONS",
    "MAX_HEADER_BYTES",
    "MAX_KEY_BYTES",
    "MAX_NESTING",
    "MAX_STRING_BYTES",
    "SCALARS",
    "STRING",
    "Gguf",
    "check_alignment",
    "read_gguf",
    "size_of",
]

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_COUNT = 65_536  # of keys, and of tensors
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 64 << 20
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 64
MAX_NESTING = 4  # arrays inside one another
MAX_PARTS = 4_096
MAX_STRING_BYTES = 8 << 20
# What remains of 64 MiB is for the longest string, whose bytes and text (up to 4 bytes a character) exist at once.
_HELD_BYTES = 48 << 20

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: Mapping[int, np.dtype[Any]] = {
    kind: np.dtype(code)
    for kind, code in (
        *((0, "<u1"), (1, "<i1"), (2, "<u2"), (3, "<i2"), (4, "<u4"), (5, "<i4"), (6, "<f4"), (BOOL, "?")),
        *((10, "<u8"), (11, "<i8"), (12, "<f8")),
    )
}
_OLDER = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
# The shortest key has a length, one letter, a type and one byte; the shortest tensor one letter and one dimension.
_KEY_BYTES, _TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class Gguf:
    """What one GGUF file holds, or all parts of a split one.

    ``metadata`` has the order of the file (the first part): numbers as int, float and bool; strings as str, in which a
    byte that is not UTF-8 stands as a surrogate (``errors="surrogateescape"`` gives it back; token lists hold such
    bytes); arrays of numbers as read-only numpy arrays of their type; arrays of strings and of arrays as lists.
    ``tensors`` has the order of the file, and shapes by rows: the format's [in, out, expert] is (expert, out, in) here.
    ``dtype`` of an entry is a name from ``quant.formats.FORMATS``. ``paths`` are the files, links resolved.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Entry]
    version: int
    paths: tuple[Path, ...]


def read_gguf(path: Path) -> Gguf:
    """Read and check the header of a GGUF file; given any part of a split file, of all its parts in the same folder.

    Raises:
        CheckpointError: no such file, a missing part, an unknown version or type, or a file that is truncated, damaged
            or says what cannot be.
    """
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) <= 1:
        found = _read_file(path, path.name)
        parts = found.metadata.get("split.count", 1)
        if type(parts) is not int or not 0 <= parts <= 1:
            raise CheckpointError(
                f"{path.name}: split.count is {parts!r:.40}, so this is one part of a model, but its name does not end "
                "in -00001-of-0000N.gguf; give all parts the names that they were downloaded with"
            )
        return found
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count <= MAX_PARTS:
        raise CheckpointError(f"{path.name}: part {number} of {count}; expected 1 to {count}, and at most {MAX_PARTS}")
    names = [f"{match[1]}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]
    missing = [name for name in names if not os.path.lexists(path.parent / name)]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise CheckpointError(
            f"{path.parent}: {len(missing)} of {count} parts are missing: {', '.join(missing[:8])}{more}; download them"
        )
    return _read_parts(path.parent, names)


def _read_parts(folder: Path, names: list[str]) -> Gguf:
    first = _read_file(_locate(folder, names[0]), names[0])
    total = _whole(first.metadata, "split.tensors.count", names[0])
    tensors: dict[str, Entry] = {}
    paths: list[Path] = []
    for number, name in enumerate(names):
        part = _read_file(_locate(folder, name), name) if number else first
        for key, expected in (("split.no", number), ("split.count", len(names)), ("split.tensors.count", total)):
            if (got := _whole(part.metadata, key, name)) != expected:
                raise CheckpointError(f"{name}: {key} is {got:,}, expected {expected:,}; it belongs to other parts")
        twice = next((tensor for tensor in part.tensors if tensor in tensors), None)
        if twice is not None:
            raise CheckpointError(f"{name}: {twice!r} is also in {tensors[twice].shard.name}; one is of another model")
        tensors |= part.tensors
        paths += part.paths
    if len(tensors) != total:
        raise CheckpointError(
            f"{names[0]}: promises {total:,} tensors, but all parts hold {len(tensors):,}; one is of another model"
        )
    return Gguf(first.metadata, tensors, first.version, tuple(paths))


def _locate(folder: Path, name: str) -> Path:
    home = folder.resolve()
    # A subfolder of a repository in the Hub cache: its files link to the same blobs as those above it.
    if home.parent.parent.name == "snapshots" and (home / name).is_symlink():
        return inside(home.parent, f"{home.name}/{name}")
    return inside(home, name)


def _whole(metadata: Mapping[str, Any], key: str, label: str) -> int:
    value = metadata.get(key)
    if type(value) is not int:
        raise CheckpointError(f"{label}: is named as one of several parts, but its {key} is {value!r:.40}")
    return value


def check_alignment(value: Any, label: str) -> int:
    """The alignment, if it is one.

    Raises:
        CheckpointError: it is not a power of two from 8 to 65,536.
    """
    if type(value) is not int or not 8 <= value <= 65_536 or value & (value - 1):
        raise CheckpointError(f"{label}: {ALIGNMENT_KEY} is {value!r:.40}; expected a power of two from 8 to 65,536")
    return value


def size_of(name: str, form: Format, shape: tuple[int, ...], label: str) -> int:
    """Bytes of a tensor of this format and shape (by rows).

    Raises:
        CheckpointError: not 1 to 4 dimensions of at least 1, a row that blocks do not fill, or 2^63 values or more.
    """
    if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1 or math.prod(shape) >= 1 << 63:
        raise CheckpointError(
            f"{label}: {name!r} has the shape {list(shape)}; expected 1 to {MAX_DIMENSIONS} sizes of at least 1 with a "
            "product below 2^63"
        )
    try:
        return form.size_bytes(shape)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {name!r}: {error}") from None


class _Cursor:
    """Reads a header from its first byte on, never past the end of the file or the limits."""

    def __init__(self, file: BinaryIO, size: int, label: str) -> None:
        self.label, self.size, self.position = label, size, 0
        self._file, self._held = file, 0

    def need(self, count: int, what: str) -> None:
        """Refuse a file in which ``what`` cannot take ``count`` more bytes."""
        stop = self.position + count
        if stop > self.size:
            raise CheckpointError(
                f"{self.label}: truncated or damaged: {self.size:,} bytes, but {what} would end at byte {stop:,} or "
                "later; download it again"
            )
        if stop > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.label}: {what} ends beyond byte {MAX_HEADER_BYTES:,}, the limit for a header")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.label}: became shorter while it was read")
        self.position += count
        return data

    def unpack(self, code: str, what: str) -> tuple[int, ...]:
        return struct.unpack(code, self.take(struct.calcsize(code), what))

    def string(self, what: str, limit: int) -> bytes:
        length = int.from_bytes(self.take(8, what), "little")
        self.need(length, what)
        if length > limit:
            raise CheckpointError(f"{self.label}: {what} has {length:,} bytes; at most {limit:,} are read")
        return self.take(length, what)

    def identifier(self, what: str, limit: int) -> str:
        """A key or the name of a tensor: not empty, and UTF-8."""
        data = self.string(what, limit)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.label}: {what} is {data[:40]!r}, which is not UTF-8") from None
        if not text:
            raise CheckpointError(f"{self.label}: {what} is empty")
        self.hold(sys.getsizeof(text) + 100)  # and its place in a dictionary
        return text

    def hold(self, size_bytes: int) -> None:
        """Account for memory that what was read takes for good: many short strings take far more than their bytes."""
        self._held += size_bytes
        if self._held > 3 * self.position + _HELD_BYTES:
            raise CheckpointError(f"{self.label}: metadata of so many small values that it would fill the memory")


def _read_file(path: Path, label: str) -> Gguf:
    """One file, without regard for other parts."""
    try:
        real = path.resolve(strict=True)
        regular = real.is_file()
    except (OSError, RuntimeError, ValueError):
        raise CheckpointError(f"{path}: no such file") from None
    if not regular:
        raise CheckpointError(f"{path}: not a regular file; expected a GGUF file")
    try:
        with real.open("rb", buffering=1 << 20) as file:
            cursor = _Cursor(file, os.fstat(file.fileno()).st_size, label)
            version, tensor_count, key_count = _read_start(cursor)
            metadata = _read_metadata(cursor, key_count)
            tensors = _read_tensors(cursor, tensor_count, metadata, real)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read ({error.strerror})") from None
    return Gguf(metadata, tensors, version, (real,))


def _read_start(cursor: _Cursor) -> tuple[int, int, int]:
    label = cursor.label
    magic = cursor.take(4, "the first field")
    if magic != MAGIC:
        older = "; an older GGML format, convert it to GGUF with llama.cpp" if magic in _OLDER else ""
        raise CheckpointError(f"{label}: no GGUF file: starts with {magic!r}, not {MAGIC!r}{older}")
    (version,) = cursor.unpack("<I", "the version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{label}: a big-endian GGUF file; only little-endian ones are read")
    if version not in (2, 3):
        raise CheckpointError(f"{label}: GGUF version {version:,}; only 2 and 3 are read, convert the model again")
    tensor_count, key_count = cursor.unpack("<QQ", "the number of tensors and keys")
    for count, what in ((tensor_count, "tensors"), (key_count, "metadata keys")):
        if count > MAX_COUNT:
            raise CheckpointError(f"{label}: claims {count:,} {what}; at most {MAX_COUNT:,} are read")
    least = key_count * _KEY_BYTES + tensor_count * _TENSOR_BYTES
    cursor.need(least, f"a header of {key_count:,} keys and {tensor_count:,} tensors")
    return version, tensor_count, key_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.identifier(f"key {number} of the metadata", MAX_KEY_BYTES)
        if key in metadata:
            raise CheckpointError(f"{cursor.label}: the key {key!r:.80} appears twice")
        what = f"the value of {key!r:.80}"
        (kind,) = cursor.unpack("<I", what)
        if kind == STRING:
            metadata[key] = _text(cursor, what)
        elif kind == ARRAY:
            metadata[key] = _array(cursor, what, 1)
        else:
            metadata[key] = _numbers(cursor, kind, 1, what)[0].item()
    return metadata


def _text(cursor: _Cursor, what: str) -> str:
    text = cursor.string(what, MAX_STRING_BYTES).decode("utf-8", "surrogateescape")
    cursor.hold(sys.getsizeof(text) + 8)
    return text


def _array(cursor: _Cursor, what: str, depth: int) -> list[Any] | NDArray[Any]:
    if depth > MAX_NESTING:
        raise CheckpointError(f"{cursor.label}: {what} has arrays nested more than {MAX_NESTING} deep")
    kind, count = cursor.unpack("<IQ", what)
    if kind == STRING:
        cursor.need(8 * count, what)
        return [_text(cursor, what) for _ in range(count)]
    if kind == ARRAY:
        cursor.need(12 * count, what)
        cursor.hold(64 * count)
        return [_array(cursor, what, depth + 1) for _ in range(count)]
    return _numbers(cursor, kind, count, what)


def _numbers(cursor: _Cursor, kind: int, count: int, what: str) -> NDArray[Any]:
    dtype = SCALARS.get(kind)
    if dtype is None:
        raise CheckpointError(f"{cursor.label}: {what} has the unknown type {kind}")
    data = cursor.take(count * dtype.itemsize, what)
    cursor.hold(sys.getsizeof(data) + 128)
    if kind == BOOL and data.strip(b"\0\1"):
        raise CheckpointError(f"{cursor.label}: {what} is a truth value other than 0 and 1")
    return np.frombuffer(data, dtype)


def _read_tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    label = cursor.label
    alignment = check_alignment(metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT), label)
    entries: dict[str, Entry] = {}
    for number in range(count):
        name = cursor.identifier(f"the name of tensor {number}", MAX_NAME_BYTES)
        if name in entries:
            raise CheckpointError(f"{label}: the tensor {name!r} appears twice")
        what = f"the description of {name!r}"
        (dimensions,) = cursor.unpack("<I", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{label}: {name!r} has {dimensions:,} dimensions; expected 1 to {MAX_DIMENSIONS}")
        *sizes, kind, offset = cursor.unpack(f"<{dimensions}QIQ", what)
        form = BY_ID.get(kind)
        if form is None:
            raise CheckpointError(f"{label}: {name!r} has the unknown type {kind}; known are {', '.join(FORMATS)}")
        if offset % alignment:
            raise CheckpointError(
                f"{label}: {name!r} starts at byte {offset:,} of the data, not aligned to {alignment}"
            )
        shape = tuple(reversed(sizes))
        # Offsets count from the end of the header, which is known after the last tensor.
        entries[name] = Entry(name, path, form.name, shape, offset, offset + size_of(name, form, shape, label))
    base = cursor.position + -cursor.position % alignment
    _check_extent(entries, base, cursor, alignment)
    return {
        name: Entry(name, path, entry.dtype, entry.shape, base + entry.start, base + entry.stop)
        for name, entry in entries.items()
    }


def _check_extent(entries: Mapping[str, Entry], base: int, cursor: _Cursor, alignment: int) -> None:
    """Tensors must fill the file from the end of the header on, each one padded to the alignment and no further."""
    label, size = cursor.label, cursor.size
    position = stop = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{label}: {entry.name!r} {what} (starts at byte {entry.start:,} of the data, not {position:,})"
            )
        stop = entry.stop
        position = stop + -stop % alignment
    if base + stop > size and entries:
        raise CheckpointError(
            f"{label}: truncated: {size:,} bytes, but its header promises {base + stop:,}; download it again"
        )
    if base + position < size:
        raise CheckpointError(f"{label}: {size - base - position:,} bytes after the last tensor; the file is damaged")
