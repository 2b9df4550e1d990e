"""Rows of values into the bytes of any format that is written: compiled encoders where there are such, else torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.quant import blocks, native

__all__ = ["encode_rows"]


def encode_rows(values: Tensor, name: str) -> Tensor:
    """Values [rows, N] on the CPU as uint8 [rows, bytes]; the bytes are the same whichever encoder made them.

    Raises:
        ConfigError: no such format, or one that only the compiled encoders write (Q2_K to Q6_K), and they are missing.
        CheckpointError: rows that are no whole blocks, or values that the format cannot hold.
    """
    if name in blocks.ENCODED and not (name in native.ENCODERS and native.available()):
        return blocks.encode(values, name)
    rows = values.to(torch.float32).contiguous().numpy()
    return torch.from_numpy(native.encode(rows, name, threads=torch.get_num_threads()))
