"""Run states: one folder per saved step, committed by a rename, read back exactly. No pickle.

``step-00001200/`` holds ``state.safetensors`` (masters and moments), ``state.json`` (everything else) and ``COMMIT``
(size and sha256 of both). It is written as ``step-00001200.tmp`` and renamed when all of it is on the disk. A folder
without a right ``COMMIT`` is damaged: it is passed over with a warning, or refused if there is no whole one. Who writes
holds the folder's lock; who reads needs none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.errors import TrainingError

if sys.platform != "win32":
    import fcntl

__all__ = ["exclusive", "load_latest", "save"]

_TENSORS, _VALUES, _COMMIT, _LOCK = "state.safetensors", "state.json", "COMMIT", "lock"
# How a state looks that is not all there. Any other error is no word about the state: it may be whole.
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep all others from training in it: two runs would remove each other's unfinished states.

    The system ends the lock with the process, however that ends; the file ``lock`` stays, and means nothing by itself.
    Windows has no ``flock``, and no directories that can be flushed either: states cannot be saved there, so there is
    nothing to lock.

    Warns:
        UserWarning: the file system has no locks; nothing is locked.

    Raises:
        TrainingError: another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("ab")
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"{folder}: another process is training here; wait for its end, stop it, or choose another folder"
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{folder}: cannot be locked ({error.strerror}); see to it that no other process trains here",
                    stacklevel=3,
                )
        yield


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, keep_last: int) -> Path:
    """Write the state after ``step`` steps, then remove all but the ``keep_last`` newest.

    What interrupted saves left in ``folder`` is removed first: it may be what fills the disk.

    Raises:
        TrainingError: the disk refused; the states saved before are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    try:
        for left in _numbered(folder, ".tmp"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(dict(tensors), temporary / _TENSORS)
        (temporary / _VALUES).write_text(json.dumps(dict(values), indent=1) + "\n", encoding="utf-8")
        commit = {name: _fingerprint(temporary / name) for name in (_TENSORS, _VALUES)}
        (temporary / _COMMIT).write_text(json.dumps(commit, indent=1) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(f"{final}: the state was not saved ({error})") from None
    _remove_old(folder, keep_last)
    return final


def load_latest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state: its step, tensors and values; None where none was ever saved.

    Warns:
        UserWarning: newer states are damaged and were passed over.

    Raises:
        TrainingError: there are states, but all are damaged. Not None: the caller would start from nothing. Or one
            cannot be read now. Not an older one: the caller would go on from it and replace the better one.
    """
    damaged: list[str] = []
    try:
        for path in reversed(_numbered(folder)):
            damage = _damage(path)
            if damage is None:
                if damaged:
                    warnings.warn(
                        f"{folder}: passed over {', '.join(damaged)}; going on from {path.name}", stacklevel=2
                    )
                values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
                return _step_of(path), load_file(path / _TENSORS), values
            damaged.append(f"{path.name} ({damage})")
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder}: a run state cannot be read: {error}; nothing was changed, try again") from None
    if damaged:
        raise TrainingError(
            f"{folder}: holds no whole run state, only damaged ones: {', '.join(damaged)}; "
            "bring them back from a copy, or start in a new folder"
        )
    return None


def _numbered(folder: Path, suffix: str = "") -> list[Path]:
    """The folders ``step-NUMBER`` + ``suffix``, oldest step first.

    Raises:
        OSError: the folder cannot be read. Not ``glob``: it takes such a folder for an empty one.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = [folder / name for name in names if name.startswith("step-") and name.endswith(suffix)]
    return sorted((path for path in found if _number(path, suffix).isdecimal()), key=_step_of)


def _number(path: Path, suffix: str = ".tmp") -> str:
    return path.name.removeprefix("step-").removesuffix(suffix)


def _step_of(path: Path) -> int:
    return int(_number(path))


def _remove_old(folder: Path, keep_last: int) -> None:
    """Remove all but the newest whole states. What is damaged or cannot be read does not count, and stays."""
    try:
        whole = [path for path in _numbered(folder) if _is_whole(path)]
    except OSError:
        return
    for old in whole[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        return _damage(path) is None
    except OSError:
        return False


def _damage(path: Path) -> str | None:
    """What is wrong with a state; None if it is as it was saved.

    Raises:
        OSError: it cannot be read, whole or not.
    """
    try:
        commit = json.loads((path / _COMMIT).read_text(encoding="utf-8"))
        for name in (_TENSORS, _VALUES):
            if commit[name] != _fingerprint(path / name):
                return f"{name} is not what was saved"
    except _MISSING as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{_COMMIT} is not what was saved"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
