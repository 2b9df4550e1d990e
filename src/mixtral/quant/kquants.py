"""The GGML formats of 256 values per block, Q2_K to Q6_K: decoded in torch (the structs of ggml's ``ggml-common.h``).

Shapes: N blocks. A decoder takes uint8 [N, bytes of a block] and fills float32 [N, 256], on any device, with the
operations of the reference in their order. A block is cut into groups of 16 or 32 values, each with a small integer
scale (and minimum), which one float16 scale of the block (and one of the minimums) multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixtral.quant.blocks import Decoder, halves_at, reinterpret

__all__ = ["K_DECODERS"]


def _fields(packed: Tensor, groups: int, bits: int) -> Tensor:
    """Fields of ``bits`` bits, lowest first, of uint8 [N, groups * n]: uint8 [N, groups, 8 / bits, n]."""
    lots = packed.contiguous().view(len(packed), groups, -1)
    return torch.stack([lots >> shift for shift in range(0, 8, bits)], 2).bitwise_and_((1 << bits) - 1)


def _scale(out: Tensor, codes: Tensor, scales: Tensor, minimums: Tensor | None = None) -> None:
    """``out`` [N, 256] = scales [N, groups] * codes (uint8 or int8, 256 a block) - minimums [N, groups]."""
    out.copy_(codes.view(-1, 256))
    grouped = out.view(len(out), scales.shape[1], -1)
    grouped.mul_(scales[:, :, None])
    if minimums is not None:
        grouped.sub_(minimums[:, :, None])


def _decode_q2_k(blocks: Tensor, out: Tensor) -> None:
    packed, factors = blocks[:, :16], halves_at(blocks, 80, 2)
    scales, minimums = factors[:, :1] * (packed & 15).float(), factors[:, 1:] * (packed >> 4).float()
    _scale(out, _fields(blocks[:, 16:80], 2, 2), scales, minimums)


def _decode_q3_k(blocks: Tensor, out: Tensor) -> None:
    # Group i: the low four bits of its scale are in half i // 8 of byte i % 8, the high two in field i // 4 of byte
    # 8 + i % 4.
    low, high = _fields(blocks[:, 96:104], 1, 4), _fields(blocks[:, 104:108], 1, 2)
    small = low.view(-1, 16).bitwise_or_(high.view(-1, 16) << 4).view(torch.int8).sub_(32)
    codes = _fields(blocks[:, 32:96], 2, 2).view(-1, 256)
    # A mask bit that is set takes nothing off; one that is clear takes off 4.
    codes.bitwise_or_(_fields(blocks[:, :32], 1, 1).view(-1, 256).bitwise_left_shift_(2))
    _scale(out, codes.view(torch.int8).sub_(4), halves_at(blocks, 108, 1) * small.float())


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of the eight groups of a Q4_K or Q5_K block, each float32 [N, 8].

    Bytes 4 to 15 hold sixteen 6-bit numbers: scales 0-3 and minimums 0-3 in the low six bits of the first eight bytes,
    the low four bits of scales and minimums 4-7 in the halves of the last four, whose high bits are on top of the first
    eight.
    """
    first, second, last = reinterpret(blocks[:, 4:16], torch.int32).unbind(1)
    words = (
        first & 0x3F3F3F3F,
        (last & 0x0F0F0F0F) | ((first >> 2) & 0x30303030),
        second & 0x3F3F3F3F,
        ((last >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030),
    )
    small = torch.stack(words, 1).view(torch.uint8).view(-1, 2, 8)
    both = small.float().mul_(halves_at(blocks, 0, 2)[:, :, None])
    return both[:, 0], both[:, 1]


def _decode_q4_k(blocks: Tensor, out: Tensor) -> None:
    _scale(out, _fields(blocks[:, 16:], 4, 4), *_scales_and_minimums(blocks))


def _decode_q5_k(blocks: Tensor, out: Tensor) -> None:
    codes = _fields(blocks[:, 48:], 4, 4).view(-1, 256)
    codes.bitwise_or_(_fields(blocks[:, 16:48], 1, 1).view(-1, 256).bitwise_left_shift_(4))
    _scale(out, codes, *_scales_and_minimums(blocks))


def _decode_q6_k(blocks: Tensor, out: Tensor) -> None:
    codes = _fields(blocks[:, :128], 2, 4).view(-1, 256)
    codes.bitwise_or_(_fields(blocks[:, 128:192], 2, 2).view(-1, 256).bitwise_left_shift_(4))
    small = blocks[:, 192:208].view(torch.int8).float()
    _scale(out, codes.view(torch.int8).sub_(32), halves_at(blocks, 208, 1) * small)


K_DECODERS: Mapping[str, Decoder] = {
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
}
