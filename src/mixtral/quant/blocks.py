"""The plain GGML formats and those of 32 values per block: decoded and encoded in torch (ggml's ``ggml-quants.c``).

Shapes: N blocks, S bytes of a block, V values of a block. A decoder takes uint8 [N, S] and fills float32 [N, V], on any
device; its operations are those of the reference, in the same order, so that every bit agrees. A block of 32 starts
with its float16 scale (and, in the ``_1`` formats, its minimum); byte i of the quants holds value i in its low half and
value i + 16 in its high half. ``Q5`` formats keep the fifth bits apart: bit i of 32, least significant first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.formats import FORMATS

__all__ = [
    "BLOCK_DECODERS",
    "ENCODED",
    "IQ4_VALUES",
    "Decoder",
    "encode",
    "halves_at",
    "look_up",
    "reinterpret",
    "tiles",
]

Decoder = Callable[[Tensor, Tensor], None]

# The values that the sixteen codes of IQ4_NL and IQ4_XS stand for, before the scale.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of the 4-bit float e2m1; the halving is in the scale. Code 8 is a plain zero.
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_ENCODE_VALUES = 1 << 20
_SOURCES = (torch.float32, torch.float16, torch.bfloat16)


def reinterpret(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes (uint8 [..., n]) as numbers of ``dtype``, [..., n / size]; copied if they are apart or not aligned."""
    size = dtype.itemsize
    flat = data.reshape(-1)
    if flat.storage_offset() % size or flat.data_ptr() % size:
        flat = flat.clone()
    return flat.view(dtype).view(*data.shape[:-1], data.shape[-1] // size)


def halves_at(blocks: Tensor, start: int, count: int) -> Tensor:
    """``count`` float16 numbers from byte ``start`` of each block, as float32 [N, count]."""
    return reinterpret(blocks[:, start : start + 2 * count], torch.float16).float()


def look_up(codes: Tensor, values: tuple[int, ...], out: Tensor) -> None:
    """Fill ``out`` (float32, contiguous) with the values that the codes (uint8, as many) stand for."""
    table = torch.tensor(values, dtype=torch.float32, device=out.device)
    torch.index_select(table, 0, codes.reshape(-1).int(), out=out.view(-1))


def tiles(source: Tensor, target: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two tensors of like leading dimensions, [..., S] and [..., V], into views of at most ``limit`` blocks.

    The pieces come in order, as [n, S] and [n, V]. Of ``source`` only a piece is copied, where its strides ask for it;
    ``target`` must be contiguous.
    """
    if source.shape[:-1].numel() <= limit:
        yield source.reshape(-1, source.shape[-1]), target.view(-1, target.shape[-1])
        return
    step = limit // source.shape[1:-1].numel()
    for start in range(0, len(source), max(1, step)):
        if step:
            yield from tiles(source[start : start + step], target[start : start + step], limit)
        else:
            yield from tiles(source[start], target[start], limit)


def _halves(packed: Tensor) -> Tensor:
    """The low halves of each block's bytes and then the high ones: uint8 [N, n] -> [N, 2 n]."""
    return torch.cat((packed & 15, packed >> 4), 1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Spread uint8 [N, 4] to [N, 32]: 16 where the bit is set, else 0."""
    every = torch.arange(256, dtype=torch.int32, device=packed.device)[:, None]
    bits = (every >> torch.arange(8, dtype=torch.int32, device=packed.device) & 1) << 4
    # One look-up of eight bytes for each byte, in place of eight shifts of it.
    table = bits.to(torch.uint8).view(torch.int64).view(-1)
    return table.index_select(0, packed.reshape(-1).int()).view(torch.uint8).view(-1, 32)


def _decode_f32(blocks: Tensor, out: Tensor) -> None:
    out.copy_(reinterpret(blocks, torch.float32))


def _decode_f16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(reinterpret(blocks, torch.float16))


def _decode_bf16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(reinterpret(blocks, torch.bfloat16))


def _decode_q4_0(blocks: Tensor, out: Tensor) -> None:
    codes = _halves(blocks[:, 2:]).view(torch.int8)
    out.copy_(codes.sub_(8)).mul_(halves_at(blocks, 0, 1))


def _decode_q4_1(blocks: Tensor, out: Tensor) -> None:
    factors = halves_at(blocks, 0, 2)
    out.copy_(_halves(blocks[:, 4:])).mul_(factors[:, :1]).add_(factors[:, 1:])


def _decode_q5_0(blocks: Tensor, out: Tensor) -> None:
    codes = _halves(blocks[:, 6:]).bitwise_or_(_fifth_bits(blocks[:, 2:6])).view(torch.int8)
    out.copy_(codes.sub_(16)).mul_(halves_at(blocks, 0, 1))


def _decode_q5_1(blocks: Tensor, out: Tensor) -> None:
    factors = halves_at(blocks, 0, 2)
    codes = _halves(blocks[:, 8:]).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    out.copy_(codes).mul_(factors[:, :1]).add_(factors[:, 1:])


def _decode_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(halves_at(blocks, 0, 1))


def _decode_iq4_nl(blocks: Tensor, out: Tensor) -> None:
    look_up(_halves(blocks[:, 2:]), IQ4_VALUES, out)
    out.mul_(halves_at(blocks, 0, 1))


def _decode_mxfp4(blocks: Tensor, out: Tensor) -> None:
    look_up(_halves(blocks[:, 1:]), _E2M1_DOUBLED, out)
    # The scale is 2^(e - 128), made from its bits: below e = 2 it is a subnormal number.
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    out.mul_(bits.view(torch.float32))


BLOCK_DECODERS: Mapping[str, Decoder] = {
    "F32": _decode_f32,
    "F16": _decode_f16,
    "BF16": _decode_bf16,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q8_0": _decode_q8_0,
    "IQ4_NL": _decode_iq4_nl,
    "MXFP4": _decode_mxfp4,
}


def encode(values: Tensor, name: str) -> Tensor:
    """Values [..., n] (float32, float16 or bfloat16, any device) as uint8 [..., row bytes] of one of ``ENCODED``.

    Bit for bit what ``gguf.quants.quantize`` writes. ``F16`` and ``BF16`` round to nearest, ties to even, and keep
    infinities and NaN. Works through pieces of a million values. Errors count rows over all leading dimensions.

    Raises:
        ConfigError: an unknown or unwritten format, another dtype, no dimension, or a tensor without values (meta).
        CheckpointError: a row that is no multiple of the block; for a block format, a value that is not finite or a
            scale beyond float16; for F16, a finite value beyond its range.
    """
    if name not in ENCODED:
        raise ConfigError(f"{name!r} cannot be written as plain blocks; expected one of {', '.join(ENCODED)}")
    if values.dtype not in _SOURCES or values.dim() == 0 or values.device.type == "meta":
        raise ConfigError(
            f"encode takes rows of float32, float16 or bfloat16 that are in memory; got {values.dtype} "
            f"{list(values.shape)} on {values.device}"
        )
    kind = FORMATS[name]
    kind.size_bytes(values.shape)
    count = values.shape[-1] // kind.values
    out = torch.empty((*values.shape[:-1], count * kind.bytes), dtype=torch.uint8, device=values.device)
    if out.numel() == 0:
        return out
    done = 0
    source = values.detach().view(*values.shape[:-1], count, kind.values)
    places = out.view(*values.shape[:-1], count, kind.bytes)
    for piece, place in tiles(source, places, _ENCODE_VALUES // kind.values):
        found = piece.float().contiguous()
        encoded = (_encode_scaled if name in _SCALED else _encode_plain)(found, name, done, values.shape)
        place.view(encoded.dtype).copy_(encoded)
        done += found.numel()
    return out


def _encode_scaled(values: Tensor, name: str, done: int, shape: torch.Size) -> Tensor:
    scales, codes = _SCALED[name](values)
    halves = scales.half()
    if not bool(halves.isfinite().all()):
        _refuse(~values.isfinite(), values, done, shape, f"{name} holds finite numbers only; the weights are damaged")
        beyond = (~halves.isfinite()).any(1, keepdim=True).expand_as(values)
        why = f"in a block of {name} whose scale or minimum is beyond the range of float16; keep the tensor as F32"
        _refuse(beyond, values, done, shape, why)
    return torch.cat((halves.view(torch.uint8), codes.view(torch.uint8)), 1)


def _encode_plain(values: Tensor, name: str, done: int, shape: torch.Size) -> Tensor:
    if name == "F16":
        halves = values.half()
        beyond = halves.isinf() & values.isfinite()
        _refuse(beyond, values, done, shape, "beyond the range of F16 (65504); keep the tensor as BF16 or F32")
        return halves
    return _to_bf16(values) if name == "BF16" else values


def _refuse(wrong: Tensor, values: Tensor, done: int, shape: torch.Size, why: str) -> None:
    """Raise for the first value marked in ``wrong``, if any; ``done`` values of the tensor came before this piece."""
    first = int(wrong.reshape(-1).to(torch.uint8).argmax())
    if bool(wrong.reshape(-1)[first]):
        row, column = divmod(done + first, shape[-1])
        number = float(values.reshape(-1)[first])
        raise CheckpointError(f"row {row:,}, column {column:,} of {list(shape)}: {number:g}: {why}")


def _to_bf16(values: Tensor) -> Tensor:
    """The int16 bits of float32 numbers as bfloat16. A NaN keeps its upper bits and becomes quiet."""
    bits = values.view(torch.int32)
    even = bits + (0x7FFF + (bits >> 16 & 1))
    return (torch.where(values.isnan(), bits | 0x00400000, even) >> 16).to(torch.int16)


def _divide(numbers: Tensor, by: float) -> Tensor:
    # A divisor in a tensor: some devices multiply by the rounded inverse of a plain number, which changes the last bit.
    return numbers / torch.full_like(numbers, by)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where there is no finite inverse: for 0, and below 3e-39."""
    inverse = scale.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0)


def _codes(shifted: Tensor, highest: int, scale: Tensor, inverse: Tensor) -> Tensor:
    """Cut the fractions off: int8 [N, 32] in 0 .. highest."""
    codes = shifted.to(torch.int8).clamp_(max=highest)
    # The reference turns the products with an infinite inverse into code 0; the stored scale is zero in any case.
    return codes.masked_fill_((inverse == 0) & (scale != 0), 0)


def _pack_halves(codes: Tensor) -> Tensor:
    return (codes[:, :16] & 15) | (codes[:, 16:] << 4)


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    # Eight bytes of 0 or 1 as one number: the product has bit 8 i moved to 56 + i, for all i, and no two bits collide.
    bytes_in_words = (codes >> 4).view(torch.int64)
    return ((bytes_in_words * 0x0102040810204080) >> 56).to(torch.int8)


def _centred(values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and codes where the value farthest from zero gets the code 0, which stands for -``steps``."""
    farthest = values.gather(1, values.abs().argmax(1, keepdim=True))
    scale = _divide(farthest, -steps)
    inverse = _inverse(scale)
    return scale, _codes((values * inverse).add_(steps + 0.5), 2 * steps - 1, scale, inverse)


def _spanned(values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum, and codes 0 .. ``steps`` from the smallest value to the largest."""
    # By its place, not as a minimum: of zeros of both signs, the first one counts.
    low = values.gather(1, values.argmin(1, keepdim=True))
    scale = _divide(values.amax(1, keepdim=True) - low, steps)
    inverse = _inverse(scale)
    codes = _codes((values - low).mul_(inverse).add_(0.5), steps, scale, inverse)
    return torch.cat((scale, low), 1), codes


def _encode_q4_1(values: Tensor) -> tuple[Tensor, Tensor]:
    scales, codes = _spanned(values, 15)
    return scales, _pack_halves(codes)


def _encode_q5_0(values: Tensor) -> tuple[Tensor, Tensor]:
    scale, codes = _centred(values, 16)
    return scale, torch.cat((_pack_fifth_bits(codes), _pack_halves(codes)), 1)


def _encode_q5_1(values: Tensor) -> tuple[Tensor, Tensor]:
    scales, codes = _spanned(values, 31)
    return scales, torch.cat((_pack_fifth_bits(codes), _pack_halves(codes)), 1)


def _encode_q8_0(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = _divide(values.abs().amax(1, keepdim=True), 127)
    scaled = values * _inverse(scale)
    # To nearest, halves away from zero. Adding 0.5 and cutting off would round 0.49999997 up.
    size = scaled.abs()
    whole = size.floor()
    rounded = whole + size.sub_(whole).mul_(2).floor_()
    return scale, rounded.copysign_(scaled).to(torch.int8)


# Format -> float32 [N, 32] to its float32 scales and the bytes (int8) that follow them.
_SCALED: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q8_0": _encode_q8_0,
}
ENCODED = ("F32", "F16", "BF16", *_SCALED)
