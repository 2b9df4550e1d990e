"""Matrices to integers in groups: each number is rounded to the nearest step of a scale that is searched for its group.

Int3 and int4 try several scales for every group (`mixtral.quant.groups`), in compiled code. Int8 needs no search: its
scales are those of GGML's Q8_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant import int8, native
from mixtral.quant.packed import Groups

__all__ = ["INT_FORMS", "IntForm", "encode_groups", "int_form"]

# Values that are encoded at a time: their float32 and the few copies beside them stay in the cache.
CHUNK_VALUES = 1 << 18


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
    """Floats [O, I] as symmetric integers with float16 scales.

    Raises:
        ConfigError: int3 or int4, and the compiled encoders are missing.
        CheckpointError: rows that are no whole groups, a value that is not finite, or a scale beyond float16.
    """
    group = form.columns(values.shape[1])
    if form.bits == 8:
        return _encode_int8(values, group)
    rows = values.detach().to(torch.float32).contiguous().numpy()
    try:
        codes, scales = native.encode_groups(rows, form.bits, group, threads=torch.get_num_threads())
    except CheckpointError as error:
        raise CheckpointError(f"a value is not finite, or too large for a scale: {error}") from None
    return Groups(form.bits, torch.from_numpy(codes), torch.from_numpy(scales.view(np.float16)))


def _encode_int8(values: Tensor, group: int) -> Groups:
    """A bounded part at a time."""
    rows, columns = values.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    scales = torch.empty((rows, columns // group), dtype=torch.float16)
    step = max(1, CHUNK_VALUES // columns)
    for low in range(0, rows, step):
        numbers, scales[low : low + step] = int8.encode(values[low : low + step], group)
        # Signed numbers with their highest bit turned over are the same numbers plus 128.
        codes[low : low + step] = numbers.view(torch.uint8) ^ 128
    return Groups(8, codes, scales)
