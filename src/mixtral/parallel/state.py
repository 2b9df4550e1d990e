"""The tensors of a run state in pieces: every rank writes what it owns, and reads the boxes it needs.

A file of pieces names, in the header of the safetensors format, the whole shape and the place of each of them; the
``index.json`` of a state repeats that for all files. A state of one process is one file of whole tensors, no index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtral.errors import TrainingError
from mixtral.parallel.mesh import Mesh
from mixtral.parallel.plan import Region, Shapes, is_owner, region, stored_shape

__all__ = ["INDEX", "WHOLE", "Piece", "StateFiles", "box_of", "index_of", "part_name", "pieces_of", "write_part"]

INDEX, WHOLE = "index.json", "state.safetensors"
_PIECES = "pieces"


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a tensor. ``shape`` is that of the tensor itself; ``box`` is in the shape in which it is stored."""

    values: Tensor
    shape: tuple[int, ...]
    box: Region


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    pieces: tuple[tuple[str, Region], ...]


def part_name(rank: int) -> str:
    """The file of a rank."""
    return f"state-rank{rank:03d}.safetensors"


def box_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> Region | None:
    """The part of a tensor of a run state that a rank needs, None for all of it.

    What belongs to a parameter is called by its name after a word such as ``master.``.
    """
    parameter = name.partition(".")[2]
    if mesh.is_alone or not parameter.startswith(("model.", "lm_head.")):
        return None
    return region(parameter, shape, mesh.axes, mesh.place)


def pieces_of(tensors: Mapping[str, Tensor], shapes: Shapes, mesh: Mesh) -> dict[str, Piece]:
    """What a rank writes of the tensors of a run state: of parameters the part that it owns; the first one the rest."""
    pieces = {}
    for name, values in tensors.items():
        parameter = name.partition(".")[2]
        if parameter in shapes:
            if is_owner(parameter, mesh.place):
                box = region(parameter, shapes[parameter], mesh.axes, mesh.place)
                pieces[name] = Piece(values, shapes[parameter], box)
        elif mesh.is_first:
            pieces[name] = Piece(values, tuple(values.shape), Region.whole(tuple(values.shape)))
    return pieces


def write_part(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write one rank's pieces; empty ones are left out.

    Raises:
        OSError: the disk refused; or SafetensorError, from the same cause.
    """
    some = {name: piece for name, piece in pieces.items() if piece.values.numel()}
    header = {
        name: {"shape": piece.shape, "stored": piece.box.shape, "start": piece.box.start}
        for name, piece in some.items()
    }
    tensors = {name: piece.values.reshape(piece.box.size).contiguous() for name, piece in some.items()}
    save_file(tensors, path, metadata={_PIECES: json.dumps(header)})


def index_of(folder: Path, ranks: int) -> dict[str, Any]:
    """What ``index.json`` says, read from the files of all ranks.

    Raises:
        OSError, SafetensorError: a file is not there: the ranks do not see the same folder.
        TrainingError: the pieces of a tensor do not make a whole.
    """
    tensors: dict[str, Any] = {}
    for name in map(part_name, range(ranks)):
        with safe_open(folder / name, framework="pt") as file:
            for tensor, piece in json.loads(file.metadata()[_PIECES]).items():
                size = file.get_slice(tensor).get_shape()
                found = tensors.setdefault(tensor, {"shape": piece["shape"], "stored": piece["stored"], "pieces": []})
                found["pieces"].append({"file": name, "start": piece["start"], "size": size})
    for tensor, found in tensors.items():
        held, wanted = sum(math.prod(piece["size"]) for piece in found["pieces"]), math.prod(found["stored"])
        if held != wanted:
            raise TrainingError(f"{folder}: the pieces of {tensor} have {held} values; expected {wanted}")
    return {"tensors": tensors}


class StateFiles:
    """The tensors of one state, in one file or in pieces.

    Raises:
        OSError, SafetensorError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, _Tensor] = {}
        if (folder / INDEX).exists():
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tensors"]
            for name, found in listed.items():
                stored = tuple(found["stored"])
                pieces = [(p["file"], Region(stored, tuple(p["start"]), tuple(p["size"]))) for p in found["pieces"]]
                self._tensors[name] = _Tensor(tuple(found["shape"]), stored, tuple(pieces))
            return
        with safe_open(folder / WHOLE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(file.get_slice(name).get_shape())
                stored = stored_shape(name, shape)
                self._tensors[name] = _Tensor(shape, stored, ((WHOLE, Region.whole(stored)),))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, wanted: Mapping[str, Region | None]) -> dict[str, Tensor]:
        """The boxes of some tensors, for None the whole tensor; gate and up rows are in one dimension again.

        Every file is opened once, and of a tensor only what is needed is read.

        Raises:
            TrainingError: a box is of another shape than the tensor, or there is no such tensor.
        """
        missing = wanted.keys() - self._tensors.keys()
        if missing:
            raise TrainingError(f"{self._folder}: the state has no tensor {min(missing)!r}")
        found: dict[str, Tensor] = {}
        by_file: dict[str, list[tuple[str, Region, Region]]] = {}
        for name, asked in wanted.items():
            tensor = self._tensors[name]
            box = Region.whole(tensor.stored) if asked is None else asked
            if box.shape != tensor.stored:
                raise TrainingError(f"{self._folder}: {name} has the shape {tensor.stored}; expected {box.shape}")
            found[name] = torch.empty(box.size)
            for file_name, held in tensor.pieces:
                by_file.setdefault(file_name, []).append((name, held, box))
        for file_name, some in sorted(by_file.items()):
            with safe_open(self._folder / file_name, framework="pt") as file:
                for name, held, box in some:
                    if (common := held.common(box)) is not None:
                        is_whole = common.size == held.shape
                        values = file.get_tensor(name) if is_whole else _read(file.get_slice(name), common.within(held))
                        if values.dtype != found[name].dtype:
                            found[name] = found[name].to(values.dtype)
                        found[name][common.within(box)] = values.reshape(common.size)
        return {n: v.flatten(1, 2) if v.dim() > len(self._tensors[n].shape) else v for n, v in found.items()}


def _read(held: Any, part: tuple[slice, ...]) -> Tensor:
    """A part of a tensor in a file. One of whole tensors has gate and up rows in one dimension, pieces have two."""
    shape = held.get_shape()
    if len(shape) == len(part):
        values: Tensor = held[part]
        return values
    experts, halves, rows, width = part
    middle = shape[1] // 2
    parts = [
        held[experts, half * middle + rows.start : half * middle + rows.stop, width]
        for half in range(halves.start, halves.stop)
    ]
    return torch.stack(parts, dim=1)
