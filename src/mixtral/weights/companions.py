"""What belongs to the weights for other programs: tokenizer, chat template, generation defaults; copied as it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from mixtral.errors import CheckpointError
from mixtral.files.commit import Commit
from mixtral.files.safetensors import inside

__all__ = ["COMPANIONS", "Copied", "companions", "copy_companions"]

COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v[0-9]*",
    "tokenizer_config.json",
)
MAX_BYTES = 32 << 20  # the largest, tokenizer.json, has 3.5 MB


@dataclass(frozen=True, slots=True)
class Copied:
    """Names that were copied, and why others were not."""

    names: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def companions(folder: Path) -> list[str]:
    """Names of the companions in a folder, in order; none for a file."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in COMPANIONS))


def copy_companions(names: Sequence[str], source: Path, target: Path, *, overwrite: bool) -> Copied:
    """Copy companions from one folder to another, each complete or not at all, and the bytes unchanged.

    What is no regular file inside ``source``, is larger than 32 MB, or would replace a file and may not, is skipped:
    the weights are whole without it.

    Raises:
        OSError: the target cannot be written.
    """
    done = Copied()
    for name in names:
        if os.path.lexists(target / name) and not overwrite:
            done.skipped[name] = "is there already"
            continue
        try:
            data = _read(inside(source, name))
        except CheckpointError as error:
            done.skipped[name] = str(error)
            continue
        with Commit(target, only=name) as commit:
            commit.path(name).write_bytes(data)
            commit.finish()
        done.names.append(name)
    return done


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"larger than {MAX_BYTES:,} bytes")
    return data
