"""The GGML formats with codebooks, IQ1 to IQ4_XS: read, never written. IQ4_XS in torch, the others by ``gguf``.

The codebooks of the others hold up to 2,048 rows of eight values that follow no rule; the ``gguf`` package has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mixtral.quant.blocks import IQ4_VALUES, Decoder, halves_at, look_up, reinterpret

__all__ = ["RARE_DECODERS"]


def _decode_by_gguf(name: str, blocks: Tensor, out: Tensor) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    # As one row: the package works through sixteen rows at a time, in Python.
    flat = blocks.cpu().reshape(-1).numpy()
    # A damaged scale gives infinities and NaN here as it does in the other formats, without a warning.
    with np.errstate(all="ignore"):
        values = dequantize(flat, GGMLQuantizationType[name])
    out.copy_(torch.from_numpy(values).view_as(out))


def _decode_iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """uint8 [N, 136] -> float32 [N, 256]: eight groups of 32 codes with a 6-bit scale each, less 32."""
    device = blocks.device
    halves = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).view(-1, 8)
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=device)
    tops = (reinterpret(blocks[:, 2:4], torch.int16).int() >> shifts) & 3
    small = (halves.int() | tops << 4) - 32
    scales = halves_at(blocks, 0, 1) * small.float()
    packed = blocks[:, 8:].view(-1, 8, 16)
    look_up(torch.stack((packed & 15, packed >> 4), 2), IQ4_VALUES, out)
    out.view(-1, 8, 32).mul_(scales[:, :, None])


_BY_GGUF = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
RARE_DECODERS: Mapping[str, Decoder] = {
    **{name: partial(_decode_by_gguf, name) for name in _BY_GGUF},
    "IQ4_XS": _decode_iq4_xs,
}
