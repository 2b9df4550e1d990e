"""What a checkpoint is, found by its contents: config, layout, and where every tensor lies, all checked.

Only headers are read. Afterwards every tensor is known to be used exactly once and every parameter to be filled
exactly once, with the right shape.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixtral.config import MixtralConfig, read_config
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.commit import interrupted
from mixtral.files.gguf import read_gguf
from mixtral.files.read import Entry
from mixtral.files.safetensors import INDEX_NAME, SINGLE_NAME, inside, read_checkpoint
from mixtral.quant.formats import FORMATS
from mixtral.weights.coding import read_coding
from mixtral.weights.consolidated import PARAMS_NAME, STEM, pickled_files, read_consolidated, read_params
from mixtral.weights.gguf_model import config_from_gguf, find_gguf
from mixtral.weights.integer import CodedEntry, is_coded_part, join_coded
from mixtral.weights.names import DOWN, EMBEDDING, TABLE, Layout, Piece, detect_layout, highest, pieces, why_refused

__all__ = [
    "FLOAT_DTYPES",
    "Checkpoint",
    "open_checkpoint",
    "pieces_of",
    "read_any_config",
    "read_folder_config",
    "unchanged",
]

FLOAT_DTYPES = ("BF16", "F16", "F32")
LISTED = 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Config, layout, the tensors by name, the pieces that they consist of, in the order of our parameters, and what
    else a GGUF file says."""

    path: Path
    layout: Layout
    config: MixtralConfig
    entries: Mapping[str, Entry]
    plan: Sequence[Piece]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        """The files with tensors, in order."""
        return sorted({entry.shard for entry in self.entries.values()})


def open_checkpoint(path: Path, *, unpickle: bool = False) -> Checkpoint:
    """Find out what a folder or a GGUF file holds. Where a folder has a model in several forms, as on the Hugging Face
    Hub, Hugging Face's files win over ``consolidated.*``, and these over GGUF. ``unpickle`` allows archives that could
    carry code.

    Raises:
        ConfigError: the config is missing or wrong.
        CheckpointError: the files are missing or damaged, or do not fit the config.
    """
    path = Path(path)
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any] = {}
    dtypes: Sequence[str] = FLOAT_DTYPES
    kind = _kind(path)
    if isinstance(kind, Path):
        container = read_gguf(kind)
        entries, metadata, dtypes, source = container.tensors, container.metadata, list(FORMATS), kind.name
        config = config_from_gguf(container, source)
    elif kind == "consolidated":
        config, source = read_params(path), PARAMS_NAME
        entries = read_consolidated(path, unpickle=unpickle)
    else:
        config, source = read_folder_config(path), "config.json"
        entries = read_checkpoint(path)
    layout = detect_layout(entries)
    _check_sizes(config, entries, layout, source)
    plan = pieces(config, layout)
    if kind == "hugging face":
        entries = _joined(path, entries, plan)
    _check_tensors(plan, entries, dtypes, source)
    return Checkpoint(path, layout, config, entries, plan, metadata)


def _joined(folder: Path, entries: Mapping[str, Entry], plan: Sequence[Piece]) -> Mapping[str, Entry]:
    """The entries with the tensors of every integer matrix joined, if the config declares such and the files hold
    them."""
    coding = read_coding(folder)
    coded = next((name for name in entries if is_coded_part(name)), None)
    if coding is None and coded is None:
        return entries
    if coding is None or coded is None:
        told = f"config.json declares {coding.method} weights" if coding else "config.json has no quantization_config"
        found = f"{coded!r}" if coded else "no integer matrix"
        raise CheckpointError(f"{folder}: {told}, but the tensors hold {found}; the files do not belong together")
    return join_coded(entries, {piece.name: piece.tensor_shape for piece in plan}, coding)


def _kind(path: Path) -> Path | Literal["consolidated", "hugging face"]:
    """The GGUF file that is meant, or which files of the folder count."""
    if any(os.path.lexists(path / name) for name in (SINGLE_NAME, INDEX_NAME)):
        return "hugging face"
    if any(path.glob(f"{STEM}*.safetensors*")) or pickled_files(path):
        return "consolidated"
    return find_gguf(path) or "hugging face"


def read_any_config(path: Path) -> MixtralConfig:
    """The config of a checkpoint, wherever it is, without a look at the weights of a folder."""
    kind = _kind(path)
    if isinstance(kind, Path):
        return config_from_gguf(read_gguf(kind), kind.name)
    return read_params(path) if kind == "consolidated" else read_folder_config(path)


def pieces_of(path: Path) -> list[str] | None:
    """The vocabulary in the GGUF file that a path means; None if other files count, or it holds none."""
    kind = _kind(path)
    tokens = read_gguf(kind).metadata.get("tokenizer.ggml.tokens") if isinstance(kind, Path) else None
    return tokens if isinstance(tokens, list) else None


def read_folder_config(folder: Path) -> MixtralConfig:
    """The strict config of a checkpoint folder; a ``config.json`` that links out of the folder is refused."""
    path = folder / "config.json"
    told = interrupted(folder, path.name)
    if told:
        raise ConfigError(told)
    return read_config(inside(folder, path.name) if path.exists() else path)


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """While the files of a checkpoint are read: refuse the result if a save replaced them meanwhile.

    Raises:
        CheckpointError: what was read may be half of one model and half of another.
    """
    before = _stamp(path)
    yield
    if _stamp(path) != before:
        raise CheckpointError(f"{path}: was replaced while it was read; load it again")


def _stamp(path: Path) -> tuple[tuple[int, ...], ...]:
    """Differs after every save: it renames one of these files before it touches another, which sets the change time."""
    found = []
    for file in [path] if path.is_file() else [path / "config.json", path / PARAMS_NAME, *sorted(path.glob("*.gguf"))]:
        try:
            state = file.stat()
        except OSError:
            continue
        found.append((state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns))
    return tuple(found)


def _check_sizes(config: MixtralConfig, entries: Mapping[str, Entry], layout: Layout, source: str) -> None:
    """Compare the numbers of the config with what the files hold, before either is used to size anything."""
    found = {"num_hidden_layers": highest(entries, "layer") + 1}
    rows = {row.ours: row for row in TABLE[layout]}
    embedding = entries.get(rows[EMBEDDING].file)
    if embedding is not None and len(embedding.shape) == 2:
        found["vocab_size"], found["hidden_size"] = embedding.shape
    down = entries.get(rows[DOWN].file.format(l=0, e=0))
    if not rows[DOWN].stacked:
        found["num_local_experts"] = highest(entries, "expert") + 1
    elif down is not None and len(down.shape) == 3:
        found["num_local_experts"], _, found["intermediate_size"] = down.shape
    for name, number in found.items():
        said = getattr(config, name)
        if said != number:
            raise CheckpointError(f"{source} says {name} {said}, but the tensors have {number}", param=name)
    # A few names are enough to bear out enormous numbers, and listing every tensor that these promise takes long.
    per_layer = sum(config.num_local_experts if "{e}" in row.file else 1 for row in TABLE[layout] if "{l}" in row.file)
    promised = config.num_hidden_layers * per_layer
    if promised > 2 * len(entries) + 100:
        raise CheckpointError(f"{source} promises at least {promised:,} tensors, but the files hold {len(entries):,}")


def _check_tensors(plan: Sequence[Piece], entries: Mapping[str, Entry], dtypes: Sequence[str], source: str) -> None:
    expected = {piece.name: piece.tensor_shape for piece in plan}
    # Those with a reason first: they explain the rest of the list.
    problems = [f"unexpected {name!r} {reason}" for name in entries if (reason := why_refused(name))]
    problems += [f"missing {name!r} {list(shape)}" for name, shape in expected.items() if name not in entries]
    for name, entry in entries.items():
        shape = expected.get(name)
        if shape is None:
            problems += [] if why_refused(name) else [f"unexpected {name!r}"]
        elif entry.shape != shape:
            problems.append(f"{name!r} is {list(entry.shape)}, expected {list(shape)}")
        elif entry.dtype not in dtypes and not isinstance(entry, CodedEntry):
            problems.append(f"{name!r} is {entry.dtype}, expected one of {', '.join(dtypes)}")
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(
            f"the tensors do not fit {source} ({len(problems)} problems):\n  " + "\n  ".join(problems[:LISTED]) + more
        )
