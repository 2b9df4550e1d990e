"""Which rows of a batch have which of several adapters, and a model without compiled kernels that follows it.

T tokens, N rows of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.adapters.factors import EXPERTS, Factors, target_of
from mixtral.adapters.modules import AdaptedExperts, AdaptedRouter, Switch
from mixtral.model.mixtral import Mixtral
from mixtral.model.moe import Router

__all__ = ["Rows", "hook_adapter"]


class Rows:
    """Which rows of the batch that is computed have which adapter, by its number; by default none has any."""

    def __init__(self) -> None:
        self.groups: tuple[tuple[int, Tensor], ...] = ()

    @contextmanager
    def chosen(self, pieces: Iterable[tuple[int | None, int]], device: torch.device) -> Iterator[None]:
        """Inside, the rows of a batch are these ``pieces``: for each its adapter, and how many rows it has."""
        ranges: dict[int, list[Tensor]] = {}
        start = 0
        for adapter, count in pieces:
            if adapter is not None:
                ranges.setdefault(adapter, []).append(torch.arange(start, start + count, device=device))
            start += count
        self.groups = tuple((adapter, torch.cat(found)) for adapter, found in ranges.items())
        try:
            yield
        finally:
            self.groups = ()


def hook_adapter(model: Mixtral, factors: Mapping[str, Factors], number: int, rows: Rows) -> None:
    """Let a model without compiled kernels add an adapter to the rows that have it.

    The base is computed for all rows, by the same operations as without adapters; where a product cannot be added
    afterwards (router and experts), the rows of the adapter are computed anew.
    """
    by_module: dict[str, dict[str, Factors]] = {}
    for name, (a, b, scale) in factors.items():
        target = target_of(name)
        dtype = torch.float32 if target == "router" else model.dtype  # in which they are computed with
        placed = Factors(a.to(model.device, dtype), b.to(model.device, dtype), scale)
        by_module.setdefault(name.rpartition(".")[0], {})[target if target in EXPERTS else "lora"] = placed
    for name, pairs in by_module.items():
        module = model.get_submodule(name)
        module.register_forward_hook(_Hook(_adapted(module, pairs), number, rows))


class _Added:
    """What a pair adds to the output of a matrix."""

    def __init__(self, pair: Factors) -> None:
        self._pair = pair

    def __call__(self, out_NO: Tensor, x_NI: Tensor) -> Tensor:
        a, b, scale = self._pair
        return out_NO + ops.linear(ops.linear(x_NI, a.to(x_NI.dtype)) * scale, b.to(x_NI.dtype)).to(out_NO.dtype)


class _Anew:
    """The output of an adapted module in the place of that of its base."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module.requires_grad_(False).eval()

    def __call__(self, out: Any, *inputs: Any) -> Any:
        return self._module(*inputs)


def _adapted(base: nn.Module, pairs: Mapping[str, Factors]) -> _Added | _Anew:
    if isinstance(base, Router):
        return _Anew(AdaptedRouter(base, pairs, Switch()))
    if "lora" in pairs:
        return _Added(pairs["lora"])
    return _Anew(AdaptedExperts(base, pairs, Switch()))


class _Hook:
    """Called after a module: changes the rows of its output that have one adapter."""

    def __init__(self, adapted: _Added | _Anew, number: int, rows: Rows) -> None:
        self._adapted, self._number, self._rows = adapted, number, rows

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        for number, index in self._rows.groups:
            if number == self._number:
                found = self._adapted(_rows(output, index), *(_rows(one, index) for one in inputs))
                return _with_rows(output, index, found)
        return output


def _rows(value: Any, index: Tensor) -> Any:
    """Some rows of a tensor, or of all tensors of a routing."""
    if isinstance(value, ops.Route):
        return ops.Route(*(part[index] for part in value))
    return value[index]


def _with_rows(value: Any, index: Tensor, found: Any) -> Any:
    if isinstance(value, ops.Route):
        pairs = zip(value, found, strict=True)
        return ops.Route(*(part.index_copy(0, index, new.to(part.dtype)) for part, new in pairs))
    return value.index_copy(0, index, found.to(value.dtype))
