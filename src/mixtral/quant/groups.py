"""Float32 rows into symmetric integers of 3 or 4 bits in groups that have a float16 scale each; Q4_0 is one of these.

`mixtral.quant.search` chooses the numbers. An error counts as the square of its value, in int3 plus the mean square of
the group, times the importance of its column where there is one. These weights gave the lowest divergences on the
embedded model, but those of other weights between none and the square were hardly outside the noise.

This is the reference: plain, slow, and the same bits as native code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.kencode import (
    NOTHING,
    TOO_LARGE,
    check_importance,
    even_importance,
    refuse_infinite,
    refuse_too_large,
    unit_of,
)
from mixtral.quant.search import Floats, Halves, search_groups, total

__all__ = ["BITS", "GROUPS", "check_rows", "encode_integers"]

Bytes = npt.NDArray[np.uint8]

BITS, GROUPS = (3, 4), (32, 64, 128)
# Values encoded at a time: bounds the memory of the search to some 20 MB.
CHUNK_VALUES = 1 << 19


def encode_integers(values: Floats, bits: int, group: int, importance: Floats | None = None) -> tuple[Bytes, Halves]:
    """Encode rows [rows, N]: codes below 2^bits, uint8 [rows, N], and float16 bits [rows, N / group].

    A value is ``(code - 2^(bits - 1)) * scale``. ``importance`` [N] >= 0 says how much an error in a column matters.

    Raises:
        ConfigError: other bits or groups than `BITS` and `GROUPS`.
        CheckpointError: rows that are not whole groups, values or importances that are not finite, negative
            importances, or values beyond what a float16 scale can reach.
    """
    check_rows(values, bits, group)
    check_importance(importance, values.shape[1])
    bad = np.argwhere(~np.isfinite(values))
    if bad.size:
        refuse_infinite(f"int{bits}_g{group}", int(bad[0][0]), int(bad[0][1]))
    per_row, half = values.shape[1] // group, 1 << (bits - 1)
    lanes = np.ascontiguousarray(values).reshape(-1, group)
    weights = None if importance is None else even_importance(importance.reshape(-1, group))
    codes, scales = np.empty(lanes.shape, np.uint8), np.empty(len(lanes), np.uint16)
    step = CHUNK_VALUES // group
    for start in range(0, len(lanes), step):
        part = lanes[start : start + step]
        largest = np.abs(part).max(axis=1)
        reachable = largest < TOO_LARGE
        unit = unit_of(np.where(reachable, largest, np.float32(0)), NOTHING)
        factor = np.where(reachable & (largest >= NOTHING), unit, np.float32(0))
        x = np.ascontiguousarray((part * factor[:, None]).T)
        w = x * x
        if bits == 3:
            w = w + total(w) / np.float32(group)
        if weights is not None:
            w = w * weights[np.arange(start, start + len(part)) % per_row].T
        stored = search_groups(x, w, half, unit)
        codes[start : start + step] = (stored.q + np.float32(half)).T
        scales[start : start + step] = stored.scales
        fits = stored.fits & reachable
        if not fits.all():
            first = start + int(np.argmin(fits))
            refuse_too_large(f"int{bits}_g{group}", first // per_row, first % per_row * group, group)
    return codes.reshape(values.shape), scales.reshape(len(values), per_row)


def check_rows(values: Floats, bits: int, group: int) -> None:
    """Raise unless there is an encoder, and ``values`` is float32 [rows, N] of whole groups."""
    if bits not in BITS or group not in GROUPS:
        raise ConfigError(f"no encoder for {bits} bits in groups of {group}; bits are {BITS} and groups {GROUPS}")
    if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] % group:
        raise CheckpointError(
            f"int{bits} in groups of {group} encodes float32 [rows, N], N a multiple of {group}; "
            f"got {values.dtype} {list(values.shape)}"
        )
