"""Starting values, for pretraining and for random test models."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mixtral.model.mixtral import Mixtral

__all__ = ["initial_values", "initialise"]


def initialise(model: Mixtral, *, seed: int, std: float = 0.02) -> None:
    """Truncated normal values (cut at 3 sigma), output projections smaller by sqrt(2 L), norms 1 (arXiv 2409.02060).

    The same seed gives the same values on every device and for every dtype, up to that dtype's rounding.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in initial_values(model, seed=seed, std=std):
            parameters[name].copy_(values)


def initial_values(model: Mixtral, *, seed: int, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
    """The same values, float32 on the CPU, one parameter at a time; of ``model`` only names and shapes are used."""
    generator = torch.Generator().manual_seed(seed)
    residual = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        if name.endswith("norm.weight"):
            yield name, values.fill_(1.0)
            continue
        scale = residual if "o_proj" in name or "down_proj" in name else std
        yield name, torch.nn.init.trunc_normal_(values, std=scale, a=-3 * scale, b=3 * scale, generator=generator)
