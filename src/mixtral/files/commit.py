"""Writing several files of a folder so that a reader finds all of them or none, and nothing is ever lost.

The new files are written as ``.NAME.partial`` and flushed. Then the old ones are set aside as ``.NAME.replaced1`` and
the new ones get their names. The file without which no reader loads the folder goes first and comes last, so nobody
loads a mixture. The old files are deleted only when the new ones are in place; after an error they get their names
back. So the complete old or the complete new files are on the disk at every moment, also if the process is killed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from mixtral.errors import CheckpointError

__all__ = ["Commit", "fingerprint", "flush", "interrupted"]


_PARTIAL_WEIGHTS = ".model*.partial"


class Commit:
    """Files to be written to a folder together. Leaving the context without ``finish`` removes what was written.

    ``finish`` also deletes what killed saves left in the folder, which holds one model; where it holds others too,
    ``only`` is the name of the one file to be written, and nothing of the others is touched.
    """

    def __init__(self, folder: Path, *, only: str | None = None) -> None:
        self.folder = folder
        name = "*" if only is None else glob.escape(only)
        self._replaced = f".{name}.replaced[0-9]*"
        self._left = (self._replaced, _PARTIAL_WEIGHTS if only is None else f".{name}.partial")
        self._names: list[str] = []
        self._moves: list[tuple[Path, Path]] = []
        self._keep = False

    def __enter__(self) -> Commit:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in [] if self._keep else self._names:
            with contextlib.suppress(OSError):  # must not hide the error that is on its way
                self._partial(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Where to write the file that will be called ``name``; the last one is what no reader can do without."""
        self._names.append(name)
        return self._partial(name)

    def finish(self, *, remove: Iterable[str] = ()) -> None:
        """Put all files in place; files of the folder named in ``remove`` go, unless they were just written.

        Raises:
            OSError: it failed, and the folder is as it was before.
            CheckpointError: it failed, and so did putting the old files back. Old and new files are kept.

        Warns:
            UserWarning: it worked, but an old file could not be deleted.
        """
        *others, last = self._names
        for name in self._names:
            flush(self._partial(name))
        flush(self.folder)
        if os.path.lexists(self.folder / last):
            self._delete(self._replaced)  # of a save that was killed when its new files were in place
        try:
            # Each flush keeps a crash of the machine from reordering the renames before it and those after it.
            self._set_aside(last)
            flush(self.folder)
            for name in sorted(set(others) | set(remove) - {last}):
                self._set_aside(name)
            for name in others:
                self._move(self._partial(name), self.folder / name)
            flush(self.folder)
            self._move(self._partial(last), self.folder / last)
            flush(self.folder)
        except BaseException as error:
            self._put_back(error)
            raise
        self._delete(*self._left)

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _set_aside(self, name: str) -> None:
        if os.path.lexists(self.folder / name):
            # A name in use belongs to a save that was killed, and may be all that is left of an older model.
            names = (self.folder / f".{name}.replaced{number}" for number in itertools.count(1))
            self._move(self.folder / name, next(path for path in names if not os.path.lexists(path)))

    def _move(self, source: Path, target: Path) -> None:
        # Noted first: an interrupt may arrive between the rename and whatever follows it.
        self._moves.append((source, target))
        os.replace(source, target)

    def _put_back(self, reason: BaseException) -> None:
        """Undo the moves, last one first. No target existed before its move, so one that exists was moved."""
        self._keep = True
        try:
            for source, target in reversed(self._moves):
                if os.path.lexists(target):
                    os.replace(target, source)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: replacing its files failed ({_told(reason)}), and so did putting the old ones back "
                f"({_told(error)}). Nothing is lost: {_STATE}"
            ) from reason
        self._keep = False

    def _delete(self, *patterns: str) -> None:
        """What saves left that are over; saves of the past too, which were killed."""
        for path in sorted(path for pattern in patterns for path in self.folder.glob(pattern)):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                warnings.warn(
                    f"{path}: is not needed any more, but could not be deleted ({_told(error)}); delete it by hand",
                    stacklevel=3,
                )


_STATE = (
    "an old file is called NAME or .NAME.replaced1, a new one NAME or .NAME.partial. Rename all the old or all the new "
    "ones to NAME, config.json last, or save the model again"
)


def interrupted(folder: Path, name: str) -> str | None:
    """What to tell a reader who misses the last file because a ``finish`` was killed; None if that is not why."""
    if os.path.lexists(folder / name) or not any(folder.glob(f".{name}.replaced[0-9]*")):
        return None
    return f"{folder}: replacing its files was interrupted, so {name} is missing. Nothing is lost: {_STATE}"


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _told(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
