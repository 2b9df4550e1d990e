"""Rows of values into the bytes of any format that is written: compiled encoders where there are such, else torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixtral.ops.native import available
from mixtral.quant import blocks, native
from mixtral.quant.native import WEIGHTED

__all__ = ["WEIGHTED", "encode_rows"]


def encode_rows(values: Tensor, name: str, importance: npt.NDArray[np.float32] | None = None) -> Tensor:
    """Values [rows, N] on the CPU as uint8 [rows, bytes]; the bytes are the same whichever encoder made them.

    ``importance`` [N] says how much an error in each column matters; formats that are not ``WEIGHTED`` round to nearest
    and ignore it.

    Raises:
        ConfigError: no such format, or one that only the compiled encoders write (``WEIGHTED``), and they are missing.
        CheckpointError: rows that are no whole blocks, values that the format cannot hold, or importance
            that is not float32 [N], finite and nowhere negative.
    """
    if name in blocks.ENCODED and not (name in native.ENCODERS and available()):
        return blocks.encode(values, name)
    rows = values.detach().to(torch.float32).contiguous().numpy()
    weights = importance if name in WEIGHTED else None
    return torch.from_numpy(native.encode(rows, name, importance=weights, threads=torch.get_num_threads()))
