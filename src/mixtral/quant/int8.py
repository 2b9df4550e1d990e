"""int8 in groups along the last dimension, one fp16 scale per group; in groups of 32 the values of GGML's Q8_0."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.errors import CheckpointError

__all__ = ["GROUP", "decode", "encode"]

GROUP = 32
_TOP = 127.0


def encode(values: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """``[..., N]`` floats -> int8 ``[..., N]`` and fp16 scales ``[..., N / group]``.

    The quotient uses the fp32 scale, the file the scale rounded to fp16, and halves are rounded away from zero, all as
    GGML does, so that an export to Q8_0 changes nothing.

    Raises:
        CheckpointError: the last dimension is no multiple of the group, a value is not finite, or a scale exceeds fp16.
    """
    if values.ndim == 0 or values.shape[-1] % group:
        raise CheckpointError(
            f"int8 groups of {group}: the last dimension of {list(values.shape)} is no multiple of it"
        )
    groups = _grouped(values.detach().float(), group)
    scale = groups.abs().amax(-1) / _TOP
    stored = scale.to(torch.float16)
    if not bool(stored.isfinite().all()):
        raise CheckpointError("int8 groups: a value is not finite, or too large for an fp16 scale")
    # A zero or tiny scale has no finite reciprocal; its fp16 form is 0, so the group decodes to zeros either way.
    inverse = scale.reciprocal()
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    return _round_half_away(groups * inverse.unsqueeze(-1)).to(torch.int8).flatten(-2), stored


def decode(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 ``[..., N]`` and fp16 ``[..., N / 32]`` -> ``[..., N]``; exact in fp32, then converted to ``dtype``.

    Raises:
        CheckpointError: the shapes do not belong together.
    """
    if codes.shape[-1:] != (scales.shape[-1] * GROUP,) or codes.shape[:-1] != scales.shape[:-1]:
        raise CheckpointError(f"int8 groups: codes {list(codes.shape)} do not fit scales {list(scales.shape)}")
    groups = _grouped(codes.float()) * scales.float().unsqueeze(-1)
    return groups.flatten(-2).to(dtype)


def _grouped(values: Tensor, group: int = GROUP) -> Tensor:
    return values.reshape(*values.shape[:-1], -1, group)


def _round_half_away(values: Tensor) -> Tensor:
    whole = values.trunc()
    return whole + ((values - whole).abs() >= 0.5).to(values.dtype) * values.sign()
