"""Checkpoint folder -> model: every tensor of the files is used once, every parameter is filled once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mixtral.config import MixtralConfig, read_config
from mixtral.errors import CheckpointError, ConfigError
from mixtral.model.mixtral import Mixtral
from mixtral.weights.commit import interrupted
from mixtral.weights.hf import DTYPES, Entry, ShardReader, inside, read_checkpoint
from mixtral.weights.names import Piece, Style, detect_style, highest, is_router, pieces, why_refused

__all__ = ["FLOAT_DTYPES", "checked_dtype", "load_model", "place", "read_folder_config", "unchanged"]

FLOAT_DTYPES = ("BF16", "F16", "F32")
LISTED = 20


def load_model(folder: Path, *, device: torch.device | str, dtype: torch.dtype | None = None) -> Mixtral:
    """Load a Hugging Face folder (per-expert or fused names). ``dtype`` None keeps the file's own; routers are fp32.

    Raises:
        ConfigError: ``config.json`` is missing or wrong, or ``dtype`` is not float32, float16 or bfloat16.
        CheckpointError: the files are missing or damaged, or do not fit the config.
    """
    folder = Path(folder)
    if dtype is not None:
        checked_dtype(dtype)
    with unchanged(folder):
        config = read_folder_config(folder)
        entries = read_checkpoint(folder)
        style = detect_style(entries)
        _check_sizes(config, entries, style)
        plan = pieces(config, style)
        _check_tensors(plan, entries)
        model = Mixtral(config, device="meta", dtype=dtype or _own_dtype(plan, entries))
        _fill(model, plan, entries, torch.device(device))
    return model


def read_folder_config(folder: Path) -> MixtralConfig:
    """The strict config of a checkpoint folder; a ``config.json`` that links out of the folder is refused."""
    path = folder / "config.json"
    told = interrupted(folder, path.name)
    if told:
        raise ConfigError(told)
    return read_config(inside(folder, path.name) if path.exists() else path)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """While the files of a folder are read: refuse the result if a save replaced them meanwhile.

    Raises:
        CheckpointError: what was read may be half of one model and half of another.
    """
    before = _stamp(folder / "config.json")
    yield
    if _stamp(folder / "config.json") != before:
        raise CheckpointError(f"{folder}: was replaced while it was read; load it again")


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Differs after every save: it renames this file before it touches any other, which sets the change time."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns


def checked_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype, if a model can have it.

    Raises:
        ConfigError: it is not float32, float16 or bfloat16.
    """
    if dtype not in [DTYPES[name] for name in FLOAT_DTYPES]:
        raise ConfigError(f"dtype is {dtype}; a model is bfloat16, float16 or float32", param="dtype")
    return dtype


def place(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of the parameter of that name."""
    owner, _, leaf = name.rpartition(".")
    wanted = model.get_parameter(name).requires_grad
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=wanted))


def _check_sizes(config: MixtralConfig, entries: Mapping[str, Entry], style: Style) -> None:
    """Compare the numbers of the config with what the files hold, before either is used to size anything."""
    found = {"num_hidden_layers": highest(entries, "layer") + 1}
    if style == "per-expert":
        found["num_local_experts"] = highest(entries, "expert") + 1
    embedding = entries.get("model.embed_tokens.weight")
    if embedding is not None and len(embedding.shape) == 2:
        found["vocab_size"], found["hidden_size"] = embedding.shape
    fused = entries.get("model.layers.0.mlp.experts.down_proj")
    if fused is not None and len(fused.shape) == 3:
        found["num_local_experts"], _, found["intermediate_size"] = fused.shape
    for name, number in found.items():
        said = getattr(config, name)
        if said != number:
            raise CheckpointError(f"config.json says {name} {said}, but the tensors have {number}", param=name)


def _check_tensors(plan: Iterable[Piece], entries: Mapping[str, Entry]) -> None:
    expected = {piece.name: piece for piece in plan}
    # Those with a reason first: they explain the rest of the list.
    problems = [f"unexpected {name!r} {reason}" for name in entries if (reason := why_refused(name))]
    problems += [f"missing {name!r} {list(piece.shape)}" for name, piece in expected.items() if name not in entries]
    for name, entry in entries.items():
        piece = expected.get(name)
        if piece is None:
            problems += [] if why_refused(name) else [f"unexpected {name!r}"]
        elif entry.shape != piece.shape:
            problems.append(f"{name!r} is {list(entry.shape)}, expected {list(piece.shape)}")
        elif entry.dtype not in FLOAT_DTYPES:
            problems.append(f"{name!r} is {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(
            f"the tensors do not fit config.json ({len(problems)} problems):\n  "
            + "\n  ".join(problems[:LISTED])
            + more
        )


def _own_dtype(plan: Iterable[Piece], entries: Mapping[str, Entry]) -> torch.dtype:
    counts = Counter(entries[piece.name].dtype for piece in plan if not is_router(piece.parameter))
    if len(counts) > 1:
        told = ", ".join(f"{count} tensors of {name}" for name, count in counts.most_common())
        raise CheckpointError(f"the checkpoint mixes dtypes ({told}); choose one with dtype=", param="dtype")
    return DTYPES[next(iter(counts))]


def _fill(model: Mixtral, plan: Iterable[Piece], entries: Mapping[str, Entry], device: torch.device) -> None:
    """Allocate and fill one parameter after the other, in the order in which the files hold them."""
    by_parameter: dict[str, list[Piece]] = {}
    for piece in plan:
        by_parameter.setdefault(piece.parameter, []).append(piece)

    def position(name: str) -> tuple[Path, int]:
        return min((entries[piece.name].shard, entries[piece.name].start) for piece in by_parameter[name])

    with ShardReader() as reader, torch.no_grad():
        for name in sorted(by_parameter, key=position):
            wanted = model.get_parameter(name)
            # Not empty_like: the first operation on a meta tensor imports 0.4 s worth of modules.
            value = torch.empty(wanted.shape, dtype=wanted.dtype, device=device)
            for piece in by_parameter[name]:
                reader.read(entries[piece.name], piece.of(value))
            place(model, name, value)
