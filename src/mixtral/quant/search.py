"""Scales by weighted least squares: the search behind the encoders of K-quants and groups, in float32 of a fixed order.

Arrays are [values, lanes]: a lane is one sub-block or group, ``values`` (16 to 128) its numbers. Lanes do not mix, but
where the scales of one super-block (``subs`` neighbouring lanes) are stored against their common one. All values are
divided by a power of two beforehand, so that the largest of a super-block, or of a group, lies in [0.5, 1).

Every sum runs over its terms one after the other, and no expression may be fused or reordered: native code repeats
these operations and must arrive at the same bits. The search:

1. A few scales around the one that spans the range. For each one, round, and solve for the scale (and offset) that is
   best for these integers. Keep the smallest weighted error.
2. Store the scales as integers against a common float16, trying the neighbours of each integer with fresh rounding.
3. Solve for the common scale that is best for all integers of the super-block, and keep step 2 with it if it is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "Affine",
    "Floats",
    "Halves",
    "Mask",
    "Stored",
    "StoredGroups",
    "Symmetric",
    "search_groups",
    "store_affine",
    "store_symmetric",
    "total",
]

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]

# What is added to the number of steps that the range is divided into. Multiples of 1/8 are exact in float32.
OFFSETS = (-1.5, -1.125, -0.75, -0.375, 0.0, 0.375, 0.75)
# The unchanged integer comes first: it wins a tie.
NEIGHBOURS = (0.0, 1.0, -1.0)
TINY = np.float32(2.0**-60)
# Below this share of its terms a determinant is the rounding error of two equal numbers.
FLAT = np.float32(2.0**-10)
ZERO, TWO = np.float32(0), np.float32(2)
INFINITE_HALF = 0x7C00


@dataclass(frozen=True, slots=True)
class Affine:
    """Values are ``scale * q - low``: q in 0..top, ``scale`` and ``low`` stored as integers in 0..most."""

    values: int
    top: int
    most: int


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Values are ``scale * q``: q in -half..half-1, ``scale`` stored as an integer in -most..most-1."""

    values: int
    half: int
    most: int


class Stored(NamedTuple):
    """What a block stores: q [values, lanes], integer scales and lows [lanes], bits of the float16s [blocks].

    ``fits`` [blocks] is false where a float16 cannot hold the common scale; the rest of such a block means nothing.
    """

    q: Floats
    scales: Floats
    lows: Floats
    d: Halves
    dmin: Halves
    fits: Mask


class StoredGroups(NamedTuple):
    """What groups store: q [values, lanes], bits of the float16 scales [lanes]; ``fits`` as in `Stored`."""

    q: Floats
    scales: Halves
    fits: Mask


class _Choice(NamedTuple):
    """Integers of every lane for one common scale and low, and the weighted error [lanes] they leave."""

    d: Halves
    dmin: Halves
    scales: Floats
    lows: Floats
    error: Floats


def total(terms: Floats) -> Floats:
    """Sum over the first axis, in order."""
    result: Floats = terms[0].copy()
    for row in terms[1:]:
        result += row
    return result


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 where b is as good as 0."""
    usable = np.abs(b) > TINY
    result: Floats = np.where(usable, a / np.where(usable, b, np.float32(1)), ZERO)
    return result


def _round(x: Floats, low: float, high: float) -> Floats:
    """The nearest integer in low..high, ties to even."""
    result: Floats = np.rint(np.minimum(np.maximum(x, np.float32(low)), np.float32(high)))
    return result


def _per_block(lanes: Floats, subs: int) -> Floats:
    """[lanes] as [subs, blocks], so that sums and maxima run over the sub-blocks of each super-block."""
    return np.ascontiguousarray(lanes.reshape(-1, subs).T)


def _nearest_half(x: Floats) -> Halves:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


def _half_above(x: Floats) -> Halves:
    """Bits of the smallest float16 that is not below x >= 0; infinity if there is none."""
    bits = _nearest_half(np.abs(x))  # -0.0 too
    return np.where(_widen(bits) < x, bits + np.uint16(1), bits).astype(np.uint16)


def _widen(bits: Halves) -> Floats:
    return bits.view(np.float16).astype(np.float32)


# --- scale and low ----------------------------------------------------------------------------------------------------


def _search_affine(x: Floats, w: Floats, form: Affine) -> tuple[Floats, Floats]:
    """Scale > 0 and low >= 0 of each lane, before they are stored."""
    floor = np.minimum(x.min(axis=0), ZERO)
    span = x.max(axis=0) - floor
    y = x - floor
    weighted = w * y
    sums = total(w), total(weighted), total(weighted * y)
    best, scale, low = np.full_like(span, np.inf), span / np.float32(form.top), -floor
    for offset in OFFSETS:
        inverse = _divide(np.full_like(span, form.top + offset), span)
        best, scale, low = _improve(_round(y * inverse, 0, form.top), y, w, floor, sums, (best, scale, low))
    inverse = _divide(np.ones_like(scale), scale)
    best, scale, low = _improve(_round((x + low) * inverse, 0, form.top), y, w, floor, sums, (best, scale, low))
    return scale, low


def _improve(
    q: Floats,
    y: Floats,
    w: Floats,
    floor: Floats,
    sums: tuple[Floats, Floats, Floats],
    known: tuple[Floats, Floats, Floats],
) -> tuple[Floats, Floats, Floats]:
    """Best error, scale and low after trying the fit of y = scale * q + shift; the low is then -floor - shift."""
    best, scale, low = known
    s_w, s_y, s_yy = sums
    t = w * q
    s_q, s_qq, s_qy = total(t), total(t * q), total(t * y)
    product = s_w * s_qq
    determinant = product - s_q * s_q
    slope = _divide(s_w * s_qy - s_q * s_y, determinant)
    shift = _divide(s_y - slope * s_q, s_w)
    # With equal integers only the scale can be solved for; a low below zero cannot be stored.
    flat = determinant <= product * FLAT
    above = floor + shift > ZERO
    shift = np.where(flat, ZERO, np.where(above, -floor, shift))
    slope = np.where(flat | above, _divide(s_qy - shift * s_q, s_qq), slope)
    error = s_yy + slope * (slope * s_qq - TWO * s_qy) + shift * (shift * s_w - TWO * s_y + TWO * (slope * s_q))
    better = (slope > ZERO) & (error < best)
    return np.where(better, error, best), np.where(better, slope, scale), np.where(better, -(floor + shift), low)


def _quantise_affine(x: Floats, scale: Floats, low: Floats, top: int) -> Floats:
    return _round((x + low) * _divide(np.ones_like(scale), scale), 0, top)


def _integers_affine(
    x: Floats, w: Floats, form: Affine, unit: Floats, halves: tuple[Halves, Halves], wanted: tuple[Floats, Floats]
) -> _Choice:
    """Stored integers for these common scale and low, out of the nine nearest pairs of each lane."""
    subs = wanted[0].size // halves[0].size
    d, dmin = (np.repeat(_widen(bits) * unit, subs) for bits in halves)
    nearest = [_round(_divide(value, by), 0, form.most) for value, by in zip(wanted, (d, dmin), strict=True)]
    best, scales, lows = np.full_like(d, np.inf), *nearest
    for step in NEIGHBOURS:
        for low_step in NEIGHBOURS:
            scale_int = _round(nearest[0] + np.float32(step), 0, form.most)
            low_int = _round(nearest[1] + np.float32(low_step), 0, form.most)
            scale, low = d * scale_int, dmin * low_int
            rest = x - (scale * _quantise_affine(x, scale, low, form.top) - low)
            error = total(w * rest * rest)
            better = error < best
            best = np.where(better, error, best)
            scales, lows = np.where(better, scale_int, scales), np.where(better, low_int, lows)
    return _Choice(*halves, scales, lows, best)


def _refit_affine(x: Floats, w: Floats, form: Affine, unit: Floats, old: _Choice) -> tuple[Halves, Halves]:
    """The common scale and low that are best for the integers of ``old``; the old ones where they cannot be solved."""
    subs = old.scales.size // old.d.size
    scale = np.repeat(_widen(old.d) * unit, subs) * old.scales
    low = np.repeat(_widen(old.dmin) * unit, subs) * old.lows
    q = _quantise_affine(x, scale, low, form.top)
    t = w * q
    terms = (
        old.scales * old.scales * total(t * q),
        old.scales * old.lows * total(t),
        old.lows * old.lows * total(w),
        old.scales * total(t * x),
        old.lows * total(w * x),
    )
    aa, ab, bb, ax, bx = (total(_per_block(term, subs)) for term in terms)
    determinant = aa * bb - ab * ab
    best: Floats = np.where(bb > ZERO, _divide(ax * bb - bx * ab, determinant), _divide(ax, aa))
    best_low: Floats = np.where(bb > ZERO, _divide(ax * ab - bx * aa, determinant), ZERO)
    d, dmin = _nearest_half(best / unit), _nearest_half(best_low / unit)
    usable = (_widen(d) > ZERO) & (d < INFINITE_HALF) & (_widen(dmin) >= ZERO) & (dmin < INFINITE_HALF)
    return np.where(usable, d, old.d), np.where(usable, dmin, old.dmin)


def store_affine(x: Floats, w: Floats, form: Affine, unit: Floats) -> Stored:
    """Encode lanes with scale and low; ``unit`` [blocks] is the power of two that values were multiplied with."""
    scale, low = _search_affine(x, w, form)
    subs = scale.size // unit.size
    halves = (
        _half_above(_per_block(scale, subs).max(axis=0) / np.float32(form.most) / unit),
        _half_above(_per_block(low, subs).max(axis=0) / np.float32(form.most) / unit),
    )
    fits = (halves[0] < INFINITE_HALF) & (halves[1] < INFINITE_HALF)
    halves = np.where(fits, halves[0], np.uint16(0)), np.where(fits, halves[1], np.uint16(0))
    first = _integers_affine(x, w, form, unit, halves, (scale, low))
    wanted = (
        np.repeat(_widen(first.d) * unit, subs) * first.scales,
        np.repeat(_widen(first.dmin) * unit, subs) * first.lows,
    )
    second = _integers_affine(x, w, form, unit, _refit_affine(x, w, form, unit, first), wanted)
    chosen = _smaller(first, second, subs)
    scale = np.repeat(_widen(chosen.d) * unit, subs) * chosen.scales
    low = np.repeat(_widen(chosen.dmin) * unit, subs) * chosen.lows
    q = _quantise_affine(x, scale, low, form.top)
    return Stored(q, chosen.scales, chosen.lows, chosen.d, chosen.dmin, fits)


def _smaller(first: _Choice, second: _Choice, subs: int) -> _Choice:
    """Block by block the choice with the smaller error."""
    better = total(_per_block(second.error, subs)) < total(_per_block(first.error, subs))
    lanes = np.repeat(better, subs)
    return _Choice(
        np.where(better, second.d, first.d),
        np.where(better, second.dmin, first.dmin),
        np.where(lanes, second.scales, first.scales),
        np.where(lanes, second.lows, first.lows),
        np.where(lanes, second.error, first.error),
    )


# --- scale alone ------------------------------------------------------------------------------------------------------


def _larger(high: Floats, low: Floats) -> Floats:
    """The one of the two extremes that is further from zero."""
    return np.where(high > -low, high, low)


def _search_symmetric(x: Floats, w: Floats, form: Symmetric) -> Floats:
    """Scale of each lane, of either sign, before it is stored."""
    extreme = _larger(x.max(axis=0), x.min(axis=0))
    best, scale = np.zeros_like(extreme), extreme / np.float32(-form.half)
    for offset in OFFSETS:
        # The extreme value may become the most negative integer, or the most positive one.
        for steps in (-(form.half + offset), form.half - 1 + offset):
            q = _quantise_symmetric(x, _divide(np.full_like(extreme, steps), extreme), form.half)
            t = w * q
            s_qx, s_qq = total(t * x), total(t * q)
            slope = _divide(s_qx, s_qq)
            gain = slope * s_qx
            better = gain > best
            best, scale = np.where(better, gain, best), np.where(better, slope, scale)
    return scale


def _quantise_symmetric(x: Floats, inverse: Floats, half: int) -> Floats:
    return _round(x * inverse, -half, half - 1)


def _integers_symmetric(x: Floats, w: Floats, form: Symmetric, unit: Floats, half: Halves, wanted: Floats) -> _Choice:
    """Stored integers for this common scale, out of the three nearest of each lane."""
    d = np.repeat(_widen(half) * unit, wanted.size // half.size)
    nearest = _round(_divide(wanted, d), -form.most, form.most - 1)
    best, scales = np.full_like(d, np.inf), nearest
    for step in NEIGHBOURS:
        scale_int = _round(nearest + np.float32(step), -form.most, form.most - 1)
        scale = d * scale_int
        rest = x - scale * _quantise_symmetric(x, _divide(np.ones_like(scale), scale), form.half)
        error = total(w * rest * rest)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale_int, scales)
    return _Choice(half, np.zeros_like(half), scales, np.zeros_like(scales), best)


def store_symmetric(x: Floats, w: Floats, form: Symmetric, unit: Floats) -> Stored:
    """Encode lanes with a scale alone; ``unit`` [blocks] is the power of two that values were multiplied with."""
    scale = _search_symmetric(x, w, form)
    subs = scale.size // unit.size
    blocks = _per_block(scale, subs)
    extreme = _larger(blocks.max(axis=0), blocks.min(axis=0))
    absolute: Floats = np.abs(extreme)
    size = _half_above(absolute / np.float32(form.most) / unit)
    fits = size < INFINITE_HALF
    # The largest scale is to become the most negative integer.
    negative = fits & (size > 0) & (extreme > ZERO)
    half = np.where(fits, size, 0).astype(np.uint16) | np.where(negative, 0x8000, 0).astype(np.uint16)
    first = _integers_symmetric(x, w, form, unit, half, scale)

    scale = np.repeat(_widen(first.d) * unit, subs) * first.scales
    q = _quantise_symmetric(x, _divide(np.ones_like(scale), scale), form.half)
    t = w * q
    ax = total(_per_block(first.scales * total(t * x), subs))
    aa = total(_per_block(first.scales * first.scales * total(t * q), subs))
    refit = _nearest_half(_divide(ax, aa) / unit)
    usable = (_widen(refit) != ZERO) & ((refit & 0x7FFF) < INFINITE_HALF)
    second = _integers_symmetric(x, w, form, unit, np.where(usable, refit, first.d), scale)

    chosen = _smaller(first, second, subs)
    scale = np.repeat(_widen(chosen.d) * unit, subs) * chosen.scales
    q = _quantise_symmetric(x, _divide(np.ones_like(scale), scale), form.half)
    return Stored(q, chosen.scales, chosen.lows, chosen.d, chosen.dmin, fits)


# --- a float16 scale for each lane ------------------------------------------------------------------------------------


def search_groups(x: Floats, w: Floats, half: int, unit: Floats) -> StoredGroups:
    """Lanes as float16 scale * q, q in -half..half-1; ``unit`` [lanes] is what values were multiplied with.

    A scale counts as it will be stored: near the smallest float16s its rounding decides which one is best. The plain
    scale, at which the extreme value is -half, comes last, so that no lane is worse than it would be without a search.
    """
    high, size = x.max(axis=0), np.abs(x).max(axis=0)
    extreme: Floats = np.where(high < size, -size, size)
    inverse = _divide(np.ones_like(size), extreme)
    best, scale = np.zeros_like(size), np.zeros_like(size)
    for offset in OFFSETS:
        # The extreme value may become the most negative integer, or the most positive one.
        for steps in (-(half + offset), half - 1 + offset):
            best, scale = _improve_group(x, w, half, unit, inverse * np.float32(steps), (best, scale))
    best, scale = _improve_group(x, w, half, unit, _divide(np.ones_like(scale), scale), (best, scale))
    plain = _nearest_half(extreme / np.float32(-half) / unit)
    plain_scale: Floats = np.where((plain & 0x7FFF) < INFINITE_HALF, _widen(plain) * unit, ZERO)
    better = _error(x, w, half, plain_scale) < _error(x, w, half, scale)
    chosen: Floats = np.where(better, plain_scale, scale)
    q = _quantise_symmetric(x, _divide(np.ones_like(chosen), chosen), half)
    # Without a scale the values are too small for any, which is well, or too large for all.
    return StoredGroups(q, _nearest_half(chosen / unit), (chosen != ZERO) | (size < unit))


def _improve_group(
    x: Floats, w: Floats, half: int, unit: Floats, inverse: Floats, known: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    """Best gain and scale after trying the stored scale that is best for the integers of x * inverse."""
    best, scale = known
    q = _quantise_symmetric(x, inverse, half)
    t = w * q
    s_qx, s_qq = total(t * x), total(t * q)
    stored = _widen(_nearest_half(_divide(s_qx, s_qq) / unit)) * unit
    # What the scale saves of the error that zeros would leave: minus infinity for one beyond float16.
    gain = stored * (TWO * s_qx - stored * s_qq)
    better = gain > best
    return np.where(better, gain, best), np.where(better, stored, scale)


def _error(x: Floats, w: Floats, half: int, scale: Floats) -> Floats:
    """The weighted error that a scale leaves, from the differences: exact even where it is very small."""
    rest = x - scale * _quantise_symmetric(x, _divide(np.ones_like(scale), scale), half)
    return total(w * rest * rest)
