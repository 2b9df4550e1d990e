"""Whether a checkpoint is whole: every header, every tensor's place and shape, every value, every file's sha256."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mixtral.errors import CheckpointError
from mixtral.files.sums import compare_sums
from mixtral.weights.checkpoint import Checkpoint, open_checkpoint
from mixtral.weights.matrices import CheckpointMatrices

__all__ = ["verify"]


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
    files = compare_sums(found.files, sums or {})
    missing = [name for name in files if sums is not None and name not in sums]
    if missing:
        raise CheckpointError(f"{missing[0]}: the list of sha256 sums does not have it")
    return found, files
