"""Starting values, for pretraining and for random test models."""

from __future__ import annotations

import math

import torch

from mixtral.model.mixtral import Mixtral

__all__ = ["initialise"]


def initialise(model: Mixtral, *, seed: int, std: float = 0.02) -> None:
    """Truncated normal values (cut at 3 sigma), output projections smaller by sqrt(2 L), norms 1 (arXiv 2409.02060).

    The same seed gives the same values on every device and for every dtype, up to that dtype's rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = std / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            scale = residual if "o_proj" in name or "down_proj" in name else std
            values = torch.empty(parameter.shape, dtype=torch.float32)
            torch.nn.init.trunc_normal_(values, std=scale, a=-3 * scale, b=3 * scale, generator=generator)
            parameter.copy_(values)
