"""Run states: one folder per saved step, committed by a rename, read back exactly. No pickle.

``step-00001200/`` holds ``state.safetensors`` (masters and moments), ``state.json`` (everything else) and ``COMMIT``
(size and sha256 of both). It is written as ``step-00001200.tmp`` and renamed when all of it is on the disk. A folder
without a right ``COMMIT`` is damaged: it is passed over with a warning, or refused if there is no whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.errors import TrainingError

__all__ = ["load_latest", "save"]

_TENSORS, _VALUES, _COMMIT = "state.safetensors", "state.json", "COMMIT"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, keep_last: int) -> Path:
    """Write the state after ``step`` steps, then remove all but the ``keep_last`` newest.

    What interrupted saves left in ``folder`` is removed first: it may be what fills the disk.

    Raises:
        TrainingError: the disk refused; the states saved before are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    for left in _numbered(folder, ".tmp"):
        shutil.rmtree(left, ignore_errors=True)
    try:
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
    whole = [path for path in _numbered(folder) if _damage(path) is None]
    for old in whole[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state: its step, tensors and values; None where none was ever saved.

    Warns:
        UserWarning: newer states are damaged and were passed over.

    Raises:
        TrainingError: there are states, but all are damaged. Not None: the caller would start from nothing.
    """
    damaged: list[str] = []
    for path in reversed(_numbered(folder)):
        damage = _damage(path)
        if damage is not None:
            damaged.append(f"{path.name} ({damage})")
            continue
        if damaged:
            warnings.warn(f"{folder}: passed over {', '.join(damaged)}; going on from {path.name}", stacklevel=2)
        values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
        return int(path.name.removeprefix("step-")), load_file(path / _TENSORS), values
    if damaged:
        raise TrainingError(
            f"{folder}: holds no whole run state, only damaged ones: {', '.join(damaged)}; "
            "bring them back from a copy, or start in a new folder"
        )
    return None


def _numbered(folder: Path, suffix: str = "") -> list[Path]:
    """The folders ``step-NUMBER`` + ``suffix``, oldest step first."""
    found = folder.glob(f"step-*{suffix}")
    return sorted(path for path in found if path.name.removeprefix("step-").removesuffix(suffix).isdigit())


def _damage(path: Path) -> str | None:
    """What is wrong with a state; None if it is as it was saved."""
    try:
        commit = json.loads((path / _COMMIT).read_text(encoding="utf-8"))
        for name in (_TENSORS, _VALUES):
            if commit[name] != _fingerprint(path / name):
                return f"{name} is not what was saved"
    except OSError as error:
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
