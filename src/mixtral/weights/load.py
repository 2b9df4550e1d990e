"""Checkpoint -> model: every tensor of the files is used once, every parameter is filled once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.read import DTYPES, damaged
from mixtral.files.sums import SUMS, check_sums
from mixtral.model.mixtral import Mixtral
from mixtral.ops.memory import empty
from mixtral.quant.modules import PackedEmbedding, PackedExperts, PackedLinear
from mixtral.quant.packed import Packed
from mixtral.quant.panels import Panels, to_panels
from mixtral.weights.checkpoint import FLOAT_DTYPES, Checkpoint, open_checkpoint, unchanged
from mixtral.weights.names import EMBEDDING, Half, Piece, is_router
from mixtral.weights.packed_cache import PackedCache
from mixtral.weights.reader import MatrixReader

__all__ = ["checked_dtype", "dtype_of", "load_model", "place"]

_log = logging.getLogger("mixtral")

Pack = Callable[[Piece], Panels | None]

_NAMED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def load_model(
    path: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    unpickle: bool = False,
    decode: bool = False,
    reference: bool = False,
    packed_cache: str | Path | None = None,
) -> Mixtral:
    """Load a checkpoint of any layout; routers are fp32. Quantised matrices stay as they are: on the CPU compiled
    kernels multiply with them; those without a kernel, or all if ``reference``, are decoded to ``dtype`` where they are
    used. ``decode`` decodes all of them now. ``dtype`` None keeps the file's own, and is bfloat16 where any matrix is
    quantised. ``packed_cache`` is a folder where the matrices of compiled kernels are kept as they lie in memory, to be
    mapped the next time. Files that a list ``SHA256SUMS`` beside them names are compared with it first.

    Raises:
        ConfigError: the config is missing or wrong, ``dtype`` is not float32, float16 or bfloat16, or
            ``packed_cache`` is given where nothing is packed, or names a file.
        CheckpointError: the files are missing or damaged (NaN and infinities count as damage), do not fit the config,
            or are pickled and not ``unpickle``.
    """
    path = Path(path)
    if dtype is not None:
        checked_dtype(dtype)
    compiled = not reference and torch.device(device).type == "cpu"
    if packed_cache is not None and (decode or not compiled):
        raise ConfigError(
            "packed_cache is for compiled kernels, which run on the CPU, without reference and decode",
            param="packed_cache",
        )
    with unchanged(path):
        found = open_checkpoint(path, unpickle=unpickle)
        if count := check_sums(found.files):
            _log.info("sha256 of %d files are those of %s", count, SUMS)
        model = Mixtral(found.config, device="meta", dtype=dtype or _own_dtype(found))
        cache = None if packed_cache is None else PackedCache(Path(packed_cache), found)
        with MatrixReader(ahead=cache is None or not cache.found, finite=True) as reader, torch.no_grad():
            pack = _packer(found, reader, cache) if compiled else None
            _fill(model, found, reader, torch.device(device), decode=decode, pack=pack)
    if cache is not None:
        cache.finish()
    return model


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name; a dtype and None are given back.

    Raises:
        ConfigError: the name is unknown.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in _NAMED:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(_NAMED)}", param="dtype")
    return _NAMED[dtype]


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


def _own_dtype(found: Checkpoint) -> torch.dtype:
    """The dtype that all tensors have; GGUF files keep norms in float32 whatever the rest is in."""
    names = {p.name for p in found.plan if not is_router(p.parameter) and (len(p.shape) > 1 or not found.metadata)}
    counts = Counter(found.entries[name].dtype for name in names)
    if any(name not in DTYPES for name in counts):
        return torch.bfloat16
    if len(counts) > 1:
        told = ", ".join(f"{count} tensors of {name}" for name, count in counts.most_common())
        raise CheckpointError(f"the checkpoint mixes dtypes ({told}); choose one with dtype=", param="dtype")
    return DTYPES[next(iter(counts))]


def _fill(
    model: Mixtral, found: Checkpoint, reader: MatrixReader, device: torch.device, *, decode: bool, pack: Pack | None
) -> None:
    """Allocate and fill one layer's experts, or one other parameter, after the other, in the order of the files."""
    units: dict[str, list[Piece]] = {}
    for piece in found.plan:
        units.setdefault(_unit(piece), []).append(piece)

    def position(unit: str) -> tuple[Path, int]:
        return min((found.entries[piece.name].shard, found.entries[piece.name].start) for piece in units[unit])

    for unit in sorted(units, key=position):
        if decode or not _stays_packed(units[unit], found):
            _fill_dense(model, units[unit], found, reader, device)
        else:
            packed = list(_packed(units[unit], found, reader, pack))
            model.set_submodule(unit, _module(units[unit], packed, model.dtype).to(device))


def _unit(piece: Piece) -> str:
    """The module that is replaced as a whole if any of its matrices is packed."""
    return piece.parameter.rpartition(".")[0]


def _stays_packed(pieces: list[Piece], found: Checkpoint) -> bool:
    whole = len(pieces[0].shape) > 1 and not is_router(pieces[0].parameter)
    return whole and any(found.entries[piece.name].dtype not in DTYPES for piece in pieces)


def _packer(found: Checkpoint, reader: MatrixReader, cache: PackedCache | None) -> Pack:
    """Panels of a piece, from the cache or from the files; None where there are no kernels for its format."""

    def pack(piece: Piece) -> Panels | None:
        panels = None if cache is None else cache.take(piece)
        if panels is None:
            with reader.borrowed(found.entries[piece.name], piece) as packed:
                try:
                    panels = to_panels(packed)
                except CheckpointError:
                    raise damaged(piece.name) from None
            if cache is not None and panels is not None:
                cache.keep(piece, panels)
        return panels

    return pack


def _packed(pieces: list[Piece], found: Checkpoint, reader: MatrixReader, pack: Pack | None) -> Iterator[Packed]:
    """The matrices of a unit, one after the other; in panels where there are kernels for them. Rows of the embedding
    are looked up, which panels are not made for."""
    for piece in pieces:
        panels = pack(piece) if pack is not None and piece.parameter != EMBEDDING else None
        yield reader.packed(found.entries[piece.name], piece) if panels is None else panels


def _module(pieces: list[Piece], packed: list[Packed], dtype: torch.dtype) -> nn.Module:
    if pieces[0].parameter == EMBEDDING:
        return PackedEmbedding(packed[0], dtype)
    if pieces[0].expert is None:
        return PackedLinear(packed[0])
    experts: dict[Half, list[Packed]] = {"gate": [], "up": [], "both": []}
    for piece, matrix in sorted(zip(pieces, packed, strict=True), key=lambda pair: pair[0].expert or 0):
        experts[piece.half].append(matrix)
    return PackedExperts(experts["gate"], experts["up"], experts["both"])


def _fill_dense(
    model: Mixtral, pieces: list[Piece], found: Checkpoint, reader: MatrixReader, device: torch.device
) -> None:
    for name in dict.fromkeys(piece.parameter for piece in pieces):
        wanted = model.get_parameter(name)
        # Not empty_like: the first operation on a meta tensor imports 0.4 s worth of modules.
        cpu = device.type == "cpu"
        value = (
            empty(wanted.shape, wanted.dtype) if cpu else torch.empty(wanted.shape, dtype=wanted.dtype, device=device)
        )
        for piece in pieces:
            if piece.parameter == name:
                reader.piece(found.entries[piece.name], piece, piece.of(value))
        place(model, name, value)
