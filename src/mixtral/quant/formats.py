"""The GGML number formats: how many values a block holds and in how many bytes (ggml's ``ggml-common.h``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixtral.errors import CheckpointError

__all__ = ["BY_ID", "FORMATS", "Format"]


@dataclass(frozen=True, slots=True)
class Format:
    """One format: its name, its number in GGUF files, and the values and bytes of one block (1 value: no blocks).

    ``halves`` are the bytes of a block where its float16 scales begin; empty if it has none, or they are spread.
    """

    name: str
    id: int
    values: int
    bytes: int
    halves: tuple[int, ...] = ()

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.bytes / self.values

    def size_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape, whose last dimension is the one that blocks run along.

        Raises:
            CheckpointError: the last dimension is not a multiple of the block.
        """
        width = shape[-1] if shape else 1
        if width % self.values:
            raise CheckpointError(
                f"{self.name} packs {self.values} values of a row into a block; a row of {list(shape)} has {width:,}"
            )
        return math.prod(shape) // self.values * self.bytes


FORMATS: Mapping[str, Format] = {
    name: Format(name, number, values, size, tuple(halves))
    for name, number, values, size, *halves in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18, 0),
        ("Q4_1", 3, 32, 20, 0, 2),
        ("Q5_0", 6, 32, 22, 0),
        ("Q5_1", 7, 32, 24, 0, 2),
        ("Q8_0", 8, 32, 34, 0),
        ("Q2_K", 10, 256, 84, 80, 82),
        ("Q3_K", 11, 256, 110, 108),
        ("Q4_K", 12, 256, 144, 0, 2),
        ("Q5_K", 13, 256, 176, 0, 2),
        ("Q6_K", 14, 256, 210, 208),
        ("IQ2_XXS", 16, 256, 66, 0),
        ("IQ2_XS", 17, 256, 74, 0),
        ("IQ3_XXS", 18, 256, 98, 0),
        ("IQ1_S", 19, 256, 50, 0),
        ("IQ4_NL", 20, 32, 18, 0),
        ("IQ3_S", 21, 256, 110, 0),
        ("IQ2_S", 22, 256, 82, 0),
        ("IQ4_XS", 23, 256, 136, 0),
        ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2),
        ("MXFP4", 39, 32, 17),
    )
}
BY_ID: Mapping[int, Format] = {item.id: item for item in FORMATS.values()}
