"""Which rank holds which part of which parameter: one table, and arithmetic on numbers. No tensors, no processes.

Three axes: ``dp`` ranks have documents of their own, ``tp`` ranks share the documents and split the matrices, and the
ranks of ``ep``, which are borrowed from dp (dp = ep * rest), split the experts. Ranks are counted with tp innermost.

D width, F expert hidden size, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError

__all__ = ["Axes", "Place", "Region", "Shapes", "check", "data_dim", "is_owner", "region", "stored_shape"]

Shapes = Mapping[str, tuple[int, ...]]
_MOST = 65_536  # ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """How many ranks each axis has."""

    dp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        """All ranks."""
        return self.dp * self.tp

    @property
    def rest(self) -> int:
        """Ranks that hold the same experts, apart from tp."""
        return self.dp // self.ep

    @classmethod
    def parse(cls, text: str) -> Axes:
        """Read ``dp=4,tp=2,ep=2``; an axis that is not named has one rank.

        Raises:
            ConfigError: an axis is unknown, named twice or not a positive integer, or ep does not divide dp.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            found = re.fullmatch(r"\s*(dp|tp|ep)\s*=\s*([0-9]{1,6})\s*", part)
            if found is None or found[1] in sizes or not 1 <= int(found[2]) <= _MOST:
                raise ConfigError(
                    f"parallel is {text!r}; expected axes dp, tp, ep with a number of ranks each, such as dp=4,tp=2",
                    param="parallel",
                )
            sizes[found[1]] = int(found[2])
        axes = cls(**sizes)
        if axes.dp % axes.ep:
            raise ConfigError(
                f"parallel is {text!r}: ep={axes.ep} does not divide dp={axes.dp}; ranks of ep are borrowed from dp",
                param="parallel",
            )
        return axes

    def places(self) -> Iterator[Place]:
        """The places of ranks 0, 1, ..."""
        return (self.place(rank) for rank in range(self.world))

    def place(self, rank: int) -> Place:
        """Where a rank sits."""
        data, tensor = divmod(rank, self.tp)
        rest, expert = divmod(data, self.ep)
        return Place(data=data, tensor=tensor, expert=expert, rest=rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The index of one rank along every axis; ``data`` is along dp, and ``rest`` and ``expert`` are its two parts."""

    data: int = 0
    tensor: int = 0
    expert: int = 0
    rest: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a tensor of that ``shape``: from ``start``, ``size`` long in every dimension."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """All of it."""
        return cls(shape, (0,) * len(shape), shape)

    def split(self, dim: int, parts: int, index: int) -> Region:
        """One of ``parts`` parts along a dimension: all as long as the first but the last ones, which may be empty."""
        long = -(-self.size[dim] // parts)
        first = min(index * long, self.size[dim])
        length = min(long, self.size[dim] - first)
        start = (*self.start[:dim], self.start[dim] + first, *self.start[dim + 1 :])
        return Region(self.shape, start, (*self.size[:dim], length, *self.size[dim + 1 :]))

    def common(self, other: Region) -> Region | None:
        """What two boxes of one tensor have in common; None if nothing."""
        start = tuple(map(max, self.start, other.start))
        ends = [min(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)]
        size = tuple(end - first for end, first in zip(ends, start, strict=True))
        return Region(self.shape, start, size) if all(length > 0 for length in size) else None

    def within(self, outer: Region) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds the box ``outer`` alone."""
        return tuple(
            slice(first - base, first - base + length)
            for first, base, length in zip(self.start, outer.start, self.size, strict=True)
        )


@dataclass(frozen=True, slots=True)
class _Split:
    """Dimensions, of the stored shape, that tp and ep split; None: all ranks of the axis have the whole."""

    tensor: int | None = None
    expert: int | None = None


# By the end of the name. The matrices that make heads, hidden units and scores go by their output, those that take them
# in by their input, so that a layer needs two sums over tp. What every rank needs whole is not split by tp.
_TABLE: Mapping[str, _Split] = {
    "q_proj.weight": _Split(tensor=0),
    "k_proj.weight": _Split(tensor=0),
    "v_proj.weight": _Split(tensor=0),
    "o_proj.weight": _Split(tensor=1),
    "experts.gate_up_proj": _Split(tensor=2, expert=0),
    "experts.down_proj": _Split(tensor=2, expert=0),
    "lm_head.weight": _Split(tensor=0),
    "embed_tokens.weight": _Split(),
    "norm.weight": _Split(),
    "mlp.gate.weight": _Split(),
}


def check(config: MixtralConfig, axes: Axes) -> None:
    """Refuse axes that do not fit the sizes of a model.

    Raises:
        ConfigError: with the size and the axis to blame.
    """
    tensor = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in tensor.items():
        if size % axes.tp:
            raise ConfigError(f"tp={axes.tp} does not divide {name} {size}; choose another tp", param="parallel")
    experts = config.num_local_experts
    if experts % axes.ep:
        raise ConfigError(f"ep={axes.ep} does not divide num_local_experts {experts}", param="parallel")
    if (experts // axes.ep) % axes.rest and config.hidden_size % axes.rest:
        raise ConfigError(
            f"dp={axes.dp}, ep={axes.ep}: {axes.rest} ranks cannot share {experts // axes.ep} experts of width "
            f"{config.hidden_size} evenly; choose a dp that divides the width",
            param="parallel",
        )


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under which a parameter is split and stored: gate and up rows apart, [E, 2, F, D]."""
    if name.endswith("gate_up_proj"):
        return (shape[0], 2, shape[1] // 2, shape[2])
    return shape


def region(name: str, shape: tuple[int, ...], axes: Axes, place: Place) -> Region:
    """The part of a parameter of the whole model (its ``shape``, not stored) that the rank at ``place`` holds."""
    part = Region.whole(stored_shape(name, shape))
    if axes.world == 1:
        return part
    split = _split_of(name)
    if split.expert is not None:
        part = part.split(split.expert, axes.ep, place.expert)
    if split.tensor is not None:
        part = part.split(split.tensor, axes.tp, place.tensor)
    if _is_router(name):
        return part
    dim = _stored_data_dim(name, shape, axes)
    if split.expert is not None:
        return part.split(dim, axes.rest, place.rest)
    return part.split(dim, axes.dp, place.data)


def data_dim(name: str, shape: tuple[int, ...], axes: Axes) -> int:
    """The dimension of the parameter itself along which data ranks share it."""
    dim = _stored_data_dim(name, shape, axes)
    return dim - 1 if name.endswith("gate_up_proj") and dim else dim


def is_owner(name: str, place: Place) -> bool:
    """Whether this rank, among those that hold the same part, is the one that counts and saves it."""
    return (_split_of(name).tensor is not None or place.tensor == 0) and (not _is_router(name) or place.data == 0)


def _stored_data_dim(name: str, shape: tuple[int, ...], axes: Axes) -> int:
    """Experts go by expert where every rank gets equally many, so that each matrix stays whole; else by width."""
    if _split_of(name).expert is None or (shape[0] // axes.ep) % axes.rest == 0:
        return 0
    return 3 if name.endswith("gate_up_proj") else 1


def _is_router(name: str) -> bool:
    return name.endswith("mlp.gate.weight")


def _split_of(name: str) -> _Split:
    for ending, split in _TABLE.items():
        if name.endswith(ending):
            return split
    raise ConfigError(f"parameter {name!r} is not in the table of the parallel plan", param="parallel")
