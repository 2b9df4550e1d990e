"""Modules in the place of those of the model that add low-rank products to them. The base is never trained or changed.

T tokens, D width, O values out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.adapters.factors import Factors
from mixtral.adapters.frozen import packed_linear, stacks_of
from mixtral.model.mixtral import Linear
from mixtral.model.moe import Experts, Router
from mixtral.quant.modules import PackedExperts, PackedLinear

__all__ = ["BASES", "Adapted", "AdaptedExperts", "AdaptedLinear", "AdaptedRouter", "Switch"]


@dataclass(slots=True)
class Switch:
    """What all adapted modules of a model share: whether they add anything, how much of the input they leave out while
    gradients are computed in training mode, and whether packed matrices go through compiled kernels that have them,
    which have no backward pass."""

    on: bool = True
    dropout: float = 0.0
    kernels: bool = False


class Adapted(nn.Module):
    """A base and the parameters of the pairs by name."""

    def __init__(self, base: nn.Module, pairs: Mapping[str, Factors], switch: Switch) -> None:
        super().__init__()
        self.base, self._switch = base, switch
        self._scales = {name: pair.scale for name, pair in pairs.items()}
        for name, pair in pairs.items():
            self.register_parameter(f"{name}_a", nn.Parameter(pair.a))
            self.register_parameter(f"{name}_b", nn.Parameter(pair.b))

    def factors(self, name: str) -> Factors:
        """The pair of that name as it is now."""
        return Factors(self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b"), self._scales[name])

    def _pair(self, name: str, dtype: torch.dtype) -> ops.Pair | None:
        if not self._switch.on or name not in self._scales:
            return None
        a, b, scale = self.factors(name)
        return ops.Pair(a.to(dtype), b.to(dtype), scale)

    def _dropout(self) -> float:
        return self._switch.dropout if self.training and torch.is_grad_enabled() else 0.0


class AdaptedLinear(Adapted):
    """A ``Linear`` or ``PackedLinear``, perhaps with the pair ``lora``."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """``x @ (weight + scale b a).T`` without making that sum: [T, O]."""
        out_TO = self._product(x_TD)
        pair = self._pair("lora", x_TD.dtype)
        if pair is None:
            return out_TO
        dropout = self._dropout()
        kept_TD = nn.functional.dropout(x_TD, dropout) if dropout else x_TD
        narrow_TR = ops.linear(kept_TD, pair.a_ERI) * pair.scale
        return out_TO + ops.linear(narrow_TR, pair.b_EOR).to(out_TO.dtype)

    def _product(self, x_TD: Tensor) -> Tensor:
        base = self.base
        if isinstance(base, PackedLinear) and not self._switch.kernels:
            return packed_linear(x_TD, base.packed)
        if isinstance(base, Linear):  # beside packed ones it may get float32
            x_TD = x_TD.to(base.weight.dtype)
        out_TO: Tensor = base(x_TD)
        return out_TO


class AdaptedRouter(Adapted):
    """A ``Router`` with the pair ``lora``. Its matrix is tiny, so here the sum is made, in float32."""

    def forward(self, x_TD: Tensor) -> ops.Route:
        """As in ``Router``."""
        base = self.base
        assert isinstance(base, Router)
        pair = self._pair("lora", torch.float32)
        weight_ED = base.weight if pair is None else base.weight + pair.scale * (pair.b_EOR @ pair.a_ERI)
        return ops.route(x_TD, weight_ED, base.per_token)


class AdaptedExperts(Adapted):
    """``Experts`` or ``PackedExperts``, perhaps with the pairs ``gate_up`` and ``down``."""

    def forward(self, x_TD: Tensor, route: ops.Route) -> Tensor:
        """As in ``Experts``."""
        base = self.base
        gate_up: Tensor | ops.Stacked
        down: Tensor | ops.Stacked
        if isinstance(base, Experts):
            gate_up, down = base.gate_up_proj, base.down_proj
        else:
            assert isinstance(base, PackedExperts)
            gate_up, down = stacks_of(base, kernels=self._switch.kernels)
        pairs = (self._pair("gate_up", x_TD.dtype), self._pair("down", x_TD.dtype))
        dropout = self._dropout() if self._switch.on else 0.0
        return ops.experts(x_TD, route.picks_TA, route.weights_TA, gate_up, down, pairs=pairs, dropout=dropout)


# What each adapted module may stand for.
BASES: Mapping[type[Adapted], tuple[type[nn.Module], ...]] = {
    AdaptedLinear: (Linear, PackedLinear),
    AdaptedRouter: (Router,),
    AdaptedExperts: (Experts, PackedExperts),
}
