"""How ids without rows of their own are spelled with others, beside the weights of an ordinary folder.

A compact folder (the embedded model) has it inside. A model that was made from one keeps it in ``respelling.json``: an
object from every such id to the list of ids that spell it. Without it, all these ids look alike to the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral.errors import CheckpointError
from mixtral.files.commit import Commit
from mixtral.files.safetensors import inside
from mixtral.weights.checkpoint import read_any_config
from mixtral.weights.compact import is_compact, read_respelling

__all__ = ["NAME", "respelling_of", "write_respelling"]

NAME = "respelling.json"


def respelling_of(path: Path) -> dict[int, tuple[int, ...]]:
    """The spelling of every id that has no row of its own, in a folder; empty for ordinary models, and for files.

    Raises:
        CheckpointError: it is damaged, or names ids that the model does not have.
    """
    if not path.is_dir():
        return {}
    if is_compact(path):
        return read_respelling(path)
    if not (path / NAME).exists():
        return {}
    try:
        found: Any = json.loads(inside(path, NAME).read_text(encoding="utf-8"))
        pairs = {int(id): tuple(map(int, ids)) for id, ids in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / NAME}: cannot be read ({error}); expected an object of lists of ids") from None
    size = read_any_config(path).vocab_size
    for id, ids in pairs.items():
        if not ids or not all(0 <= value < size for value in (id, *ids)):
            raise CheckpointError(f"{path / NAME}: {id} -> {list(ids)} is empty or outside the vocabulary of {size}")
    return pairs


def write_respelling(folder: Path, respelling: Mapping[int, tuple[int, ...]]) -> None:
    """Write it beside the weights of a folder. An empty one is no file: that of a model that was there before goes.

    Raises:
        OSError: the folder cannot be written.
    """
    if not respelling:
        (folder / NAME).unlink(missing_ok=True)
        return
    with Commit(folder, only=NAME) as commit:
        commit.path(NAME).write_text(json.dumps({str(id): list(ids) for id, ids in respelling.items()}), "utf-8")
        commit.finish()
