"""An adapter as data: for some of our parameters, two thin matrices and a scale. Knows no modules and no files.

R rank, I values in, O values out, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.weights.names import DOWN, GATE_UP, ROUTER, parameter_shapes

__all__ = ["ATTENTION", "EXPERTS", "TARGETS", "Factors", "LoraConfig", "check_factors", "new_factors", "target_of"]

ATTENTION = ("q", "k", "v", "o")
EXPERTS = ("gate_up", "down")
TARGETS: Mapping[str, str] = {
    **{name: f"model.layers.{{l}}.self_attn.{name}_proj.weight" for name in ATTENTION},
    "gate_up": GATE_UP,
    "down": DOWN,
    "router": ROUTER,
}
"""What can be adapted -> our parameter."""


class Factors(NamedTuple):
    """What is added to a parameter: ``scale * b @ a``, with a [R, I] and b [O, R]; of stacked experts a [E, R, I] and
    b [E, O, R]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Values between a and b."""
        return self.a.shape[-2]

    def product(self, expert: int | None = None) -> Tensor:
        """What is added to the parameter, or to the matrix of one expert: float32 [O, I], or wider."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        dtype = torch.promote_types(a.dtype, torch.float32)
        return (b.to(dtype) @ a.to(dtype)).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Which matrices get low-rank additions, and of what kind.

    The scale of an addition is ``alpha / rank``, or with ``rslora`` ``alpha / sqrt(rank)`` (arXiv 2312.03732), with the
    rank that its matrix has: ``expert_rank`` for experts (default: ``rank``), at most the number of experts for the
    router. ``dropout`` is the share of inputs of the additions that are left out in training. ``seed`` decides the
    first values.

    Raises:
        ConfigError: a value is out of range, or a target is unknown.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (*ATTENTION, *EXPERTS)
    expert_rank: int | None = None
    dropout: float = 0.0
    rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("expert_rank", self.expert_rank)):
            if value is not None and (type(value) is not int or not 1 <= value <= 4096):
                raise ConfigError(f"{name} is {value!r}; expected 1 to 4096", param=name)
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha is {self.alpha!r}; expected a number above 0", param="alpha")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout is {self.dropout!r}; expected 0 or more and less than 1", param="dropout")
        names = list(self.targets) if isinstance(self.targets, tuple | list) else []
        if not names or not all(name in TARGETS for name in names) or len(set(names)) != len(names):
            raise ConfigError(
                f"targets are {self.targets!r:.200}; expected some of {', '.join(TARGETS)}, each once", param="targets"
            )
        object.__setattr__(self, "targets", tuple(names))
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}; expected 0 to 2**63 - 1", param="seed")

    def rank_of(self, target: str, config: MixtralConfig) -> int:
        """The rank of the addition to a target."""
        if target == "router":
            return min(self.rank, config.num_local_experts)
        return (self.expert_rank or self.rank) if target in EXPERTS else self.rank

    def scale_of(self, rank: int) -> float:
        """The scale of an addition of that rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def target_of(parameter: str) -> str:
    """The target that a parameter is; an empty string if it can have no addition."""
    for target, pattern in TARGETS.items():
        start, end = pattern.split("{l}")
        if parameter.startswith(start) and parameter.endswith(end) and parameter[len(start) : -len(end)].isdecimal():
            return target
    return ""


def new_factors(config: MixtralConfig, lora: LoraConfig, dtype: torch.dtype) -> dict[str, Factors]:
    """First values: a uniform within ``1 / sqrt(I)``, b zero, so that nothing is added. The seed decides them alone."""
    generator = torch.Generator().manual_seed(lora.seed)
    found: dict[str, Factors] = {}
    for parameter, shape in parameter_shapes(config).items():
        target = target_of(parameter)
        if target not in lora.targets:
            continue
        *stack, out, width = shape
        rank = lora.rank_of(target, config)
        a = (torch.rand((*stack, rank, width), generator=generator) * 2 - 1) / math.sqrt(width)
        found[parameter] = Factors(a.to(dtype), torch.zeros((*stack, out, rank), dtype=dtype), lora.scale_of(rank))
    return found


def check_factors(config: MixtralConfig, factors: Mapping[str, Factors], *, source: str) -> None:
    """Refuse an adapter of another model.

    Raises:
        CheckpointError: a parameter is not one of the model's or can have no addition, shapes do not fit, a value is
            not finite, or there is nothing at all.
    """
    if not factors:
        raise CheckpointError(f"{source}: holds no adapter; expected additions to {_listed(TARGETS.values())}")
    shapes = parameter_shapes(config)
    for parameter, (a, b, scale) in factors.items():
        shape = shapes.get(parameter)
        if shape is None or not target_of(parameter):
            raise CheckpointError(f"{source}: adapts {parameter!r}, which this model lacks; it belongs to another base")
        *stack, out, width = shape
        rank = a.shape[-2] if a.dim() > 1 else 0
        if rank < 1 or tuple(a.shape) != (*stack, rank, width) or tuple(b.shape) != (*stack, out, rank):
            raise CheckpointError(
                f"{source}: {parameter!r} is {list(shape)} in this model, but the adapter has a {list(a.shape)} and b "
                f"{list(b.shape)}; expected {[*stack, 'rank', width]} and {[*stack, out, 'rank']}: it belongs to "
                "another base"
            )
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all()) and math.isfinite(scale)):
            raise CheckpointError(f"{source}: a value for {parameter!r} is not finite; the adapter is damaged")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
