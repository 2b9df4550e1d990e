"""Where the tensors lie in ``.pth`` and ``.pt`` archives: unpickled with ``weights_only``, no value is read here.

This is the only file of the package that unpickles, and its callers do so only when they were told to explicitly:
``weights_only`` limits what a pickle may build, but such limits have been broken before (CVE-2025-32434).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.files.read import DTYPES, Entry

__all__ = ["read_archives"]

_MAX_PICKLE_BYTES = 64 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_archives(paths: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of some archives with different names, as the place of its bytes in a file.

    Raises:
        CheckpointError: a file is no zip archive of torch, holds anything but contiguous tensors that share no memory,
            or a name occurs in two files.
    """
    entries: dict[str, Entry] = {}
    for path in paths:
        for name, entry in _read(path).items():
            if name in entries:
                raise CheckpointError(
                    f"{path.name}: {name!r} is also in {entries[name].shard.name}; files that each hold a slice of the "
                    "same tensor cannot be read"
                )
            entries[name] = entry
    return entries


def _read(path: Path) -> dict[str, Entry]:
    size = _checked_archive(path)
    try:
        # Fake tensors allocate nothing; their storages know where in the file their bytes begin.
        with torch._subclasses.FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of a hostile file
        raise CheckpointError(
            f"{path.name}: is damaged, or holds other things than tensors, which are never loaded because they could "
            f"run code ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path.name}: holds {type(state).__name__}; expected a dictionary of tensors")
    entries = {str(name): _entry(name, value, path, size) for name, value in state.items()}
    ordered = sorted(entries.values(), key=lambda entry: entry.start)
    for before, after in pairwise(ordered):
        if after.start < before.stop:
            raise CheckpointError(f"{path.name}: {after.name!r} shares memory with {before.name!r}")
    return entries


def _checked_archive(path: Path) -> int:
    """The size of the file, if it is a zip archive that stores its members uncompressed and has a small pickle."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever the reader of zip archives makes of a damaged or hostile one
        raise CheckpointError(f"{path.name}: truncated, or not a zip archive as torch writes it ({error})") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path.name}: {member.filename[:80]!r} is compressed, which torch never does")
        if member.header_offset + member.file_size > size:
            raise CheckpointError(f"{path.name}: truncated: {member.filename[:80]!r} ends beyond its {size:,} bytes")
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path.name}: a pickle of {member.file_size:,} bytes is no list of tensors")
    return size


def _entry(name: Any, value: Any, path: Path, size: int) -> Entry:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(f"{path.name}: {name!r:.80} is {type(value).__name__}; expected a named tensor")
    if value.dtype not in _NAMES or not value.is_contiguous():
        raise CheckpointError(
            f"{path.name}: {name!r} is {value.dtype} with strides {value.stride()}; expected a contiguous tensor of "
            f"{', '.join(_NAMES.values())}"
        )
    # torch.load under FakeTensorMode sets it (torch's notes on serialization, "Loading with FakeTensorMode").
    offset = value.untyped_storage()._checkpoint_offset
    if offset is None:
        raise CheckpointError(f"{path.name}: {name!r} has no place in the file")
    start = offset + int(value.storage_offset()) * value.itemsize
    stop = start + value.numel() * value.itemsize
    if not 0 <= start <= stop <= size:
        raise CheckpointError(f"{path.name}: truncated: {name!r} ends at byte {stop:,} of {size:,}")
    return Entry(name, path, _NAMES[value.dtype], tuple(value.shape), start, stop)
