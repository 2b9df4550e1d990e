"""Float32 rows into the K-quant blocks of GGML, Q2_K to Q6_K, with the smallest error that their scales allow.

A super-block holds 256 values of a row in sub-blocks of 16 or 32. Each sub-block has an integer scale, in Q2_K, Q4_K
and Q5_K also an integer low; a float16 per super-block (two with lows) turns them into numbers. The layouts are those
of ggml's ``ggml-common.h``. `mixtral.quant.search` chooses the numbers; this file weighs values and packs bits.

This is the reference: plain, slow, and the same bits as native code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.formats import FORMATS
from mixtral.quant.search import Affine, Floats, Halves, Stored, Symmetric, store_affine, store_symmetric, total

__all__ = [
    "K_FORMATS",
    "NOTHING",
    "TOO_LARGE",
    "check_importance",
    "check_values",
    "encode_k",
    "even_importance",
    "refuse_infinite",
    "refuse_too_large",
    "unit_of",
]

Bytes = npt.NDArray[np.uint8]

SUPER = 256
# Super-blocks encoded at a time: bounds the memory of the search to some 30 MB.
CHUNK = 2048
# Values that no float16 scale can reach, and values that none can tell from zero: 2^-24 is the smallest one.
TOO_LARGE, NOTHING = np.float32(2.0**30), np.float32(2.0**-60)
# Importance below this share of the largest one in its super-block counts as this share.
LEAST_IMPORTANCE, NO_IMPORTANCE = np.float32(2.0**-20), np.float32(2.0**-100)


def encode_k(values: npt.NDArray[np.float32], name: str, importance: npt.NDArray[np.float32] | None = None) -> Bytes:
    """Encode rows [rows, N] as blocks of one of `K_FORMATS`: uint8 [rows, N / 256 * bytes of a block].

    Without ``importance`` an error counts as the size of its value plus an eighth of the root mean square of its
    sub-block: on the embedded model this gave a lower divergence than larger shares, though a higher plain error.
    ``importance`` [N] >= 0 takes the place of these weights: for a linear layer the mean square of each input.

    Raises:
        ConfigError: no such K-quant.
        CheckpointError: rows that are not whole super-blocks, values or importances that are not finite, negative
            importances, or values beyond what the float16 scales can hold.
    """
    if name not in K_FORMATS:
        raise ConfigError(f"no K-quant is called {name!r}; there are {', '.join(K_FORMATS)}")
    check_values(values, name)
    check_importance(importance, values.shape[1])
    bad = np.argwhere(~np.isfinite(values))
    if bad.size:
        refuse_infinite(name, int(bad[0][0]), int(bad[0][1]))
    blocks = np.ascontiguousarray(values).reshape(-1, SUPER)
    per_row = values.shape[1] // SUPER
    weights = None if importance is None else importance.reshape(-1, SUPER)
    result = np.empty((len(blocks), FORMATS[name].bytes), np.uint8)
    for start in range(0, len(blocks), CHUNK):
        part = blocks[start : start + CHUNK]
        rows = None if weights is None else weights[np.arange(start, start + len(part)) % per_row]
        packed, fits = _encode_blocks(part, rows, name)
        result[start : start + CHUNK] = packed
        if not fits.all():
            first = start + int(np.argmin(fits))
            refuse_too_large(name, first // per_row, first % per_row * SUPER, SUPER)
    return result.reshape(len(values), per_row * FORMATS[name].bytes)


def check_values(values: npt.NDArray[np.float32], name: str) -> None:
    """Raise CheckpointError unless ``values`` is float32 [rows, N] with N a multiple of the format's block."""
    if values.dtype != np.float32 or values.ndim != 2:
        raise CheckpointError(f"{name} encodes float32 [rows, N], got {values.dtype} {list(values.shape)}")
    FORMATS[name].size_bytes(values.shape)


def check_importance(importance: npt.NDArray[np.float32] | None, width: int) -> None:
    """Raise CheckpointError unless ``importance`` is None or float32 [width], finite and nowhere negative."""
    if importance is None:
        return
    if importance.dtype != np.float32 or importance.shape != (width,):
        raise CheckpointError(
            f"importance must be float32 [{width}], one per column; got {importance.dtype} {list(importance.shape)}"
        )
    bad = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if bad.size:
        column = int(bad[0])
        raise CheckpointError(f"importance of column {column} is {importance[column]}; expected finite and >= 0")


def refuse_infinite(name: str, row: int, column: int) -> None:
    """Raise CheckpointError for a value that is NaN or infinite."""
    raise CheckpointError(
        f"the value in row {row}, column {column} is not finite; {name} can only hold finite numbers: check the source"
    )


def refuse_too_large(name: str, row: int, column: int, count: int) -> None:
    """Raise CheckpointError for a block of ``count`` values whose scale is beyond float16."""
    raise CheckpointError(
        f"row {row}, columns {column} to {column + count - 1}: the scale in {name} is beyond float16 (65,504); "
        "keep this tensor in F32 or BF16"
    )


def _encode_blocks(blocks: Floats, importance: Floats | None, name: str) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Packed blocks [n, bytes] of values [n, 256], and which of them fit float16 scales."""
    form, pack = K_FORMATS[name]
    largest = np.abs(blocks).max(axis=1)
    reachable = largest < TOO_LARGE
    unit = unit_of(np.where(reachable, largest, np.float32(0)), NOTHING)
    scaled = blocks * np.where(reachable & (largest >= NOTHING), unit, np.float32(0))[:, None]
    x = np.ascontiguousarray(scaled.reshape(-1, form.values).T)
    if importance is None:
        w = np.float32(0.125) * np.sqrt(total(x * x) / np.float32(form.values)) + np.abs(x)
    else:
        w = np.ascontiguousarray(even_importance(importance).reshape(-1, form.values).T)
    stored = store_affine(x, w, form, unit) if isinstance(form, Affine) else store_symmetric(x, w, form, unit)
    return pack(stored), stored.fits & reachable


def even_importance(importance: Floats) -> Floats:
    """Importance [n, columns], every row brought to the same size: only ratios inside it count, and none is zero."""
    peak = importance.max(axis=1)
    scaled = importance * np.where(peak >= NO_IMPORTANCE, unit_of(peak, NO_IMPORTANCE), np.float32(0))[:, None]
    even: Floats = np.maximum(scaled, LEAST_IMPORTANCE)
    return even


def unit_of(largest: Floats, least: np.float32) -> Floats:
    """The power of two that brings ``largest`` into [0.5, 1); 1 where it is below ``least``."""
    _, exponent = np.frexp(np.where(largest >= least, largest, np.float32(0.5)))  # 0.5 is 0.5 * 2^0
    unit: Floats = np.ldexp(np.float32(1), -exponent)
    return unit


# --- packing: q is [n, 256] in the order of the row, scales and lows are [n, sub-blocks] ----------------------------


def _integers(stored: Stored, offset: int) -> tuple[Bytes, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    n = stored.d.size
    q = (stored.q.T.reshape(n, SUPER) + np.float32(offset)).astype(np.uint8)
    return q, stored.scales.reshape(n, -1).astype(np.int32), stored.lows.reshape(n, -1).astype(np.int32)


def _bytes_of(halves: Halves) -> Bytes:
    pairs: Bytes = halves.astype("<u2")[:, None].view(np.uint8)
    return pairs


def _interleave(q: npt.NDArray[np.integer[Any]], run: int, bits: int) -> Bytes:
    """Join runs of ``run`` values: the k-th of 8 / bits neighbouring runs takes bits k * bits and up of the bytes."""
    parts = 8 // bits
    runs = (
        q.astype(np.uint8).reshape(len(q), -1, parts, run)
        << (np.arange(parts, dtype=np.uint8) * np.uint8(bits))[:, None]
    )
    joined: Bytes = np.bitwise_or.reduce(runs, axis=2).reshape(len(q), -1)
    return joined


def _six_bit_pairs(scales: npt.NDArray[np.int32], lows: npt.NDArray[np.int32]) -> Bytes:
    """8 scales and 8 lows of 6 bits in 12 bytes: four whole ones each, whose top bits hold those of the other four."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = lows[:, :4] | (lows[:, 4:] >> 4 << 6)
    third = (scales[:, 4:] & 15) | ((lows[:, 4:] & 15) << 4)
    result: Bytes = np.concatenate([first, second, third], axis=1).astype(np.uint8)
    return result


def _pack_q2(stored: Stored) -> Bytes:
    q, scales, lows = _integers(stored, 0)
    packed = (scales | (lows << 4)).astype(np.uint8)
    return np.concatenate([packed, _interleave(q, 32, 2), _bytes_of(stored.d), _bytes_of(stored.dmin)], axis=1)


def _pack_q3(stored: Stored) -> Bytes:
    q, scales, _ = _integers(stored, 4)
    scales = scales + 32
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    high = _interleave(scales >> 4, 4, 2)
    parts = [_interleave(q >> 2, 32, 1), _interleave(q & 3, 32, 2), low.astype(np.uint8), high, _bytes_of(stored.d)]
    return np.concatenate(parts, axis=1)


def _pack_q4(stored: Stored) -> Bytes:
    q, scales, lows = _integers(stored, 0)
    parts = [_bytes_of(stored.d), _bytes_of(stored.dmin), _six_bit_pairs(scales, lows), _interleave(q, 32, 4)]
    return np.concatenate(parts, axis=1)


def _pack_q5(stored: Stored) -> Bytes:
    q, scales, lows = _integers(stored, 0)
    head = [_bytes_of(stored.d), _bytes_of(stored.dmin), _six_bit_pairs(scales, lows)]
    return np.concatenate([*head, _interleave(q >> 4, 32, 1), _interleave(q & 15, 32, 4)], axis=1)


def _pack_q6(stored: Stored) -> Bytes:
    q, scales, _ = _integers(stored, 32)
    packed = scales.astype(np.int8).view(np.uint8)
    parts = [_interleave(q & 15, 64, 4), _interleave(q >> 4, 32, 2), packed, _bytes_of(stored.d)]
    return np.concatenate(parts, axis=1)


K_FORMATS: Mapping[str, tuple[Affine | Symmetric, Callable[[Stored], Bytes]]] = {
    "Q2_K": (Affine(values=16, top=3, most=15), _pack_q2),
    "Q3_K": (Symmetric(values=16, half=4, most=32), _pack_q3),
    "Q4_K": (Affine(values=32, top=15, most=63), _pack_q4),
    "Q5_K": (Affine(values=32, top=31, most=63), _pack_q5),
    "Q6_K": (Symmetric(values=16, half=32, most=128), _pack_q6),
}
