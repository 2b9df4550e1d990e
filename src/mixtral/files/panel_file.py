"""Packed weights in a file: a safetensors file of panels, checked before it is used, then mapped and never copied.

Every matrix is a tensor of bytes (``I8``), as it lies in memory. The metadata of the header hold, as strings:

    format       "mixtral panels"
    version      of this file and of the panels, as "1.1"; another one is refused
    source       what the panels were made of: a key, up to the writer
    sha256       of the files that they were made of
    matrices     JSON: name -> label, kind, rows, columns, group, bits
    samples      sha256 of some 4 KB of every matrix, spread over it
    directory    sha256 of all the above, and of names, types and places of the tensors

So a header that was changed anywhere, a file that was cut and one with holes are noticed; a few bits that changed in
the data are not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mixtral.errors import CheckpointError
from mixtral.files.ahead import POPULATE_READ
from mixtral.files.commit import flush
from mixtral.files.read import Entry
from mixtral.files.safetensors import Record, parse_json, read_header, write_shard
from mixtral.ops.memory import map_file
from mixtral.quant.panels import PANEL_VERSION, Panels

__all__ = ["SAMPLE", "PanelFile", "places", "write_panels"]

VERSION = f"1.{PANEL_VERSION}"
FORMAT = "mixtral panels"
SAMPLE = 4096
_SAMPLE_EVERY = 8 << 20
_STEP = 32 << 20
_ALIGNED = 64  # bytes: what a vector reads begins at a cache line


class PanelFile:
    """The matrices of a file that ``write_panels`` made. They refer to the file, which stays mapped as long as one of
    them is used: another file may take its name, but nobody may change it.

    Raises:
        CheckpointError: the file is missing, is another one or of another version, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        told = header.metadata
        if told.get("format") != FORMAT:
            raise CheckpointError(f"{path.name}: not a file of packed weights")
        if told.get("version") != VERSION:
            raise CheckpointError(f"{path.name}: version {told.get('version')!r:.20}; this is version {VERSION!r}")
        if told.get("directory") != _directory(told, header.entries.values()):
            raise CheckpointError(f"{path.name}: the header is damaged")
        self.source, self.sha256 = told.get("source", ""), told.get("sha256", "")
        self._matrices = parse_json(told.get("matrices", "").encode(), path.name)
        self._entries = header.entries
        if self._entries.keys() != self._matrices.keys():
            raise CheckpointError(f"{path.name}: the header lists other matrices than the file has")
        self._name, self._memory = path.name, _whole(path)
        if any(entry.stop > len(self._memory) for entry in self._entries.values()):
            raise CheckpointError(f"{path.name}: became shorter while it was read")
        digest = hashlib.sha256()
        with memoryview(self._memory) as data:
            for entry in _ordered(self._entries.values()):
                _add_samples(digest, data[entry.start : entry.stop])
        if told.get("samples") != digest.hexdigest():
            raise CheckpointError(f"{path.name}: the data are damaged")

    @property
    def names(self) -> set[str]:
        """What the matrices are called."""
        return set(self._entries)

    def take(self, name: str) -> Panels:
        """A matrix, in memory of the file.

        Raises:
            CheckpointError: its numbers do not belong together.
        """
        entry, form = self._entries[name], self._matrices[name]
        data = torch.frombuffer(self._memory, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start)
        try:
            label, kind, rows, columns, group, bits = form
            panels = Panels(label, kind, (rows, columns), group, data, bits)
            _ = panels.matrix  # compares the sizes
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self._name}: {name!r} is no matrix in panels ({error})") from None
        return panels


def write_panels(path: Path, panels: Mapping[str, Panels], *, source: str, sha256: str) -> bool:
    """Write matrices to a file, complete or not at all; what had its name is replaced. False if another process is
    writing it.

    Raises:
        OSError: it cannot be written, as on a full disk. Nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    forms = {name: [one.label, one.kind, *one.shape, one.group, one.bits] for name, one in panels.items()}
    digest = hashlib.sha256()
    position, entries = 0, []
    for name, one in panels.items():
        size = one.data.numel()
        _add_samples(digest, one.data.numpy().data)
        entries.append(Entry(name, path, "I8", (size,), position, position + size))
        position += size
    told = {"format": FORMAT, "version": VERSION, "source": source, "sha256": sha256}
    told |= {"matrices": json.dumps(forms), "samples": digest.hexdigest()}
    told["directory"] = _directory(told, entries)
    partial = path.parent / f".{path.name}.partial"
    with _alone(partial) as alone:
        if alone:
            try:
                write_shard(partial, map(_record, panels, panels.values()), told, align=_ALIGNED)
                flush(partial)
                os.replace(partial, path)
                flush(path.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    return alone


def _record(name: str, panels: Panels) -> Record:
    return Record(name, torch.int8, (panels.data.numel(),), lambda: [panels.data.view(torch.int8)])


def places(size: int) -> list[int]:
    """Where the samples of so many bytes begin: both ends, and one for every 8 MB."""
    last, count = max(0, size - SAMPLE), 2 + size // _SAMPLE_EVERY
    return [last * i // (count - 1) for i in range(count)]


def _add_samples(digest: Any, data: memoryview) -> None:
    for place in places(len(data)):
        digest.update(data[place : place + SAMPLE])


def _whole(path: Path) -> mmap.mmap:
    """The memory of a file, read from its beginning to its end. Nothing of it is looked at before that: a page that is
    there already, alone, is in the way of a large one."""
    memory = map_file(path)
    for start in range(0, len(memory), _STEP):
        with suppress(OSError):  # an older kernel maps a page when it is read
            memory.madvise(POPULATE_READ, start, min(_STEP, len(memory) - start))
    return memory


def _directory(told: Mapping[str, str], entries: Iterable[Entry]) -> str:
    """The digest of everything in a header but itself. Places count from the first tensor: where that begins is up to
    the length of the header."""
    ordered = _ordered(entries)
    first = ordered[0].start if ordered else 0
    listed: list[Any] = [[e.name, e.dtype, list(e.shape), e.start - first, e.stop - first] for e in ordered]
    kept = sorted((name, value) for name, value in told.items() if name != "directory")
    return hashlib.sha256(json.dumps([kept, listed]).encode()).hexdigest()


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.start)


@contextmanager
def _alone(partial: Path) -> Iterator[bool]:
    """Whether this process is the only one that writes the file, which it then is until the end of the context. What a
    process that was killed has left is written over."""
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have been about to rename it when it was opened.
            alone = os.path.samestat(os.fstat(handle), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            alone = False
        yield alone
    finally:
        os.close(handle)
