"""Health of the routers in training: how even the load is, experts that starve, and drift from the start's choices.

L layers, E experts, T tokens, A experts per token.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixtral.model import Batch, Documents, Mixtral

__all__ = ["ALARM_LOAD", "ALARM_STEPS", "Probe", "RouterHealth", "picks_of"]

ALARM_LOAD = 0.05  # of the load of balance
ALARM_STEPS = 100


class RouterHealth:
    """Counts, for every expert, the steps in a row in which it had less than ``ALARM_LOAD`` of its even share."""

    def __init__(self, layers: int, experts: int) -> None:
        self.starving_LE = torch.zeros((layers, experts), dtype=torch.int64)

    def update(self, step: int, loads_LE: Tensor) -> dict[str, Any]:
        """Take in the loads of a step (1 is even); its figures by their names in ``StepReport``.

        Warns:
            UserWarning: an expert has starved for ``ALARM_STEPS`` steps; once, until it has recovered.
        """
        loads_LE = loads_LE.cpu()
        self.starving_LE = torch.where(loads_LE < ALARM_LOAD, self.starving_LE + 1, 0)
        for layer, expert in (self.starving_LE == ALARM_STEPS).nonzero().tolist():
            warnings.warn(
                f"step {step}: expert {expert} of layer {layer} had less than {ALARM_LOAD:.0%} of an even load for "
                f"{ALARM_STEPS} steps: the router is collapsing, or this text does not need it. Raise balance_coef or "
                "z_coef, lower learning_rate, or train an adapter, which leaves the router alone",
                stacklevel=3,
            )
        shares_LE = loads_LE.double() / loads_LE.shape[1]
        entropy_L = -torch.special.xlogy(shares_LE, shares_LE).sum(-1) / math.log(max(2, loads_LE.shape[1]))
        return {
            "load_max": float(loads_LE.max()),
            "load_min": float(loads_LE.min()),
            "entropy": float(entropy_L.mean()),
            "max_violation": float(loads_LE.max()) - 1,
            "dead": int((loads_LE == 0).sum()),
            "collapsed": int((self.starving_LE >= ALARM_STEPS).sum()),
        }


@torch.no_grad()
def picks_of(model: Mixtral, inputs_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The experts chosen for every token of whole documents: int16 [L, T, A]."""
    context = Documents(lengths, device=model.device)
    routes = model(Batch(inputs_T.to(model.device), context.positions_T, context)).routes
    return torch.stack([route.picks_TA for route in routes]).to("cpu", torch.int16)


class Probe:
    """A fixed batch on which the routers' choices are compared with those at the start of the run."""

    def __init__(self, inputs_T: Tensor, lengths: tuple[int, ...]) -> None:
        self._inputs_T, self._lengths = inputs_T, lengths
        self.start_LTA = torch.empty(0, dtype=torch.int16)
        self.agreement = 1.0

    def begin(self, model: Mixtral) -> None:
        """Take the present choices for those of the start."""
        self.start_LTA = picks_of(model, self._inputs_T, self._lengths)

    def measure(self, model: Mixtral) -> float:
        """The part of the choices that are among the start's for the same token; also kept as ``agreement``."""
        now_LTA = picks_of(model, self._inputs_T, self._lengths)
        self.agreement = float((now_LTA[..., :, None] == self.start_LTA[..., None, :]).any(-1).double().mean())
        return self.agreement

    def resume(self, tensors: Mapping[str, Tensor], agreement: float) -> bool:
        """Take over the start's choices from a state; False if they are not of this batch."""
        found = tensors.get("probe.picks")
        if found is None or found.shape[1] != self._inputs_T.numel():
            return False
        self.start_LTA, self.agreement = found, agreement
        return True
