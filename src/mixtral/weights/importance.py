"""How much the columns of each matrix matter, from an "imatrix" file, and which matrices of a result it covers.

The encoders of Q2_K to Q6_K and of Q4_0 weigh errors by it. Columns are the same in every layout, whatever order the
rows have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.gguf_write import GgufRecord
from mixtral.files.imatrix import Sums, read_imatrix, read_means
from mixtral.files.read import ShardReader
from mixtral.quant.encode import WEIGHTED
from mixtral.weights.matrices import Matrices
from mixtral.weights.names import Half, Layout, Piece, layer_of, tensors

__all__ = ["FEW_TOKENS", "Coverage", "Importance", "coverage", "read_importance"]

# The mean of this many squares of a normally distributed input is known to one part in eight.
FEW_TOKENS = 128
LISTED = 20
# A file names tensors as the model had them that it was made with.
_LAYOUTS: tuple[Layout, ...] = ("gguf", "gguf-split", "gguf-gate-up")
_Key = tuple[str, int | None, Half]


@dataclass(frozen=True, slots=True)
class Importance:
    """The mean square of each input of the matrices that a file covers, by what the matrix is (``Piece.key``).

    ``tokens`` says from how many: 0 is a matrix that saw none and so has no mean, None one of which the file does not
    say. ``entries``, ``chunks`` and ``datasets`` are those of the file, ``chunks`` 0 if it does not say.
    """

    path: Path
    entries: int
    chunks: int
    datasets: tuple[str, ...]
    means: Mapping[_Key, NDArray[np.float32]]
    tokens: Mapping[_Key, int | None]

    def of(self, piece: Piece) -> NDArray[np.float32] | None:
        """The importance of the columns of a matrix, float32 [columns]; None if the file has none for it."""
        return self.means.get(piece.key)

    def metadata(self) -> dict[str, Any]:
        """What a GGUF file says of it, under llama.cpp's keys; the file by its name, without the folder."""
        return {
            "quantize.imatrix.file": self.path.name,
            **({"quantize.imatrix.dataset": ", ".join(self.datasets)} if self.datasets else {}),
            "quantize.imatrix.entries_count": self.entries,
            **({"quantize.imatrix.chunks_count": self.chunks} if self.chunks else {}),
        }


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the matrices of a result are encoded: ``weighted`` ones with importance, those of ``without`` (tensor ->
    matrices) without although their format takes it, ``other`` ones in a format that takes none, or copied.

    ``unseen`` are experts, as (layer, expert), that lack importance for a matrix; ``scarce`` those that saw at least
    one, but less than ``FEW_TOKENS`` tokens.
    """

    importance: Importance
    weighted: int
    without: Mapping[str, int]
    other: int
    unseen: tuple[tuple[int, int], ...]
    scarce: tuple[tuple[int, int], ...]


def read_importance(path: Path, config: MixtralConfig) -> Importance:
    """Read a file of importance that was made with a model of this config, in either form and any spelling of GGUF.

    Raises:
        CheckpointError: the file is missing or damaged, or entries fit no matrix of the model.
    """
    found = read_imatrix(path)
    known = {
        tensor[0].name: tensor for layout in _LAYOUTS for tensor in tensors(config, layout) if len(tensor[0].shape) > 1
    }
    first: dict[_Key, str] = {}
    problems = []
    for name, sums in found.entries.items():
        problem = _problem(name, sums, known.get(name, []), first)
        problems += [problem] if problem else []
        first |= {piece.key: name for piece in known.get(name, [])}
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(
            f"{path.name}: {len(problems)} of {len(found.entries)} entries do not fit; is the file of another "
            "model?\n  " + "\n  ".join(problems[:LISTED]) + more
        )
    means: dict[_Key, NDArray[np.float32]] = {}
    tokens: dict[_Key, int | None] = {}
    with ShardReader() as reader:
        for name, sums in found.entries.items():
            experts = _experts(known[name])
            rows, counts = read_means(sums, len(experts), reader)
            for piece in known[name]:
                number = experts.index(piece.expert)
                tokens[piece.key] = counts[number]
                if counts[number] != 0:
                    means[piece.key] = rows[number]
    return Importance(path, len(found.entries), found.chunks, found.datasets, means, tokens)


def _experts(tensor: Sequence[Piece]) -> list[int | None]:
    """The experts of a tensor in order: gate and up of one expert, where they share a tensor, share their input too."""
    return list(dict.fromkeys(piece.expert for piece in tensor))


def _problem(name: str, sums: Sums, tensor: Sequence[Piece], first: Mapping[_Key, str]) -> str:
    """Why an entry does not fit the model, or an empty string."""
    if not tensor:
        return f"unexpected {name!r}"
    matrices, columns = len(_experts(tensor)), tensor[0].shape[-1]
    if sums.size != matrices * columns or sums.count_size not in (1, matrices):
        return f"{name!r} has {sums.size:,} sums and {sums.count_size:,} counts, expected {matrices} x {columns:,}"
    twice = next((first[piece.key] for piece in tensor if piece.key in first), None)
    return f"{name!r} says what {twice!r} said before" if twice else ""


def coverage(source: Matrices, records: Sequence[GgufRecord], importance: Importance) -> Coverage:
    """Which matrices of a file to be written the importance covers.

    Raises:
        ConfigError: it covers none that is encoded in a format that takes it.
    """
    weighted, other = 0, 0
    without: dict[str, int] = {}
    experts: dict[tuple[int, int], list[int | None]] = {}
    for tensor, record in zip(tensors(source.config, "gguf"), records, strict=True):
        matrices = len(tensor) if len(tensor[0].shape) > 1 else 0
        if record.format not in WEIGHTED or source.formats(tensor) == {record.format}:
            other += matrices
            continue
        missing = sum(importance.of(piece) is None for piece in tensor)
        weighted += matrices - missing
        if missing:
            without[record.name] = missing
        for piece in tensor:
            if piece.expert is not None:
                place = (layer_of(piece.parameter), piece.expert)
                experts.setdefault(place, []).append(importance.tokens.get(piece.key, 0))
    if not weighted:
        if without:
            told = "has importance for no matrix that could use it; collect it with more text"
        else:
            told = (
                f"importance would change nothing: only {', '.join(WEIGHTED)} take it, and a matrix that has its "
                "format already is copied; choose another format, or leave it out"
            )
        raise ConfigError(f"{importance.path.name}: {told}", param="importance")
    least = {place: min((c for c in counts if c is not None), default=None) for place, counts in experts.items()}
    return Coverage(
        importance,
        weighted,
        without,
        other,
        unseen=tuple(sorted(place for place, count in least.items() if count == 0)),
        scarce=tuple(sorted(place for place, count in least.items() if count and count < FEW_TOKENS)),
    )
