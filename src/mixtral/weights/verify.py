"""Whether a checkpoint is whole: every header, every tensor's place and shape, every value, every file's sha256.

A list of sums beside the weights, ``SHA256SUMS`` (``mixtral verify MODEL > SHA256SUMS``), is also compared by loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mixtral.errors import CheckpointError
from mixtral.files.commit import fingerprint
from mixtral.weights.checkpoint import Checkpoint, open_checkpoint
from mixtral.weights.matrices import CheckpointMatrices

__all__ = ["SUMS", "check_sums", "read_sums", "verify"]

SUMS = "SHA256SUMS"


def verify(
    path: Path,
    *,
    sums: Mapping[str, str] | None = None,
    unpickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Checkpoint, dict[str, str]]:
    """Check a checkpoint of any layout completely, one matrix in memory at a time; its files with their sha256.

    ``sums`` are those that are expected, by file name.

    Raises:
        ConfigError, CheckpointError: as ``open_checkpoint``; or a value is not finite, a file has another sha256, or a
            file that is expected is not there.
    """
    found = open_checkpoint(Path(path), unpickle=unpickle)
    total = sum(entry.stop - entry.start for entry in found.entries.values())
    done = 0
    with CheckpointMatrices(found) as matrices:
        for piece in found.plan:
            values = matrices.values(piece, torch.float32)
            if not bool(values.isfinite().all()):
                count = int((~values.isfinite()).sum())
                expert = "" if piece.expert is None else f", expert {piece.expert}"
                raise CheckpointError(f"{piece.name!r}{expert}: {count:,} values are NaN or infinite")
            entry = found.entries[piece.name]
            done += (entry.stop - entry.start) * values.numel() // max(1, torch.Size(entry.shape).numel())
            progress(done, total)
    files = _compare(found.files, sums or {})
    missing = [name for name in files if sums is not None and name not in sums]
    if missing:
        raise CheckpointError(f"{missing[0]}: the list of sha256 sums does not have it")
    return found, files


def check_sums(files: Sequence[Path]) -> int:
    """Compare files with the lists ``SHA256SUMS`` beside them; how many were in one. Files of no list are not read.

    Raises:
        CheckpointError: a file has another sha256, or a line of a list is none.
    """
    count = 0
    for folder in sorted({file.parent for file in files}):
        if (folder / SUMS).is_file():
            sums = read_sums(folder / SUMS)
            listed = [file for file in files if file.parent == folder and file.name in sums]
            count += len(_compare(listed, sums))
    return count


def _compare(files: Sequence[Path], sums: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of files by name, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        found = {file.name: str(each["sha256"]) for file, each in zip(files, pool.map(fingerprint, files), strict=True)}
    wrong = [name for name, expected in sums.items() if name in found and found[name] != expected]
    if wrong:
        raise CheckpointError(f"{wrong[0]}: sha256 is {found[wrong[0]]}, not the expected one; download it again")
    return found


def read_sums(path: Path) -> dict[str, str]:
    """The contents of a file as ``sha256sum`` writes it: name -> sha256.

    Raises:
        CheckpointError: a line is not two spaces or " *" between 64 hexadecimal digits and a name.
    """
    sums = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8; expected lines as sha256sum writes them") from None
    for number, line in enumerate(lines, 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if len(digest) != 64 or set(digest) - set("0123456789abcdef") or gap not in ("  ", " *") or not name:
            raise CheckpointError(f"{path}: line {number} is {line!r:.80}; expected sha256, two spaces, file name")
        sums[Path(name).name] = digest
    return sums
