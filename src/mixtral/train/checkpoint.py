"""Run states: one folder per saved step, committed by a rename, read back exactly. No pickle.

``step-00001200/`` holds ``state.safetensors`` (masters and moments), ``state.json`` (everything else) and ``COMMIT``
(size and sha256 of both). It is written as ``step-00001200.tmp`` and renamed when all of it is on the disk. A folder
without a right ``COMMIT`` is damaged: it is passed over with a warning, or refused if there is no whole one. Who writes
holds the folder's lock; who reads needs none.

Of a run on several ranks every rank writes a file of its own, ``state-rank000.safetensors`` ..., and the first one
``index.json``. It commits when all have reported that theirs is on the disk; if one cannot, or is gone, nothing counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixtral.errors import TrainingError
from mixtral.parallel.mesh import Mesh, alone
from mixtral.parallel.state import INDEX, WHOLE, Piece, StateFiles, box_of, index_of, part_name, write_part

if sys.platform != "win32":
    import fcntl

__all__ = ["exclusive", "load_latest", "save"]

_VALUES, _COMMIT, _LOCK = "state.json", "COMMIT", "lock"
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")  # of a file of a state: it is in the state's own folder
# How a state looks that is not all there. Any other error is no word about the state: it may be whole.
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_whole: dict[Path, frozenset[tuple[str, int, int]]] = {}  # states that this process has read, by their stamps


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


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor] | Mapping[str, Piece],
    values: Mapping[str, Any],
    *,
    keep_last: int,
    mesh: Mesh | None = None,
) -> Path:
    """Write the state after ``step`` steps, then remove all but the ``keep_last`` newest.

    What interrupted saves left in ``folder`` is removed first: it may be what fills the disk. All ranks of a ``mesh``
    call this together, each with the pieces that it owns, and the first one's ``values`` count.

    Raises:
        TrainingError: the disk refused, on any rank; the states saved before are untouched.
    """
    mesh = alone() if mesh is None else mesh
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    message = f"{final}: the state was not saved ({{}})"
    try:
        with _together(mesh, message):
            if mesh.is_first:
                for left in _numbered(folder, ".tmp"):
                    shutil.rmtree(left, ignore_errors=True)
                temporary.mkdir(parents=True)
        with _together(mesh, message):
            commit = [_write_tensors(temporary, tensors, mesh)]
        commit = _of_all_ranks(commit[0], mesh)
        with _together(mesh, message):
            if mesh.is_first:
                _commit(temporary, final, values, commit, mesh)
    except TrainingError:
        if mesh.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if mesh.is_first:
        _remove_old(folder, keep_last, mesh)
    return final


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor] | Mapping[str, Piece], mesh: Mesh) -> dict[str, Any]:
    """Write this rank's file and bring it to the disk; its fingerprint."""
    if mesh.is_alone:
        path = folder / WHOLE
        save_file({name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}, path)
    else:
        path = folder / part_name(mesh.rank)
        write_part(path, {name: piece for name, piece in tensors.items() if isinstance(piece, Piece)})
    _flush(path)
    return _fingerprint(path)


def _of_all_ranks(own: Mapping[str, Any], mesh: Mesh) -> list[dict[str, Any]]:
    """The fingerprints that all ranks report, by rank."""
    content = own["size"].to_bytes(8, "little") + bytes.fromhex(own["sha256"])
    reports = [bytes(report.tolist()) for report in mesh.gather(torch.tensor(list(content), dtype=torch.uint8))]
    return [{"size": int.from_bytes(r[:8], "little"), "sha256": r[8:].hex()} for r in reports]


def _commit(temporary: Path, final: Path, values: Mapping[str, Any], reports: list[dict[str, Any]], mesh: Mesh) -> None:
    """Write what the first rank writes, and give the folder its name."""
    (temporary / _VALUES).write_text(json.dumps(dict(values), indent=1) + "\n", encoding="utf-8")
    commit = {WHOLE: reports[0]} if mesh.is_alone else {part_name(rank): report for rank, report in enumerate(reports)}
    if not mesh.is_alone:
        (temporary / INDEX).write_text(json.dumps(index_of(temporary, len(reports))) + "\n", encoding="utf-8")
        commit[INDEX] = _fingerprint(temporary / INDEX)
    commit[_VALUES] = _fingerprint(temporary / _VALUES)
    (temporary / _COMMIT).write_text(json.dumps(commit, indent=1) + "\n", encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    _flush(final.parent)


@contextmanager
def _together(mesh: Mesh, message: str) -> Iterator[None]:
    """What one rank cannot do, all give up: nobody waits for the others, or goes on without them.

    Raises:
        TrainingError: the disk refused something inside, here or on another rank: ``message`` with the reason.
    """
    reason: str | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error)
    if mesh.any(reason is not None):
        raise TrainingError(message.format(reason or "another rank says why")) from None


def load_latest(folder: Path, *, mesh: Mesh | None = None) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state: its step, tensors and values; None where none was ever saved.

    However many ranks wrote it. All ranks of a ``mesh`` call this together, and each gets its parts of the parameters.

    Warns:
        UserWarning: newer states are damaged and were passed over.

    Raises:
        TrainingError: there are states, but all are damaged. Not None: the caller would start from nothing. Or one
            cannot be read now. Not an older one: the caller would go on from it and replace the better one.
    """
    mesh = alone() if mesh is None else mesh
    message = f"{folder}: a run state cannot be read: {{}}; nothing was changed, try again"
    damaged: list[str] = []
    with _together(mesh, message):
        paths = list(reversed(_numbered(folder)))
    _check_same_folder(folder, paths, mesh)
    for path in paths:
        with _together(mesh, message):
            damage = _damage(path, mesh)
        if not mesh.any(damage is not None):
            if damaged:
                warnings.warn(f"{folder}: passed over {', '.join(damaged)}; going on from {path.name}", stacklevel=2)
            with _together(mesh, message):
                values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
                files = StateFiles(path)
                tensors = files.read({name: box_of(name, shape, mesh) for name, shape in files.shapes.items()})
            return _step_of(path), tensors, values
        damaged.append(f"{path.name} ({damage or 'as another rank sees it'})")
    if damaged:
        raise TrainingError(
            f"{folder}: holds no whole run state, only damaged ones: {', '.join(damaged)}; "
            "bring them back from a copy, or start in a new folder"
        )
    return None


def _check_same_folder(folder: Path, paths: list[Path], mesh: Mesh) -> None:
    seen = mesh.gather(torch.tensor([len(paths), _step_of(paths[0]) if paths else 0]))
    if any(not torch.equal(seen[0], other) for other in seen):
        raise TrainingError(f"{folder}: the ranks see different run states; it must be one folder on a shared disk")


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


def _remove_old(folder: Path, keep_last: int, mesh: Mesh) -> None:
    """Remove all but the newest whole states. What is damaged or cannot be read does not count, and stays.

    Where other ranks wait, files that have not changed since this process read them are not read again: of a large
    model that would take longer than the ranks wait for each other. A state to remove gets the name of an unfinished
    one first: if this is interrupted, the next save removes the rest.
    """
    try:
        whole = [path for path in _numbered(folder) if _is_whole(path, is_known=not mesh.is_alone and _is_known(path))]
    except OSError:
        return
    for old in whole[:-keep_last]:
        going = old.with_name(f"{old.name}.tmp")
        with suppress(OSError):
            old.replace(going)
            _whole.pop(old, None)
            shutil.rmtree(going, ignore_errors=True)


def _is_whole(path: Path, *, is_known: bool) -> bool:
    try:
        stamp = _stamp(path)
        if not is_known and _damage(path) is not None:
            return False
        _whole[path] = stamp
    except OSError:
        return False
    return True


def _is_known(path: Path) -> bool:
    """Whether this process found the state whole, and no file of it has changed since."""
    with suppress(OSError):
        return path in _whole and _whole[path] == _stamp(path)
    return False


def _stamp(path: Path) -> frozenset[tuple[str, int, int]]:
    """Name, size and time of the last change of all files of a state."""
    found = [(file.name, file.stat()) for file in path.iterdir()]
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _damage(path: Path, mesh: Mesh | None = None) -> str | None:
    """What is wrong with a state; None if it is as it was saved. Each rank of a mesh looks at its share of the files.

    Raises:
        OSError: it cannot be read, whole or not.
    """
    try:
        commit = json.loads((path / _COMMIT).read_text(encoding="utf-8"))
        names = sorted(commit.keys() | {_VALUES, INDEX if INDEX in commit else WHOLE})
        for name in names if mesh is None else names[mesh.rank :: mesh.axes.world]:
            if not _NAME.fullmatch(name) or commit[name] != _fingerprint(path / name):
                return f"{name} is not what was saved"
    except _MISSING as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
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
