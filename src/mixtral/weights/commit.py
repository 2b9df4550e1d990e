"""Writing several files of a folder so that a reader finds all of them or none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

__all__ = ["Commit"]


class Commit:
    """Files are written under temporary names, flushed, and renamed together by ``finish``.

    The file given last to ``path`` is the one without which no reader loads the folder: an old one goes first and the
    new one comes last, so an interrupted ``finish`` never leaves a mixture that loads. Leaving the context without
    ``finish`` removes everything that was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: list[str] = []

    def __enter__(self) -> Commit:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._names:
            self._partial(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Where to write the file that will be called ``name``."""
        self._names.append(name)
        return self._partial(name)

    def finish(self, *, remove: Iterable[str] = ()) -> None:
        """Flush and rename all files; files of the folder named in ``remove`` go, unless they were just written."""
        for name in self._names:
            _flush(self._partial(name))
        (self.folder / self._names[-1]).unlink(missing_ok=True)
        for name in set(remove) - set(self._names):
            (self.folder / name).unlink(missing_ok=True)
        for name in self._names:
            os.replace(self._partial(name), self.folder / name)
        _flush(self.folder)

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
