"""Sharded safetensors with an index, as on the Hugging Face Hub: headers checked first, then one tensor at a time.

Nothing is allocated and nothing is mapped before the header of every shard has been checked against the length of its
file; ``read.py`` copies the values.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.files.read import DTYPES, Entry

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Header",
    "Record",
    "inside",
    "parse_json",
    "read_checkpoint",
    "read_header",
    "read_json",
    "record",
    "write_shard",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_JSON_BYTES = 16_000_000  # ten times the largest header of a Mixtral; in memory it may become 27 times as large
MAX_DIMENSIONS = 8

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ONE_BYTE = ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(_ONE_BYTE, 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says it holds, after it was checked against the length of the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def inside(folder: Path, name: str) -> Path:
    """The path of a regular file of a checkpoint folder, links resolved.

    A link may lead to another file of the folder, or to the blobs of the Hub cache that the folder is part of.

    Raises:
        CheckpointError: the file is missing, is not a regular file, or a link leads out of the folder.
    """
    try:
        home, real = folder.resolve(strict=True), (folder / name).resolve(strict=True)
        kind = real.stat().st_mode
    except (OSError, RuntimeError, ValueError):
        raise CheckpointError(f"{folder / name}: no such file") from None
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if real.parent not in allowed:
        raise CheckpointError(f"{folder / name}: a link that leads out of the folder, to {real}; copy the file instead")
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{folder / name}: not a regular file")
    return real


def read_checkpoint(folder: Path, stem: str = "model") -> dict[str, Entry]:
    """Every tensor of the checkpoint in ``folder``, by name: from ``STEM.safetensors``, or from the index and shards.

    Raises:
        CheckpointError: no checkpoint, a missing or damaged shard, or an index that disagrees with its shards.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if os.path.lexists(single) and os.path.lexists(index):
        raise CheckpointError(f"{folder} holds both {single.name} and {index.name}; keep one of the two checkpoints")
    if os.path.lexists(single):
        return read_header(inside(folder, single.name), label=single.name).entries
    if os.path.lexists(index):
        return _read_shards(folder, index.name)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a folder with config.json and {single.name}")
    found = sorted(path.name for path in folder.iterdir())
    told = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
    raise CheckpointError(f"{folder}: no weights; expected {single.name} or {index.name} with its shards, found {told}")


def _read_index(path: Path, label: str) -> dict[str, str]:
    values = read_json(path, label)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label}: expected an object 'weight_map' of tensor name -> shard name")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not {"/", "\\"} & set(shard)
        if not plain or not shard.isprintable():
            raise CheckpointError(
                f"{label}: {name!r:.80} is said to be in {shard!r:.80}; expected the plain name of a .safetensors file "
                "in the same folder"
            )
    return weight_map


def _read_shards(folder: Path, label: str) -> dict[str, Entry]:
    weight_map = _read_index(inside(folder, label), label)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.exists(folder / shard)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards named in {label} are missing: "
            f"{_first(missing)}; download them again"
        )
    entries: dict[str, Entry] = {}
    for shard in shards:
        found = read_header(inside(folder, shard), label=shard).entries
        twice = [name for name in found if name in entries]
        if twice:
            raise CheckpointError(f"{shard}: {twice[0]!r} is also in {entries[twice[0]].shard.name}")
        strays = [name for name in found if weight_map.get(name) != shard]
        if strays:
            said = f"which {label} puts in {weight_map[strays[0]]}" if strays[0] in weight_map else "not in the index"
            raise CheckpointError(f"{shard}: holds {strays[0]!r}, {said}; index and shards do not belong together")
        entries |= found
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise CheckpointError(f"{weight_map[absent[0]]}: {label} promises {_first(absent)}, which it does not hold")
    return entries


def read_header(path: Path, *, label: str | None = None) -> Header:
    """Read and check the header of a safetensors file; reads nothing else.

    Raises:
        CheckpointError: the file is truncated, or its header is damaged or disagrees with the length of the file.
    """
    label = label or path.name
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            count = int.from_bytes(file.read(8), "little")
            if size < 8 or count > size - 8:
                raise CheckpointError(
                    f"{label}: truncated or no safetensors file: {size:,} bytes, but the header alone claims {count:,}"
                )
            if count > MAX_JSON_BYTES:
                raise CheckpointError(f"{label}: header of {count:,} bytes; at most {MAX_JSON_BYTES:,} are read")
            values = parse_json(file.read(count), label)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read ({error.strerror})") from None
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{label}: __metadata__ is not an object of strings")
    entries = {name: _entry(name, value, path, 8 + count, label) for name, value in values.items()}
    _check_extent(entries.values(), 8 + count, size, label)
    return Header(entries, metadata)


def _entry(name: str, value: Any, path: Path, data_start: int, label: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{label}: {name!r} has {value!r:.80}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{label}: {name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{label}: {name!r} has the shape {shape!r:.80}; expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{label}: {name!r} has data_offsets {offsets!r:.80}; expected [start, stop]")
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{label}: {name!r} occupies {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} needs {expected:,}"
        )
    return Entry(name, path, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_extent(entries: Iterable[Entry], data_start: int, size: int, label: str) -> None:
    """Tensors must fill the file from the end of the header to its last byte, without gap or overlap."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{label}: {entry.name!r} {what} (starts at byte {entry.start:,}, not {position:,})")
        position = entry.stop
    if position > size:
        raise CheckpointError(
            f"{label}: truncated: {size:,} bytes, but its header promises {position:,}; download it again"
        )
    if position < size:
        raise CheckpointError(f"{label}: {size - position:,} bytes after the last tensor; the file is damaged")


def read_json(path: Path, label: str) -> dict[str, Any]:
    """The JSON object in a small file; ``label`` is what messages call it.

    Raises:
        CheckpointError: it cannot be read or is too large, or as ``parse_json``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{label}: larger than {MAX_JSON_BYTES:,} bytes, which no such file is")
    return parse_json(data, label)


def parse_json(data: bytes, label: str) -> dict[str, Any]:
    """The JSON object in these bytes.

    Raises:
        CheckpointError: it is not JSON in UTF-8, not an object, or a name appears twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{label}: {twice!r} appears twice")
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: not JSON ({str(error)[:120]})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{label}: expected a JSON object, got {type(values).__name__}")
    return values


def _first(names: list[str]) -> str:
    shown = [name if name.isprintable() and len(name) <= 200 else repr(name[:200]) for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor to be written: ``parts`` is called when its turn comes, and gives its values in runs, in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def record(name: str, tensor: Tensor) -> Record:
    """A tensor that is there already, as a record to be written."""
    return Record(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def _aligned(records: Iterable[Record]) -> list[Record]:
    """In the given order, if every tensor then begins at a multiple of the size of its values; else the widest first,
    which brings that about without padding: the format does not allow any."""
    ordered = list(records)
    position = 0
    for item in ordered:
        if position % item.dtype.itemsize:
            return sorted(ordered, key=lambda record: -record.dtype.itemsize)
        position += item.size_bytes
    return ordered


def write_shard(path: Path, records: Iterable[Record], metadata: Mapping[str, str], *, align: int = 8) -> None:
    """Write one safetensors file, a part of a tensor at a time. The caller flushes it to disk and renames it. The first
    tensor begins at a multiple of ``align`` bytes, itself a multiple of 8.

    Raises:
        OSError: the file cannot be written.
    """
    ordered = _aligned(records)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for item in ordered:
        stop = position + item.size_bytes
        header[item.name] = {"dtype": _NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in ordered:
            for part in item.parts():
                values = part.detach().to(device="cpu", dtype=item.dtype).contiguous().view(-1)
                file.write(values.view(torch.uint8).numpy().data)
            if file.tell() != 8 + len(text) + header[item.name]["data_offsets"][1]:
                raise CheckpointError(f"{item.name!r}: its parts do not make {item.size_bytes:,} bytes")
