"""The container GGUF, written: version 3, little-endian, one tensor in memory at a time.

Written from the format's description (ggml's ``docs/gguf.md``). The type that a value of the metadata has in the file:

====================  ================================================================================================
bool                  BOOL
int                   UINT32; INT32 if negative; UINT64 or INT64 if it does not fit
float                 FLOAT32, rounded
str                   STRING in UTF-8; surrogates of ``errors="surrogateescape"`` become the bytes they stand for
numpy number, array   its own type; an array has one dimension
list or tuple         an array: of BOOL, STRING, arrays, or FLOAT32 (also of ints among floats); of ints the first of
                      INT32, UINT32, INT64, UINT64 that holds them all (llama.cpp expects INT32 in token types); empty,
                      an array of no strings
====================  ================================================================================================

So all that ``read_gguf`` gives is written with the same values and, but for single numbers, with the same types.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.files.gguf import (
    ALIGNMENT_KEY,
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_COUNT,
    MAX_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_NESTING,
    MAX_STRING_BYTES,
    SCALARS,
    STRING,
    check_alignment,
    size_of,
)
from mixtral.quant.formats import FORMATS

__all__ = ["GgufRecord", "write_gguf"]

MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes, the last of which is zero
_KINDS = {dtype: kind for kind, dtype in SCALARS.items()}
_UINT32, _INT32, _FLOAT32, _UINT64, _INT64 = 4, 5, 6, 10, 11


@dataclass(frozen=True, slots=True)
class GgufRecord:
    """One tensor to be written: ``parts`` is called when its turn comes, and each part is dropped before the next.

    ``format`` is a name from ``quant.formats.FORMATS``, ``shape`` by rows. The parts are the bytes of the file as
    uint8, of any shape: in order, together, exactly the bytes that the format needs for this shape.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor | NDArray[np.uint8]]]

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes in the file, without padding."""
        return FORMATS[self.format].size_bytes(self.shape)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    records: Iterable[GgufRecord],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write one GGUF file; metadata and tensors keep their order. The caller flushes it to disk and renames it.

    ``progress`` is called after each part and each tensor with the bytes of data written so far, padding included, and
    in all.
    ``general.alignment`` is added to the metadata where it is not the default.

    Raises:
        CheckpointError: a value or a tensor that the format cannot hold, found before the file is touched; or a record
            that gives other bytes than its format and shape need.
        OSError: the file cannot be written.
    """
    records = list(records)
    check_alignment(alignment, path.name)
    if alignment != DEFAULT_ALIGNMENT and ALIGNMENT_KEY not in metadata:
        metadata = {**metadata, ALIGNMENT_KEY: alignment}
    if (said := check_alignment(metadata.get(ALIGNMENT_KEY, alignment), path.name)) != alignment:
        raise CheckpointError(
            f"{path.name}: {ALIGNMENT_KEY} is {said}, but the file is to be aligned to {alignment}; drop the key or "
            "pass the same alignment"
        )
    keys = b"".join(_pair(key, value, path.name) for key, value in metadata.items())
    infos, sizes = _describe(records, alignment, path.name)
    header = struct.pack("<4sIQQ", MAGIC, 3, len(records), len(metadata)) + keys + infos
    if len(header) > MAX_HEADER_BYTES or len(metadata) > MAX_COUNT or len(records) > MAX_COUNT:
        raise CheckpointError(
            f"{path.name}: {len(metadata):,} keys and {len(records):,} tensors with a header of {len(header):,} bytes; "
            f"at most {MAX_COUNT:,} of each and {MAX_HEADER_BYTES:,} bytes can be read back"
        )
    done, total = 0, sum(_padded(size, alignment) for size in sizes)
    with path.open("wb") as file:
        file.write(header + bytes(-len(header) % alignment))
        for item, size in zip(records, sizes, strict=True):
            start = file.tell()
            for part in item.parts():
                file.write(_payload(item, part, path.name))
                if progress is not None:
                    progress(done + file.tell() - start, total)
                del part  # not beside the next one
            if file.tell() - start != size:
                raise CheckpointError(
                    f"{path.name}: {item.name!r} gave {file.tell() - start:,} bytes, but {item.format} "
                    f"{list(item.shape)} needs {size:,}"
                )
            file.write(bytes(-size % alignment))
            done += _padded(size, alignment)
            if progress is not None:
                progress(done, total)


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _payload(item: GgufRecord, data: Tensor | NDArray[np.uint8], label: str) -> memoryview:
    if isinstance(data, Tensor):
        if data.dtype is not torch.uint8:
            raise CheckpointError(f"{label}: the data of {item.name!r} is {data.dtype}; expected its bytes as uint8")
        data = data.detach().cpu().numpy()
    if data.dtype != np.uint8:
        raise CheckpointError(f"{label}: the data of {item.name!r} is {data.dtype}; expected its bytes as uint8")
    return np.ascontiguousarray(data).reshape(-1).data


def _describe(records: Sequence[GgufRecord], alignment: int, label: str) -> tuple[bytes, list[int]]:
    """The descriptions of all tensors, and the bytes of each, without padding."""
    infos: list[bytes] = []
    sizes: list[int] = []
    names: set[str] = set()
    offset = 0
    for item in records:
        if item.name in names:
            raise CheckpointError(f"{label}: the tensor {item.name!r} appears twice")
        names.add(item.name)
        form = FORMATS.get(item.format)
        if form is None:
            raise CheckpointError(
                f"{label}: {item.name!r} has the unknown format {item.format!r}; known are {', '.join(FORMATS)}"
            )
        size = size_of(item.name, form, item.shape, label)
        name = _string(item.name, MAX_NAME_BYTES, f"{label}: the tensor name {item.name!r:.80}", least=1)
        dimensions = len(item.shape)
        infos.append(name + struct.pack(f"<I{dimensions}QIQ", dimensions, *reversed(item.shape), form.id, offset))
        sizes.append(size)
        offset += _padded(size, alignment)
    return b"".join(infos), sizes


def _pair(key: str, value: Any, label: str) -> bytes:
    what = f"{label}: the key {key!r:.80}"
    kind, data = _encode(value, what, 1)
    return _string(key, MAX_KEY_BYTES, what, least=1) + struct.pack("<I", kind) + data


def _string(text: str, limit: int, what: str, *, least: int = 0, errors: str = "strict") -> bytes:
    try:
        data = text.encode("utf-8", errors)
    except UnicodeEncodeError:
        raise CheckpointError(f"{what}: holds a lone surrogate, which UTF-8 cannot") from None
    if not least <= len(data) <= limit:
        raise CheckpointError(f"{what}: takes {len(data):,} bytes; expected {least} to {limit:,}")
    return struct.pack("<Q", len(data)) + data


def _encode(value: Any, what: str, depth: int) -> tuple[int, bytes]:
    """Type and bytes of a value; ``depth`` is that of an array, should it be one."""
    if isinstance(value, np.generic):
        number = np.asarray(value)
        return _kind(number.dtype, what), _little(number)
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        kinds = (_UINT32, _UINT64) if value >= 0 else (_INT32, _INT64)
        return _whole([value], kinds, what)
    if isinstance(value, float):
        return _FLOAT32, _floats([value], what)
    if isinstance(value, str):
        return STRING, _string(value, MAX_STRING_BYTES, what, errors="surrogateescape")
    if isinstance(value, list | tuple | np.ndarray):
        if depth > MAX_NESTING:
            raise CheckpointError(f"{what}: arrays nested more than {MAX_NESTING} deep")
        kind, data = _items(value, what, depth)
        return ARRAY, struct.pack("<IQ", kind, len(value)) + data
    raise CheckpointError(f"{what}: a value of type {type(value).__name__}; expected bool, int, float, str or a list")


def _items(values: Sequence[Any] | NDArray[Any], what: str, depth: int) -> tuple[int, bytes]:
    """Common type and bytes of the items of an array."""
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise CheckpointError(f"{what}: an array of {values.ndim} dimensions; expected one")
        return _kind(values.dtype, what), _little(values)
    if all(isinstance(value, str) for value in values):
        return STRING, b"".join(_encode(value, what, depth)[1] for value in values)
    if all(isinstance(value, bool) for value in values):
        return BOOL, bytes(values)
    types = {type(value) for value in values}
    if types == {int}:
        return _whole(values, (_INT32, _UINT32, _INT64, _UINT64), what)
    if types <= {int, float}:
        return _FLOAT32, _floats(values, what)
    if types <= {list, tuple, np.ndarray}:
        return ARRAY, b"".join(_encode(value, what, depth + 1)[1] for value in values)
    told = ", ".join(sorted(kind.__name__ for kind in types))
    raise CheckpointError(f"{what}: a list of {told}; expected items of one type: bool, int, float, str or list")


def _whole(values: Sequence[int], kinds: Sequence[int], what: str) -> tuple[int, bytes]:
    """The first of these types that holds all the values, and their bytes in it."""
    low, high = min(values), max(values)
    for kind in kinds:
        limits = np.iinfo(SCALARS[kind])
        if limits.min <= low and high <= limits.max:
            return kind, np.array(values, SCALARS[kind]).tobytes()
    raise CheckpointError(f"{what}: numbers from {low} to {high} fit into no type of 64 bits")


def _floats(values: Sequence[float], what: str) -> bytes:
    try:
        return struct.pack(f"<{len(values)}f", *values)
    except OverflowError:
        raise CheckpointError(f"{what}: a number beyond the range of FLOAT32; pass it as numpy.float64") from None


def _kind(dtype: np.dtype[Any], what: str) -> int:
    kind = _KINDS.get(dtype.newbyteorder("<"))
    if kind is None:
        raise CheckpointError(f"{what}: values of type {dtype}; the format has none like it")
    return kind


def _little(values: NDArray[Any]) -> bytes:
    return values.astype(values.dtype.newbyteorder("<")).tobytes()
