"""Run states: one folder per saved step, committed by a rename, read back exactly. No pickle.

``step-00001200/`` holds ``state.safetensors`` (masters and moments), ``state.json`` (everything else) and ``COMMIT``
(size and sha256 of both). It is written as ``step-00001200.tmp`` and renamed when all of it is on the disk; a folder
without a right ``COMMIT`` does not exist for the reader.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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

    Raises:
        TrainingError: the disk refused; the states saved before are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
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
    for old in _committed(folder)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state: its step, tensors and values; None where there is none. Damaged ones are passed over."""
    for path in reversed(_committed(folder)):
        values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
        return int(path.name.removeprefix("step-")), load_file(path / _TENSORS), values
    return None


def _committed(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return [path for path in found if _is_whole(path)]


def _is_whole(path: Path) -> bool:
    try:
        commit = json.loads((path / _COMMIT).read_text(encoding="utf-8"))
        return bool(commit == {name: _fingerprint(path / name) for name in (_TENSORS, _VALUES)})
    except (OSError, ValueError):
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
