"""The sparse mixture-of-experts layer (arXiv 2401.04088, section 2.1): a float32 router and stacked experts.

T tokens, D width, F expert hidden size, E experts, A experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.config import MixtralConfig

__all__ = ["Experts", "MixtureOfExperts", "Router"]


class Router(nn.Module):
    """Scores the experts in float32 and picks A of them; its weight stays float32 whatever the model's dtype."""

    def __init__(self, config: MixtralConfig, *, device: torch.device | str | None) -> None:
        super().__init__()
        self.per_token = config.num_experts_per_tok
        shape = (config.num_local_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> ops.Route:
        """Logits of all experts, the chosen ones and their weights."""
        return ops.route(x_TD, self.weight, self.per_token)


class Experts(nn.Module):
    """E SwiGLU networks as two stacked tensors: gate rows first, then up rows, in ``gate_up_proj`` [E, 2F, D]; and
    ``down_proj`` [E, D, F]."""

    def __init__(self, config: MixtralConfig, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        experts, width, hidden = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty((experts, 2 * hidden, width), device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty((experts, width, hidden), device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, route: ops.Route) -> Tensor:
        """Weighted sum of the chosen experts: [T, D]."""
        return ops.experts(x_TD, route.picks_TA, route.weights_TA, self.gate_up_proj, self.down_proj)


class MixtureOfExperts(nn.Module):
    """Router and experts; no token is ever dropped."""

    def __init__(self, config: MixtralConfig, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Router(config, device=device)
        self.experts = Experts(config, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ops.Route]:
        """The layer's output [T, D] and its routing."""
        route = self.gate(x_TD)
        return self.experts(x_TD, route), route
