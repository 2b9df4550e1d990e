"""Small unsigned numbers, packed without gaps: number i of a row lies at bit ``i * bits`` of the row's bytes.

The lowest bit comes first. GPTQ and compressed-tensors pack the same way into 32-bit words, which in a little-endian
file are these bytes, for every number of bits, 3 included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.errors import CheckpointError

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, uint8 [..., N], as uint8 [..., N * bits / 8].

    Raises:
        CheckpointError: N is no multiple of 8, which every matrix of a Mixtral is.
    """
    _check(numbers.shape[-1], 8, "numbers")
    if bits == 8:
        return numbers
    if bits == 4:
        return numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8).long()
    words = (eights << _starts(bits, numbers.device)).sum(-1, keepdim=True)
    return (words >> _bytes(bits, numbers.device)).bitwise_and_(255).to(torch.uint8).flatten(-2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 [..., n] as numbers below 2^bits, uint8 [..., n * 8 / bits].

    Raises:
        CheckpointError: n is no multiple of ``bits``.
    """
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    _check(packed.shape[-1], bits, "bytes")
    words = (packed.reshape(*packed.shape[:-1], -1, bits).long() << _bytes(bits, packed.device)).sum(-1, keepdim=True)
    return (words >> _starts(bits, packed.device)).bitwise_and_((1 << bits) - 1).to(torch.uint8).flatten(-2)


def _starts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(8, device=device) * bits


def _bytes(bits: int, device: torch.device) -> Tensor:
    return torch.arange(bits, device=device) * 8


def _check(count: int, multiple: int, what: str) -> None:
    if count % multiple:
        raise CheckpointError(f"packed integers: a row of {count:,} {what} is no multiple of {multiple}")
