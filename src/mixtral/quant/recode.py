"""One packed form in another, where every value stays exactly what it is."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.quant.bits import pack_bits, unpack_bits
from mixtral.quant.packed import Blocks, Groups, Packed

__all__ = ["GROUP", "Kept", "as_blocks", "as_groups", "kept"]

GROUP = 32  # of Q4_0 and Q8_0
_LABEL = re.compile(r"INT(\d)_G(\d+)(_ZEROS)?(_ORDER)?")


class Kept(NamedTuple):
    """What integers that are kept as they are bring with them."""

    zeros: bool
    order: bool


def kept(label: str, bits: int, group: int) -> Kept | None:
    """Whether values of the format ``label`` can be kept exactly as integers of ``bits`` in groups; None if not."""
    match = _LABEL.fullmatch({"Q4_0": "INT4_G32", "Q8_0": "INT8_G32"}.get(label, label))
    if match is None:
        return None
    found, size, order = int(match[1]), int(match[2]), bool(match[4])
    if (found, size) == (bits, group) or (found <= bits and size % group == 0 and not order):
        return Kept(bool(match[3]), order)
    return None


def as_groups(packed: Packed, bits: int, group: int) -> Groups | None:
    """The same values as integers of ``bits`` in groups of ``group`` columns; None if these cannot hold them exactly.

    Integers in groups become wider ones in smaller groups; Q4_0 and Q8_0 blocks are integers in groups of 32.
    """
    if isinstance(packed, Blocks):
        packed_groups = _of_blocks(packed)
        return None if packed_groups is None else as_groups(packed_groups, bits, group)
    if not isinstance(packed, Groups) or kept(packed.label, bits, group) is None:
        return None
    if (packed.bits, packed.group) == (bits, group):
        return packed
    shift = (1 << (bits - 1)) - (1 << (packed.bits - 1))
    codes = pack_bits(unpack_bits(packed.codes, packed.bits) + shift, bits)
    times = packed.group // group
    zeros = None if packed.zeros is None else (packed.zeros + shift).repeat_interleave(times, 1)
    return Groups(bits, codes, packed.scales.repeat_interleave(times, 1), zeros=zeros)


def as_blocks(groups: Groups, name: str) -> Tensor:
    """The same values as rows of ``Q4_0`` or ``Q8_0`` blocks: uint8 [O, bytes].

    Raises:
        CheckpointError: these blocks cannot hold them: there are zero points, mixed columns, groups that are no
            multiple of 32, or scales that no float16 holds.
    """
    found = as_groups(groups, {"Q4_0": 4, "Q8_0": 8}[name], GROUP)
    plain = found is not None and found.zeros is None and found.order is None
    halves = found.scales.half() if found is not None and plain else None
    if found is None or halves is None or not torch.equal(halves.to(found.scale_dtype), found.scales):
        raise CheckpointError(f"{groups.label} cannot be kept exactly as {name}; choose the format of the result")
    numbers = unpack_bits(found.codes, found.bits).view(len(found.codes), -1, GROUP)
    if name == "Q4_0":
        quants = numbers[..., :16] | (numbers[..., 16:] << 4)
    else:
        quants = numbers ^ 128
    scales = halves.view(torch.uint8).view(len(halves), -1, 2)
    return torch.cat((scales, quants), -1).flatten(-2)


def _of_blocks(blocks: Blocks) -> Groups | None:
    if blocks.label not in ("Q4_0", "Q8_0"):
        return None
    size = 18 if blocks.label == "Q4_0" else 34
    found = blocks.data.view(len(blocks.data), -1, size)
    scales = found[..., :2].contiguous().view(torch.float16)[..., 0]
    if blocks.label == "Q8_0":
        return Groups(8, (found[..., 2:] ^ 128).flatten(-2), scales)
    numbers = torch.cat((found[..., 2:] & 15, found[..., 2:] >> 4), -1).flatten(-2)
    return Groups(4, pack_bits(numbers, 4), scales)
