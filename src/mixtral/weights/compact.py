"""The compact file of the embedded model: int8 groups of 32, shared vocabulary rows, respelling of untrained ids.

A folder holds ``model.safetensors``, ``config.json`` and ``manifest.json`` (size and sha256 of the weights). Tensors::

    <parameter>.q8, <parameter>.scale     int8 [..., N] and fp16 [..., N/32]: weights of two and more dimensions
    <parameter>                           fp32: routers and norms
    row_of_id                             int32 [V]; embedding and head have R+1 rows instead of V
    respell.ids [n], .offsets [n+1], .pieces [m]   int32: ids[i] is spelled pieces[offsets[i]:offsets[i+1]]

For compiled kernels the integers stay as they are, in panels; for everything else they are decoded into a plain model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.files.commit import Commit, fingerprint
from mixtral.files.read import DTYPES, Entry, ShardReader
from mixtral.files.safetensors import (
    SINGLE_NAME,
    Header,
    Record,
    inside,
    read_header,
    read_json,
    record,
    write_shard,
)
from mixtral.model.mixtral import Mixtral
from mixtral.quant.int8 import GROUP, decode, encode
from mixtral.quant.modules import PackedExperts, PackedLinear, SharedEmbedding, SharedHead
from mixtral.quant.packed import Groups
from mixtral.quant.panels import Panels, to_panels
from mixtral.weights.checkpoint import read_folder_config, unchanged
from mixtral.weights.load import checked_dtype, place
from mixtral.weights.names import EMBEDDING, HEAD, is_router, parameter_shapes
from mixtral.weights.save import checked_parameters, to_json, weight_files
from mixtral.weights.vocab import check_rows, expand_rows, share_rows

__all__ = [
    "MANIFEST_NAME",
    "Compact",
    "compact_header",
    "is_compact",
    "load_compact",
    "read_respelling",
    "save_compact",
]

MANIFEST_NAME = "manifest.json"
MAX_PIECES = 64  # of the spelling of one id; the longest token has fewer bytes
_ROWS = "row_of_id"
_RESPELL = ("respell.ids", "respell.offsets", "respell.pieces")


@dataclass(frozen=True, slots=True)
class Compact:
    """What a compact folder holds: a model, the respelling for its tokenizer, the row of every id, and notes."""

    model: Mixtral
    respell: dict[int, tuple[int, ...]]
    row_of_id: Tensor
    metadata: dict[str, str]


def is_compact(folder: Path) -> bool:
    """Whether the weights of a folder are in the compact format; False also where there is no readable file."""
    try:
        return _ROWS in read_header(inside(folder, SINGLE_NAME)).entries
    except CheckpointError:
        return False


def save_compact(
    model: Mixtral,
    folder: Path,
    *,
    row_of_id: Tensor,
    respell: Mapping[int, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> None:
    """Write the three files of the format in ``folder``, complete or not at all. ``metadata`` goes in the header.

    The files of another checkpoint there are replaced, whatever its format; all other files stay.

    Raises:
        CheckpointError: ids that share a row differ in the model, a size is no multiple of 32, or writing fails.
    """
    folder = Path(folder)
    row_of_id = row_of_id.detach().cpu()
    check_rows(row_of_id, model.config.vocab_size)
    _check_respell(respell, model.config.vocab_size)
    records = [*_records(checked_parameters(model), row_of_id), *_respell_records(respell), record(_ROWS, row_of_id)]
    try:
        with Commit(folder) as commit:
            weights = commit.path(SINGLE_NAME)
            write_shard(weights, records, {**metadata, "format": "pt"})
            commit.path(MANIFEST_NAME).write_text(to_json(fingerprint(weights)), encoding="utf-8")
            commit.path("config.json").write_text(to_json(model.config.to_dict()), encoding="utf-8")
            commit.finish(remove=weight_files(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


def load_compact(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype | None = None, packed: bool = False
) -> Compact:
    """Load a compact folder. ``dtype`` None is float32, which holds every stored value exactly.

    The model is an ordinary one, or with ``packed`` one whose matrices stay integers, for compiled kernels on the CPU;
    embedding and head keep their shared rows then.

    Raises:
        ConfigError: ``config.json`` is missing or wrong, ``dtype`` is not a model's, or there are no compiled kernels.
        CheckpointError: the weights do not match the manifest, are damaged, or do not fit the config.
    """
    folder = Path(folder)
    dtype = checked_dtype(dtype or torch.float32)
    with unchanged(folder):
        config = read_folder_config(folder)
        path = inside(folder, SINGLE_NAME)
        expected = _expected_sum(folder, path)
        header = compact_header(folder, config)
        if fingerprint(path)["sha256"] != expected:
            raise CheckpointError(
                f"{SINGLE_NAME}: sha256 is not the one in {MANIFEST_NAME}: the file is damaged; install again"
            )
        with ShardReader() as reader, torch.no_grad():
            row_of_id = _tensor(header.entries[_ROWS], reader)
            if check_rows(row_of_id, config.vocab_size) != _rows(header):
                raise CheckpointError(f"{SINGLE_NAME}: {_ROWS} does not name all {_rows(header):,} rows")
            model = Mixtral(config, device="meta", dtype=dtype)
            for name in parameter_shapes(config):
                if packed and f"{name}.q8" in header.entries:
                    _place_packed(model, name, header, reader, row_of_id)
                    continue
                value = _read(header, reader, name)
                if name in (EMBEDDING, HEAD):
                    value = expand_rows(value, row_of_id)
                place(model, name, value.to(device=device, dtype=model.get_parameter(name).dtype))
            respell = _read_respell(header, reader, config.vocab_size)
    return Compact(model, respell, row_of_id, {k: v for k, v in header.metadata.items() if k != "format"})


def _is_coded(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not is_router(name)


def _records(parameters: Mapping[str, Tensor], row_of_id: Tensor) -> Iterator[Record]:
    for name, value in parameters.items():
        value = value.detach().cpu()
        if not _is_coded(name, tuple(value.shape)):
            yield record(name, value.float())
            continue
        codes, scales = encode(share_rows(value, row_of_id) if name in (EMBEDDING, HEAD) else value)
        yield record(f"{name}.q8", codes)
        yield record(f"{name}.scale", scales)


def _respell_records(respell: Mapping[int, tuple[int, ...]]) -> Iterator[Record]:
    ids = sorted(respell)
    offsets = [0]
    for i in ids:
        offsets.append(offsets[-1] + len(respell[i]))
    for name, values in zip(_RESPELL, (ids, offsets, [piece for i in ids for piece in respell[i]]), strict=True):
        yield record(name, torch.tensor(values, dtype=torch.int32))


def _check_respell(respell: Mapping[int, tuple[int, ...]], vocab_size: int) -> None:
    for i, spelled in respell.items():
        if not spelled or not all(0 <= piece < vocab_size for piece in (i, *spelled)):
            raise CheckpointError(f"respell: {i} -> {spelled!r} is empty or outside the vocabulary of {vocab_size}")


def _expected_sum(folder: Path, path: Path) -> Any:
    """The sha256 in the manifest, if the file has the size that it says; so a file of another size is never read."""
    manifest = read_json(inside(folder, MANIFEST_NAME), MANIFEST_NAME)
    if manifest.keys() != {"sha256", "size"}:
        raise CheckpointError(f"{MANIFEST_NAME}: expected an object with sha256 and size")
    size = path.stat().st_size
    if size != manifest["size"]:
        raise CheckpointError(
            f"{SINGLE_NAME}: {size:,} bytes, but {MANIFEST_NAME} says {manifest['size']!r:.80}; install again"
        )
    return manifest["sha256"]


def compact_header(folder: Path, config: MixtralConfig) -> Header:
    """The header of the weights of a compact folder, if its tensors are those that the config asks for.

    Raises:
        CheckpointError: naming the first one that is not.
    """
    header = read_header(inside(folder, SINGLE_NAME), label=SINGLE_NAME)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {_ROWS: ("I32", (config.vocab_size,))}
    for name, shape in parameter_shapes(config).items():
        if not _is_coded(name, shape):
            expected[name] = ("F32", shape)
            continue
        if shape[-1] % GROUP:
            raise CheckpointError(f"config.json: {name!r} is {list(shape)}; rows here are multiples of {GROUP}")
        stored = (_rows(header), *shape[1:]) if name in (EMBEDDING, HEAD) else shape
        expected[f"{name}.q8"] = ("I8", stored)
        expected[f"{name}.scale"] = ("F16", (*stored[:-1], stored[-1] // GROUP))
    for name, most in zip(_RESPELL, (1, 1, MAX_PIECES), strict=True):
        count = header.entries[name].shape[:1] if name in header.entries else (0,)
        expected[name] = ("I32", tuple(min(number, most * (config.vocab_size + 1)) for number in count))
    found = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
    odd = [name for name in [*expected, *found] if expected.get(name) != found.get(name)]
    if odd:
        raise CheckpointError(
            f"{SINGLE_NAME}: {odd[0]!r} is {found.get(odd[0], 'missing')}, "
            f"expected {expected.get(odd[0], 'no such tensor')}"
        )
    return header


def _rows(header: Header) -> int:
    """How many rows embedding and head have on disk."""
    entry = header.entries.get(f"{EMBEDDING}.q8")
    return entry.shape[0] if entry is not None and entry.shape else 0


def _tensor(entry: Entry, reader: ShardReader) -> Tensor:
    value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    reader.read(entry, value)
    return value


def _read(header: Header, reader: ShardReader, name: str) -> Tensor:
    if name in header.entries:
        return _tensor(header.entries[name], reader)
    return decode(_tensor(header.entries[f"{name}.q8"], reader), _tensor(header.entries[f"{name}.scale"], reader))


def _place_packed(model: Mixtral, name: str, header: Header, reader: ShardReader, row_of_id: Tensor) -> None:
    """Put a module with the integers of a parameter in the place of the dense one."""
    unit, _, parameter = name.rpartition(".")
    if parameter == "down_proj":
        return  # it comes with the other half of the experts
    codes, scales = (_tensor(header.entries[f"{name}.{part}"], reader) for part in ("q8", "scale"))
    if name == EMBEDDING:
        rows = decode(codes, scales, dtype=model.dtype)
        model.set_submodule(unit, SharedEmbedding(rows, row_of_id.long()))
    elif name == HEAD:
        model.set_submodule(unit, SharedHead(_panels(codes, scales), row_of_id.long()))
    elif parameter == "weight":
        model.set_submodule(unit, PackedLinear(_panels(codes, scales)))
    else:
        down = f"{unit}.down_proj"
        gate, up = (_all_panels(*half) for half in zip(codes.chunk(2, 1), scales.chunk(2, 1), strict=True))
        lower = (_tensor(header.entries[f"{down}.{part}"], reader) for part in ("q8", "scale"))
        model.set_submodule(unit, PackedExperts(gate, up, _all_panels(*lower)))


def _all_panels(codes: Tensor, scales: Tensor) -> list[Panels]:
    return [_panels(*one) for one in zip(codes, scales, strict=True)]


def _panels(codes: Tensor, scales: Tensor) -> Panels:
    bits = 8
    found = to_panels(Groups(bits, (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), scales))
    if found is None:
        raise RuntimeError("int8 in groups of 32 has no kernel")
    return found


def read_respelling(folder: Path) -> dict[int, tuple[int, ...]]:
    """The respelling alone; errors as of ``load_compact``, but the sum of the file is not compared."""
    config = read_folder_config(folder)
    header = compact_header(folder, config)
    with ShardReader() as reader:
        return _read_respell(header, reader, config.vocab_size)


def _read_respell(header: Header, reader: ShardReader, vocab_size: int) -> dict[int, tuple[int, ...]]:
    ids, offsets, spelled = (_tensor(header.entries[name], reader).tolist() for name in _RESPELL)
    pairs = list(itertools.pairwise(offsets))
    if (
        not offsets
        or len(pairs) != len(ids)
        or offsets[0] != 0
        or offsets[-1] != len(spelled)
        or any(a >= b for a, b in pairs)
    ):
        raise CheckpointError(f"{SINGLE_NAME}: respell.offsets does not divide respell.pieces among respell.ids")
    respell = {i: tuple(spelled[a:b]) for i, (a, b) in zip(ids, pairs, strict=True)}
    _check_respell(respell, vocab_size)
    return respell
