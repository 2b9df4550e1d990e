"""``log.jsonl`` of a run: a record per line, of steps and of saved states, that survives kills and full disks."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixtral.errors import TrainingError

__all__ = ["Log"]


class Log:
    """``log.jsonl``, a record per line. A disk that refuses one costs a warning, never what was trained.

    ``evaluated`` tells whether the log had the validation loss of step ``last`` when it was opened.
    """

    def __init__(self, path: Path, last: int) -> None:
        self._path = path
        self._waiting = b""  # lines that are not in the file
        self._warned = False
        self.evaluated = _trim_log(path, last)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, after those that the disk refused before."""
        self._waiting += json.dumps(record).encode() + b"\n"
        self._write(to_disk=False)

    def flush(self) -> None:
        """Bring all records to the disk, so that the log lacks no step of a state that is saved after this."""
        self._write(to_disk=True)

    def _write(self, *, to_disk: bool) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                end, rest = file.tell(), self._waiting
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    with suppress(OSError):  # else the next record would stand on a line with half of this one
                        file.truncate(end)
                    raise
                self._waiting = b""
                if to_disk:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"{self._path}: cannot be written ({error.strerror}); training goes on and tries again",
                    stacklevel=4,
                )
            self._warned = True


def _trim_log(path: Path, last: int) -> bool:
    """Drop what was logged after step ``last``, which will be trained again, and lines that were not written whole.

    Returns whether the validation loss of step ``last`` is in what stays.

    Raises:
        TrainingError: the disk refused; the log is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        content = path.read_bytes() if path.exists() else b""
        lines = [line for line in content.split(b"\n") if _is_record_up_to(last, line)]
        kept = b"".join(line + b"\n" for line in lines)
        if kept != content:
            with temporary.open("wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read or written ({error.strerror}); nothing was trained") from None
    records = [json.loads(line) for line in lines]
    return any(record["step"] == last and "validation_loss" in record for record in records)


def _is_record_up_to(last: int, line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= last
