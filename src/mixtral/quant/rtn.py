"""Matrices to integers in groups: each number is rounded to the nearest step of a scale that is searched for its group.

Int3 and int4 try several scales for every group and keep the one with the least error, in which an error counts as the
square of its value: on the embedded model this gave a lower divergence than the size of the value, or no weights. Int8
needs no search: its scales are those of GGML's Q8_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.bits import pack_bits
from mixtral.quant.packed import Groups

__all__ = ["INT_FORMS", "IntForm", "encode_groups", "int_form"]

# Values that are encoded at a time: their float32 and the few copies beside them stay in the cache.
CHUNK_VALUES = 1 << 18
# Steps between zero and the extreme value of a group: the range and what lies around it.
_AROUND = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class IntForm:
    """``bits`` of an integer, and how many columns share a scale; 0 is the whole row."""

    bits: int
    group: int

    def columns(self, width: int) -> int:
        """Columns of a group in a row of this width.

        Raises:
            CheckpointError: the row is no whole number of groups.
        """
        group = self.group or width
        if width % group or width * self.bits % 32:
            raise CheckpointError(
                f"a row of {width:,} values does not divide into groups of {group} in words of 32 bits; "
                "choose smaller groups"
            )
        return group


INT_FORMS: Mapping[str, IntForm] = {
    "int8": IntForm(8, 0),
    **{f"int{bits}_g{group}": IntForm(bits, group) for bits in (8, 4, 3) for group in (32, 64, 128)},
}


def int_form(name: str) -> IntForm:
    """The integer format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in INT_FORMS:
        raise ConfigError(f"format is {name!r}; expected one of {', '.join(INT_FORMS)}", param="format")
    return INT_FORMS[name]


def encode_groups(values: Tensor, form: IntForm) -> Groups:
    """Floats [O, I] as symmetric integers with float16 scales, a bounded part at a time.

    Raises:
        CheckpointError: rows that are no whole groups, a value that is not finite, or a scale beyond float16.
    """
    group = form.columns(values.shape[1])
    rows, columns = values.shape
    codes = torch.empty((rows, columns * form.bits // 8), dtype=torch.uint8)
    scales = torch.empty((rows, columns // group), dtype=torch.float16)
    step = max(1, CHUNK_VALUES // columns)
    for low in range(0, rows, step):
        part = values[low : low + step].to(torch.float32).reshape(-1, group)
        found = _scales(part, form.bits)
        if not bool(found.isfinite().all()):
            raise CheckpointError(f"rows {low} to {low + step - 1}: a value is not finite, or too large for a scale")
        scales[low : low + step] = found.view(-1, columns // group)
        numbers = _round(part, found.float(), form.bits) + (1 << (form.bits - 1))
        codes[low : low + step] = pack_bits(numbers.to(torch.uint8).view(-1, columns), form.bits)
    return Groups(form.bits, codes, scales)


def _scales(groups: Tensor, bits: int) -> Tensor:
    """The float16 scale [N] of every group, float32 [N, C]."""
    half = 1 << (bits - 1)
    if bits == 8:
        return (groups.abs().amax(-1) / (half - 1)).half()
    extreme = groups.gather(1, groups.abs().argmax(-1, keepdim=True))[:, 0]
    weights = groups.square()
    weighted = weights * groups
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, -1.0)
    for around in _AROUND:
        # The extreme value falls on the end of the range that reaches one step further, whatever its sign.
        numbers = _round(groups, extreme / -(half - 1 + around), bits)
        square = (weights * numbers).mul_(numbers).sum(-1)
        product = (weighted * numbers).sum(-1)
        # For given integers this is the scale of least error, and the error it saves over zeros.
        scale = torch.where(square > 0, product / square, 0.0)
        gain = product * scale
        better = gain > least
        best, least = torch.where(better, scale, best), torch.where(better, gain, least)
    # NaN compares as worse, so a group with one keeps its start; it must not pass for zeros.
    return torch.where(extreme.isfinite(), best, extreme).half()


def _round(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    inverse = torch.where(scales != 0, 1.0 / scales, 0.0)
    return (groups * inverse[:, None]).round_().clamp_(-half, half - 1)
