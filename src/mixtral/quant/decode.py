"""Blocks of any GGML format to numbers, in bounded memory: the same bits as ``gguf.quants.dequantize``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.blocks import BLOCK_DECODERS, Decoder, tiles
from mixtral.quant.formats import FORMATS
from mixtral.quant.kquants import K_DECODERS
from mixtral.quant.rare import RARE_DECODERS

__all__ = ["CHUNK_VALUES", "all_finite", "decode", "decode_into"]

# Values that are decoded at a time: 8 MB of float32 stay in the cache between the passes over them.
CHUNK_VALUES = 1 << 21
_DECODERS: Mapping[str, Decoder] = {**BLOCK_DECODERS, **K_DECODERS, **RARE_DECODERS}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def decode(data: Tensor, name: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of uint8 [..., row bytes] in the format ``name`` of ``FORMATS``: ``dtype`` [..., row values].

    Computed in float32 on the device of ``data``, then cast; beside the result it takes the memory of some million
    values. A scale that is infinite or NaN gives what the arithmetic gives, and a cast to float16 may overflow:
    finite numbers are the caller's to check.

    Raises:
        ConfigError: an unknown format, ``data`` that is not uint8 or is on the meta device, or ``dtype`` is no float.
        CheckpointError: a row that is not a whole number of blocks.
    """
    shape = _checked_shape(data, name)
    if dtype not in _DTYPES:
        raise ConfigError(f"cannot decode to {dtype}; expected one of {_told(_DTYPES)}")
    out = torch.empty(shape, dtype=dtype, device=data.device)
    decode_into(data, name, out)
    return out


def decode_into(data: Tensor, name: str, out: Tensor) -> None:
    """As ``decode``, into ``out``: a contiguous float tensor [..., row values], on any device.

    The bytes go to the device of ``out`` piece by piece and are decoded there. Checks come before the first write.

    Raises:
        ConfigError, CheckpointError: as ``decode``; or ``out`` has another shape, is not contiguous or no float.
    """
    shape = _checked_shape(data, name)
    if out.dtype not in _DTYPES or out.device.type == "meta":
        raise ConfigError(f"cannot decode into {out.dtype} on {out.device}; expected memory of {_told(_DTYPES)}")
    if tuple(out.shape) != shape or not out.is_contiguous():
        how = "" if out.is_contiguous() else ", not contiguous"
        raise ConfigError(
            f"{name} rows of {list(data.shape)} bytes decode to a contiguous {list(shape)}; got {list(out.shape)}{how}"
        )
    if out.numel() == 0:
        return
    kind, decoder = FORMATS[name], _DECODERS[name]
    count = shape[-1] // kind.values
    limit = CHUNK_VALUES // kind.values
    blocks = data.view(*data.shape[:-1], count, kind.bytes)
    target = out.detach().view(*data.shape[:-1], count, kind.values)
    scratch = None
    if out.dtype != torch.float32:
        rows = min(limit, target.shape[:-1].numel())
        scratch = torch.empty((rows, kind.values), dtype=torch.float32, device=out.device)
    for piece, place in tiles(blocks, target, limit):
        found = piece.to(out.device)
        if scratch is None:
            decoder(found, place)
        else:
            part = scratch[: len(found)]
            decoder(found, part)
            place.copy_(part)


def all_finite(data: Tensor, name: str) -> bool:
    """Whether all values of uint8 [rows, row bytes] in a format are numbers; of most formats only the scales are read.

    Raises:
        ConfigError, CheckpointError: as ``decode``.
    """
    _checked_shape(data, name)
    kind = FORMATS[name]
    if kind.halves:
        blocks = data.reshape(-1, kind.bytes)
        # The byte with sign, exponent and two more bits of a half.
        return not any(bool(((blocks[:, at + 1] & 0x7C) == 0x7C).any()) for at in kind.halves)
    step = max(1, CHUNK_VALUES * kind.bytes // (kind.values * max(1, data.shape[-1])))
    return all(bool(decode(part, name).isfinite().all()) for part in torch.split(data, step))


def _checked_shape(data: Tensor, name: str) -> tuple[int, ...]:
    """The shape of the values, after the arguments were checked."""
    if name not in _DECODERS:
        raise ConfigError(f"unknown number format {name!r}; expected one of {', '.join(_DECODERS)}")
    if data.dtype != torch.uint8 or data.dim() == 0 or data.device.type == "meta":
        raise ConfigError(
            f"{name} is decoded from rows of uint8 that are in memory; got {data.dtype} {list(data.shape)} "
            f"on {data.device}"
        )
    kind = FORMATS[name]
    if data.shape[-1] % kind.bytes:
        raise CheckpointError(
            f"{name} keeps {kind.values} values in {kind.bytes} bytes, but a row has {data.shape[-1]:,} bytes, "
            "which is not a whole number of blocks; the tensor is cut off or of another format"
        )
    return (*data.shape[:-1], data.shape[-1] // kind.bytes * kind.values)


def _told(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
