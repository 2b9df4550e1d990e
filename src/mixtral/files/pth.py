"""Where the tensors lie in ``.pth`` and ``.pt`` archives: unpickled with ``weights_only``, no value is read here.

This is the only file of the package that unpickles, and its callers do so only when they were told to explicitly:
``weights_only`` limits what a pickle may build, but such limits have been broken before (CVE-2025-32434).
"""

from __future__ import annotations

import io
import logging
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.files.read import DTYPES, Entry

__all__ = ["read_archives"]

_MAX_PICKLE_BYTES = 2 << 20  # four times that of 8x22B
_MAX_LIST_BYTES = 4 << 20
_BYTE_ORDER = "byteorder"
# All that torch.save writes for tensors by name.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
    r"|torch\.storage UntypedStorage"
)
_OPERATIONS = frozenset(
    (
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET"),
        *("LONG_BINGET", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
        *("LONG1", "BINFLOAT", "BINUNICODE"),
    )
)
_VALUES = re.compile(r"/data/[^/]+$")
_FAKES = logging.getLogger("torch._subclasses.fake_tensor")
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
    places = _checked_archive(path)
    before = _FAKES.disabled
    _FAKES.disabled = True  # it prints a traceback of its own for a shape that cannot be
    try:
        # Fake tensors allocate nothing; their storages know where in the file their bytes begin.
        with torch._subclasses.FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of a hostile file
        raise _refused(path.name, type(error).__name__) from None
    finally:
        _FAKES.disabled = before
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path.name}: holds {type(state).__name__}; expected a dictionary of tensors")
    entries = {str(name): _entry(name, value, path, places) for name, value in state.items()}
    ordered = sorted(entries.values(), key=lambda entry: entry.start)
    for one, other in pairwise(ordered):
        if other.start < one.stop:
            raise CheckpointError(f"{path.name}: {other.name!r} shares memory with {one.name!r}")
    return entries


def _checked_archive(path: Path) -> dict[int, int]:
    """Where the values of a zip archive begin, and how many bytes they have, if torch can read it without harm: stored
    uncompressed, each name once, a small pickle, and values in our byte order."""
    try:
        size = path.stat().st_size
        with _Cautious(path) as file, zipfile.ZipFile(file) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            _check_members(members, path.name, size)
            orders = [archive.read(member) for member in members if member.filename.lower().endswith(_BYTE_ORDER)]
            for member in members:
                if member.filename.lower().endswith(".pkl"):
                    _check_pickle(archive.read(member), path.name)
            places = {_start(file, member): member.file_size for member in _values(members, path.name)}
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever the reader of zip archives makes of a damaged or hostile one
        raise CheckpointError(
            f"{path.name}: truncated, or not a zip archive as torch writes it ({str(error)[:120]})"
        ) from None
    if any(order != b"little" for order in orders):
        # torch would exchange the bytes of values that it has not read, and crash.
        raise CheckpointError(f"{path.name}: the byte order is {orders[0][:20]!r}; only little-endian files are read")
    return places


class _Cautious(io.FileIO):
    """A file that is never read in large pieces: an archive says itself how large its list of members is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_LIST_BYTES:
            raise CheckpointError(
                f"{Path(str(self.name)).name}: a list of members of {size:,} bytes; the file is damaged"
            )
        return super().read(-1 if size is None else size) or b""


def _check_members(members: Sequence[zipfile.ZipInfo], label: str, size: int) -> None:
    names: set[str] = set()
    for member in members:
        name = member.filename.lower()  # torch does not tell upper from lower case
        if name in names:
            raise CheckpointError(f"{label}: {member.filename[:80]!r} is in the archive twice")
        names.add(name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{label}: {member.filename[:80]!r} is compressed, which torch never does")
        if member.header_offset + member.file_size > size:
            raise CheckpointError(f"{label}: truncated: {member.filename[:80]!r} ends beyond its {size:,} bytes")
        small = _MAX_PICKLE_BYTES if name.endswith(".pkl") else 64 if name.endswith(_BYTE_ORDER) else size
        if member.file_size > small:
            raise CheckpointError(
                f"{label}: {member.filename[:80]!r} of {member.file_size:,} bytes is no list of tensors"
            )


def _values(members: Sequence[zipfile.ZipInfo], label: str) -> list[zipfile.ZipInfo]:
    """The members that hold values. In newer files torch does not look them up: it reckons where they are from their
    order, and would take one for another in an archive that was packed again."""
    found = [member for member in members if _VALUES.search(member.filename)]
    numbers = [member.filename.rpartition("/")[2] for member in found]
    reckoned = any(member.filename.endswith(".format_version") for member in members)
    if reckoned and numbers != [str(number) for number in range(len(found))]:
        raise CheckpointError(
            f"{label}: its values are not in the order in which torch writes them; load it with torch and save it again"
        )
    return found


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the contents of a member begin: behind a header with a name and an extra field of any length. As a damaged
    length would shift the values, what follows them must be the next record of the archive."""
    file.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    start = member.header_offset + 30 + int(name) + int(extra)
    file.seek(start + member.file_size)
    if file.read(4) not in (b"PK\7\10", b"PK\3\4", b"PK\1\2"):
        raise zipfile.BadZipFile(f"{member.filename[:80]!r} does not end where it should")
    return start


def _check_pickle(data: bytes, label: str) -> None:
    """Refuse a pickle that does more than list tensors, before it is run.

    torch's unpickler also takes a ``bytearray`` of any size, or an ``OrderedDict`` copied a million times.
    """
    ordered: set[Any] = set()  # where the memo has the class OrderedDict, which may only be called without arguments
    on_top = False
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name not in _OPERATIONS or (name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument))):
            raise _refused(label, f"{name} {argument!r:.60}")
        if name in ("BINPUT", "LONG_BINPUT"):
            (ordered.add if on_top else ordered.discard)(argument)
            continue
        if on_top and name != "EMPTY_TUPLE":
            raise _refused(label, "an OrderedDict with contents of its own")
        fetched = name in ("BINGET", "LONG_BINGET") and argument in ordered
        on_top = fetched or (name == "GLOBAL" and argument == "collections OrderedDict")


def _refused(label: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{label}: is damaged, or holds other things than tensors, which are never loaded because they could run code "
        f"({what})"
    )


def _entry(name: Any, value: Any, path: Path, places: Mapping[int, int]) -> Entry:
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
    if not value.numel():
        return Entry(name, path, _NAMES[value.dtype], tuple(value.shape), 0, 0)
    if offset not in places:
        raise CheckpointError(
            f"{path.name}: the values of {name!r} are not at byte {offset:,}, where torch would have put them; load it "
            "with torch and save it again"
        )
    # The pickle says how large a storage is; what the archive holds decides.
    start = offset + int(value.storage_offset()) * value.itemsize
    stop = start + value.numel() * value.itemsize
    if not offset <= start <= stop <= offset + places[offset]:
        raise CheckpointError(
            f"{path.name}: {name!r} takes bytes {start:,} to {stop:,} of the file, but the archive has "
            f"{places[offset]:,} bytes from {offset:,} on; the file is damaged"
        )
    return Entry(name, path, _NAMES[value.dtype], tuple(value.shape), start, stop)
