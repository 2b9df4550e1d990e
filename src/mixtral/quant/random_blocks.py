"""Random weights made directly in the format of a file, without a float copy: bits at random, scales that fit.

N blocks. Every format gives values with a mean near 0 and the same standard deviation; floats are uniform, and so are
the integers of a block. The bytes depend on the bit generator alone, whose stream numpy promises never to change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mixtral.errors import ConfigError
from mixtral.quant.formats import FORMATS

__all__ = ["RANDOM_FORMATS", "STD", "random_blocks", "random_bytes", "random_scales"]

STD = 0.02
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A block format. A value is ``scale * sub-scale * integer``, minus the low times the sub-scale where there is one;
    ``tame`` brings random sub-scales into their range, and makes the multipliers of the lows equal to them."""

    scale_at: int  # byte of the float16 scale
    integers: range
    low_at: int | None = None
    low_sign: int = 1  # -1 where the file holds what is added, not what is subtracted
    sub_scales: tuple[int, ...] = (1,)
    tame: Callable[[Bytes], None] | None = None


def _tame_q2(blocks: Bytes) -> None:
    low = blocks[:, :16] & 7 | 8
    blocks[:, :16] = low * 17  # scale and multiplier of the low in the two halves


def _tame_q45(blocks: Bytes) -> None:
    words = blocks.view("<u4")
    words[:, 1] |= 0xA0A0A0A0  # bit 5 of scales 0 to 3, and, two bits up, of 4 to 7
    words[:, 2] = words[:, 1]
    words[:, 3] &= 0x0F0F0F0F
    words[:, 3] *= 17


def _tame_q6(blocks: Bytes) -> None:
    scales = blocks[:, 192:208]
    blocks[:, 192:208] = scales & 0xBF | (~scales & 0x80) >> 1  # bit 6 is not the sign: never near zero


_UPPER_HALF = tuple(range(32, 64))
_KINDS: Mapping[str, _Kind] = {
    "Q4_0": _Kind(0, range(-8, 8)),
    "Q4_1": _Kind(0, range(16), low_at=2, low_sign=-1),
    "Q5_0": _Kind(0, range(-16, 16)),
    "Q5_1": _Kind(0, range(32), low_at=2, low_sign=-1),
    "Q8_0": _Kind(0, range(-128, 128)),
    "Q2_K": _Kind(80, range(4), low_at=82, sub_scales=tuple(range(8, 16)), tame=_tame_q2),
    "Q3_K": _Kind(108, range(-4, 4), sub_scales=tuple(range(-32, 32))),
    "Q4_K": _Kind(0, range(16), low_at=2, sub_scales=_UPPER_HALF, tame=_tame_q45),
    "Q5_K": _Kind(0, range(32), low_at=2, sub_scales=_UPPER_HALF, tame=_tame_q45),
    "Q6_K": _Kind(208, range(-32, 32), sub_scales=(*range(-128, -64), *range(64, 128)), tame=_tame_q6),
}
_FLOATS: Mapping[str, tuple[type[np.signedinteger], torch.dtype]] = {
    "F32": (np.int32, torch.float32),
    "F16": (np.int16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}
RANDOM_FORMATS = (*_FLOATS, *_KINDS)


def random_bytes(count: int, bits: np.random.BitGenerator) -> Bytes:
    """That many random bytes."""
    words: npt.NDArray[np.uint64] = bits.random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def random_blocks(name: str, count: int, bits: np.random.BitGenerator, *, std: float = STD) -> Bytes:
    """``count`` blocks (single values, where the format has no blocks) of one of ``RANDOM_FORMATS``: uint8 [N, bytes].
    ``std`` is the standard deviation of the values.

    Raises:
        ConfigError: another format.
    """
    if name not in RANDOM_FORMATS:
        raise ConfigError(f"no random weights of format {name!r}; expected one of {', '.join(RANDOM_FORMATS)}")
    size = FORMATS[name].bytes
    blocks = random_bytes(count * size, bits).reshape(count, size)
    if name in _FLOATS:
        integer, dtype = _FLOATS[name]
        step = std * 3**0.5 / 2 ** (8 * size - 1)  # uniform values with that deviation
        values = torch.from_numpy(blocks.view(integer)).to(torch.float32).mul_(step)
        return values.to(dtype).view(torch.uint8).numpy()
    kind = _KINDS[name]
    if kind.tame is not None:
        kind.tame(blocks)
    halves = blocks.view("<u2")
    middle = 0.0 if kind.low_at is None else (kind.integers[0] + kind.integers[-1]) / 2
    scale = std / _rms(*(number - middle for number in kind.integers)) / _rms(*kind.sub_scales)
    place = kind.scale_at // 2
    if kind.low_at is None:
        # A random sign: the integers reach one further down than up, and would otherwise have a mean below zero.
        halves[:, place] = halves[:, place] & 0x8000 | _half(scale)
    else:
        halves[:, place] = _half(scale)
        halves[:, kind.low_at // 2] = _half(kind.low_sign * middle * float(np.float16(scale)))
    return blocks


def random_scales(bit_count: int, count: int, bits: np.random.BitGenerator) -> npt.NDArray[np.float16]:
    """Scales of symmetric integers of ``bit_count`` bits, of either sign: float16 [count]."""
    top = 1 << (bit_count - 1)
    signs = random_bytes(2 * count, bits).view("<u2") & 0x8000
    return (signs | _half(STD / _rms(*range(-top, top)))).astype("<u2").view(np.float16)


def _rms(*numbers: float) -> float:
    return float(np.sqrt(np.mean(np.square(numbers))))


def _half(value: float) -> int:
    """The bits of the nearest float16."""
    return int(np.float16(value).view(np.uint16))
