"""An adapter for inference: added to dense weights, computed beside packed ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from mixtral.adapters.factors import ATTENTION, EXPERTS, Factors, check_factors, target_of
from mixtral.adapters.merge import merge_into
from mixtral.adapters.modules import AdaptedExperts, AdaptedLinear, Switch
from mixtral.adapters.peft import read_adapter
from mixtral.model.mixtral import Mixtral

__all__ = ["put_to_use", "use_adapter"]

_log = logging.getLogger("mixtral")


def use_adapter(model: Mixtral, path: Path, *, kernels: bool) -> bool:
    """Read an adapter and put it into a model for good; the log says how. See ``put_to_use``.

    Raises:
        CheckpointError: as ``read_adapter``.
    """
    found = read_adapter(path, model.config)
    beside = put_to_use(model, found.factors, kernels=kernels)
    merged = len(found.factors) - beside
    _log.info(
        "adapter %s (%s): %s matrices or stacks added to their weights, %s computed beside packed ones",
        path,
        found.kind,
        merged,
        beside,
    )
    return beside > 0


@torch.no_grad()
def put_to_use(model: Mixtral, factors: Mapping[str, Factors], *, kernels: bool) -> int:
    """Add an adapter to the dense weights of a model, and let its products be computed beside the packed ones, through
    compiled kernels where there are ``kernels`` for these. How many parameters are of the latter kind.

    The products beside are torch's, so with them a row may differ in the last bits with what else is computed.

    Raises:
        CheckpointError: the adapter does not fit the model; nothing was changed.
    """
    check_factors(model.config, factors, source="adapter")
    dense = {name for name, _ in model.named_parameters()}
    here = {name: pair for name, pair in factors.items() if name in dense}
    if here:
        merge_into(model, here)
    switch = Switch(kernels=kernels)
    beside: dict[str, dict[str, Factors]] = {}
    for name in factors.keys() - here.keys():
        a, b, scale = factors[name]
        short = target_of(name) if target_of(name) in EXPERTS else "lora"
        placed = Factors(a.to(model.device), b.to(model.device), scale)
        beside.setdefault(name.rpartition(".")[0], {})[short] = placed
    for module in sorted(beside):
        if module.endswith(".experts"):
            _replace(model, module, AdaptedExperts(model.get_submodule(module), beside[module], switch))
            continue
        # Compiled layers hand the same input to all projections of attention, or to kernels for all.
        for name in (f"{module.rpartition('.')[0]}.{part}_proj" for part in ATTENTION):
            base = model.get_submodule(name)
            if not isinstance(base, AdaptedLinear):
                _replace(model, name, AdaptedLinear(base, beside.get(name, {}), switch))
    return len(factors) - len(here)


def _replace(model: Mixtral, name: str, module: AdaptedExperts | AdaptedLinear) -> None:
    model.set_submodule(name, module.requires_grad_(False).eval())
