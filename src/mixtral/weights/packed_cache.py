"""The packed weights of a checkpoint in a folder of caches: found by what the checkpoint holds, made when missing.

The name of a file comes from a key of the checkpoint: sizes and headers of its files, some 4 KB of every tensor (both
ends and one for every 8 MB), and how the config says they are to be read. Paths and names of files do not count, and
what the samples miss does not either, so the files are compared as a whole (sha256) with those that the cache was made
from. Files that were compared before are known by inode, size and times: a list of them is kept beside the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.commit import fingerprint
from mixtral.files.panel_file import SAMPLE, PanelFile, places, write_panels
from mixtral.files.read import Entry
from mixtral.quant.panels import Panels
from mixtral.weights.checkpoint import Checkpoint
from mixtral.weights.integer import CodedEntry
from mixtral.weights.names import Piece

__all__ = ["PackedCache"]

_log = logging.getLogger("mixtral")
_KNOWN = 100  # copies of one checkpoint that are remembered


class PackedCache:
    """The cache file of one checkpoint, to be made before the checkpoint is read.

    Either every matrix is taken from it, or every matrix is kept and ``finish`` writes a new one.

    Raises:
        ConfigError: ``folder`` is not a folder.
    """

    def __init__(self, folder: Path, found: Checkpoint) -> None:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"packed_cache is {str(folder)!r}, a file; expected a folder", param="packed_cache")
        entries = list(_stored(found.entries.values()))
        self._files = sorted({entry.shard for entry in entries})
        self._states = self._stat()
        self._key = _key_of(found, entries, self._files)
        self.path = folder / f"panels-{self._key[:32]}.safetensors"
        self._known_path = self.path.with_suffix(".known")
        self._kept: dict[str, Panels] = {}
        self._file = self._open()

    @property
    def found(self) -> bool:
        """Whether there is a file that can be used."""
        return self._file is not None

    def take(self, piece: Piece) -> Panels | None:
        """A matrix of the file; None if it has none, as of formats that have no kernel.

        Raises:
            CheckpointError: what the file says of it does not belong together.
        """
        name = _name(piece)
        return self._file.take(name) if self._file is not None and name in self._file.names else None

    def keep(self, piece: Piece, panels: Panels) -> None:
        """Note a matrix that was packed."""
        if self._file is None:
            self._kept[_name(piece)] = panels

    def finish(self) -> None:
        """Write what was kept.

        Warns:
            UserWarning: that failed, and nothing is left of it. The next load packs again.
        """
        if self._file is not None:
            return
        if not self._kept:
            _log.info("packed cache: nothing in this model is packed, so none is written")
            return
        try:
            sha256 = _sha256(self._files)
            if self._stat() != self._states:
                changed = "packed cache: the weights were changed while they were read; none is written"
                warnings.warn(changed, stacklevel=2)
                return
            written = write_panels(self.path, self._kept, source=self._key, sha256=sha256)
            if written:
                self._note([], sha256)
        except OSError as error:
            told = error.strerror or error
            warnings.warn(f"packed cache: {self.path} cannot be written ({told}); it goes on without", stacklevel=2)
            return
        size = sum(panels.size_bytes for panels in self._kept.values())
        other = "is being written by another process"
        _log.info("packed cache: %s %s", self.path, f"written, {size:,} bytes" if written else other)

    def _open(self) -> PanelFile | None:
        if not self.path.exists():
            return None
        try:
            file = PanelFile(self.path)
            if file.source != self._key:
                raise CheckpointError(f"{self.path.name}: made from other weights")
            self._compare(file)
        except (CheckpointError, OSError) as error:
            _log.warning("packed cache: %s; the weights are packed anew", error)
            return None
        _log.info("packed cache: %s is used", self.path)
        return file

    def _compare(self, file: PanelFile) -> None:
        """The weights must be those that the file was made from, byte for byte."""
        known = self._known(file.sha256)
        if self._states in known:
            return
        _log.info("packed cache: these files are new to it; they are compared with those that it was made from")
        if _sha256(self._files) != file.sha256 or self._stat() != self._states:
            raise CheckpointError(f"{self.path.name}: made from other weights")
        self._note(known, file.sha256)

    def _known(self, sha256: str) -> list[list[list[int]]]:
        """The states of checkpoints whose files are known to have this sha256; none if the list cannot be read."""
        try:
            told = json.loads(self._known_path.read_text(encoding="utf-8"))
            # Another process may have written another cache meanwhile.
            return list(told["states"]) if told["sha256"] == sha256 else []
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def _note(self, known: list[list[list[int]]], sha256: str) -> None:
        """The present files are known too. In a folder that only others may write to they are compared again."""
        text = json.dumps({"sha256": sha256, "states": [*known, self._states][-_KNOWN:]})
        partial = self.path.parent / f".{self._known_path.name}.{os.getpid()}.{threading.get_ident()}"
        with suppress(OSError):
            try:
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, self._known_path)
            finally:
                partial.unlink(missing_ok=True)

    def _stat(self) -> list[list[int]]:
        """Which files they are, and what changes when one does. Nobody can set the ctime, not even a copy that keeps
        times."""
        found = [path.stat() for path in self._files]
        return [[one.st_dev, one.st_ino, one.st_size, one.st_ctime_ns, one.st_mtime_ns] for one in found]


def _name(piece: Piece) -> str:
    parameter, expert, half = piece.key
    return parameter if expert is None else f"{parameter}.{expert}.{half}"


def _stored(entries: Iterable[Entry]) -> Iterable[Entry]:
    """The tensors of the files."""
    for entry in entries:
        yield from entry.parts.values() if isinstance(entry, CodedEntry) else [entry]


def _key_of(found: Checkpoint, entries: list[Entry], files: list[Path]) -> str:
    digest = hashlib.sha256()
    for piece in found.plan:
        entry = found.entries[piece.name]
        coding = (entry.dtype, entry.kind, entry.bits, entry.coding) if isinstance(entry, CodedEntry) else entry.dtype
        digest.update(repr((piece, coding)).encode())
    for path in files:
        here = sorted((entry for entry in entries if entry.shard == path), key=lambda entry: entry.start)
        handle = os.open(path, os.O_RDONLY)
        try:
            digest.update(os.fstat(handle).st_size.to_bytes(8, "little"))
            digest.update(os.pread(handle, here[0].start, 0))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # or megabytes would be read for every sample
            for entry in here:
                size = entry.stop - entry.start
                for place in places(size):
                    digest.update(os.pread(handle, min(SAMPLE, size - place), entry.start + place))
        finally:
            os.close(handle)
    return digest.hexdigest()


def _sha256(files: list[Path]) -> str:
    return " ".join(str(fingerprint(path)["sha256"]) for path in files)
