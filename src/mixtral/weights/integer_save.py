"""Integer checkpoints: safetensors with Hugging Face's names per expert, integers packed as compressed-tensors does.

vLLM and llm-compressor read such folders ("pack-quantized"). Attention and expert matrices are integers, all else keeps
its dtype. What is stored in the same integers already is copied, with its zero points and its order of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.files.read import DTYPES
from mixtral.files.safetensors import Record
from mixtral.quant.bits import pack_bits
from mixtral.quant.packed import Groups
from mixtral.quant.recode import Kept, as_groups, kept
from mixtral.quant.rtn import IntForm, encode_groups
from mixtral.weights.matrices import Matrices, warn_again
from mixtral.weights.names import EMBEDDING, HEAD, Piece, is_router

__all__ = ["integer_config", "integer_records", "is_integer_piece", "kept_integers"]


def is_integer_piece(piece: Piece) -> bool:
    """Whether a matrix becomes integers: those of attention and experts do."""
    return len(piece.shape) == 2 and piece.parameter not in (EMBEDDING, HEAD) and not is_router(piece.parameter)


def integer_config(form: IntForm, brought: Kept) -> dict[str, Any]:
    """What ``config.json`` says about the weights (``quantization_config`` of compressed-tensors)."""
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": not brought.zeros,
        "strategy": "group" if form.group else "channel",
        "group_size": form.group or None,
        "actorder": "group" if brought.order else None,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*block_sparse_moe\.gate$"],
        "kv_cache_scheme": None,
    }


def kept_integers(source: Matrices, wanted: Sequence[Piece], form: IntForm) -> Kept:
    """What the matrices bring that are kept as they are.

    Warns:
        UserWarning: there are others that are quantised already.
    """
    found, again = [], set()
    for piece in wanted:
        for label in source.formats([piece]):
            one = kept(label, form.bits, form.group or piece.shape[1])
            found += [one] if one else []
            again |= {label} if one is None and label not in DTYPES else set()
    warn_again(again)
    return Kept(any(one.zeros for one in found), any(one.order for one in found))


def integer_records(
    source: Matrices, piece: Piece, form: IntForm, brought: Kept, written: Callable[[int], None]
) -> list[Record]:
    """The tensors that one matrix becomes. They are written one after the other, and the matrix is read for the first.
    ``brought`` says which parts the folder has, and every matrix with it; ``written`` is told their bytes.

    Raises:
        CheckpointError: the rows do not divide into groups; when they are written, also as ``encode_groups``.
    """
    rows, columns = piece.shape
    try:
        groups = columns // form.columns(columns)
    except CheckpointError as error:
        raise CheckpointError(f"{piece.name!r}: {error}", param="format") from None
    stem = piece.name.removesuffix(".weight")
    matrix = _Matrix(source, piece, form, written)
    parts: list[tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]] = [
        ("weight_packed", torch.int32, (rows, columns * form.bits // 32), matrix.codes),
        ("weight_shape", torch.int64, (2,), lambda: torch.tensor(piece.shape)),
    ]
    if brought.zeros:
        parts.append(("weight_zero_point", torch.int32, (-(-rows * form.bits // 32), groups), matrix.zeros))
    if brought.order:
        parts.append(("weight_g_idx", torch.int32, (columns,), matrix.order))
    parts.append(("weight_scale", torch.float16, (rows, groups), matrix.scales))
    return [Record(f"{stem}.{name}", dtype, shape, matrix.told(values)) for name, dtype, shape, values in parts]


class _Matrix:
    """One matrix as integers: made when its codes are asked for, forgotten with its scales, the last of its parts."""

    def __init__(self, source: Matrices, piece: Piece, form: IntForm, written: Callable[[int], None]) -> None:
        self._source, self._piece, self._form, self._written = source, piece, form, written
        self._made: Groups | None = None

    def told(self, values: Callable[[], Tensor]) -> Callable[[], Iterator[Tensor]]:
        def parts() -> Iterator[Tensor]:
            found = values()
            yield found
            self._written(found.numel() * found.itemsize)

        return parts

    def codes(self) -> Tensor:
        found = self._groups()
        self._made = found
        return found.codes.view(torch.int32)

    def zeros(self) -> Tensor:
        found = self._groups()
        if found.zeros is None:
            half = 1 << (found.bits - 1)
            zeros = torch.full(found.scales.shape, half, dtype=torch.uint8)
        else:
            zeros = found.zeros
        rows = zeros.t().contiguous()
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32))
        words = pack_bits(padded, found.bits).view(torch.int32)
        return words[:, : -(-rows.shape[1] * found.bits // 32)].t()

    def order(self) -> Tensor:
        found = self._groups()
        plain = torch.arange(found.shape[1], dtype=torch.int32) // found.group
        return plain if found.order is None else found.order

    def scales(self) -> Tensor:
        found = self._groups()
        self._made = None
        halves = found.scales.half()
        if not torch.equal(halves.to(found.scale_dtype), found.scales):
            raise CheckpointError(f"{self._piece.name!r}: its scales do not fit into float16; choose another format")
        return halves

    def _groups(self) -> Groups:
        if self._made is not None:
            return self._made
        stored = self._source.packed(self._piece)
        bits, group = self._form.bits, self._form.columns(self._piece.shape[1])
        found = None if stored is None else as_groups(stored, bits, group)
        if found is not None:
            return found
        try:
            return encode_groups(self._source.values(self._piece, torch.float32), self._form)
        except CheckpointError as error:
            raise CheckpointError(f"{self._piece.name!r}: {error}") from None
