"""Adapters that a model has beside its base, each under a name, for requests that choose one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from mixtral.adapters.factors import Factors, target_of
from mixtral.adapters.layer import AdaptedLayer, LayerPairs
from mixtral.adapters.peft import read_adapter
from mixtral.adapters.rows import Rows, hook_adapter
from mixtral.compiled.layers import CompiledLayer
from mixtral.errors import CheckpointError, ConfigError
from mixtral.model.mixtral import Mixtral
from mixtral.weights.names import layer_of

__all__ = ["NamedAdapter", "NamedAdapters", "add_adapters", "check_name"]

_log = logging.getLogger("mixtral")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """Where an adapter came from, by the last part of the path, and how much memory it takes."""

    root: str
    size_bytes: int


class NamedAdapters:
    """The adapters of one model. What ``chosen`` says counts for what the model computes meanwhile."""

    def __init__(self, model: Mixtral) -> None:
        self.known: dict[str, NamedAdapter] = {}
        self.rows = Rows()
        self._device = model.device

    def chosen(self, pieces: Iterable[tuple[str | None, int]]) -> AbstractContextManager[None]:
        """Inside, the rows of a batch are these ``pieces``: for each the name of its adapter, and how many rows it has.

        Raises:
            KeyError: there is no adapter of that name.
        """
        numbers: dict[str | None, int | None] = {name: number for number, name in enumerate(self.known)}
        numbers[None] = None
        return self.rows.chosen([(numbers[name], count) for name, count in pieces], self._device)


def check_name(name: str, base: str) -> None:
    """Raise ConfigError for what cannot be the name of an adapter of a model that is called ``base``."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the adapter name {name!r:.140} is not usable; expected 1 to 128 letters, digits, '.', '_' or '-', "
            "the first one a letter or digit",
            param="adapter",
        )
    if name == base:
        raise ConfigError(f"the adapter {name!r} has the name of the model; choose another one", param="adapter")


def add_adapters(model: Mixtral, paths: Mapping[str, str | Path]) -> NamedAdapters:
    """Read adapters and put them beside a model, which stays as it is; by default no row of a batch has any. On
    compiled kernels they are float32, elsewhere of the model's dtype.

    Raises:
        CheckpointError: as ``read_adapter``; the message names the adapter.
    """
    found = NamedAdapters(model)
    layers: dict[int, dict[int, LayerPairs]] = {}
    for number, (name, path) in enumerate(paths.items()):
        try:
            file = read_adapter(Path(path), model.config)
        except CheckpointError as error:
            raise CheckpointError(f"adapter {name!r}: {error}", param="adapter") from error
        compiled = isinstance(model.model.layers[0], CompiledLayer)
        if compiled:
            for layer, pairs in _by_layer(file.factors).items():
                layers.setdefault(layer, {})[number] = LayerPairs(pairs)
        else:
            hook_adapter(model, file.factors, number, found.rows)
        size = _size_bytes(file.factors, torch.float32 if compiled else model.dtype)
        found.known[name] = NamedAdapter(Path(path).absolute().name, size)
        _log.info("adapter %s (%s, %s): %s pairs, %s bytes", name, path, file.kind, len(file.factors), size)
    for layer, by_adapter in layers.items():
        before = model.model.layers[layer]
        assert isinstance(before, CompiledLayer)
        model.model.layers[layer] = AdaptedLayer(before, by_adapter, found.rows)
    return found


def _by_layer(factors: Mapping[str, Factors]) -> dict[int, dict[str, Factors]]:
    """The same by number of the layer, and target."""
    found: dict[int, dict[str, Factors]] = {}
    for name, pair in factors.items():
        found.setdefault(layer_of(name), {})[target_of(name)] = pair
    return found


def _size_bytes(factors: Mapping[str, Factors], dtype: torch.dtype) -> int:
    return sum((pair.a.numel() + pair.b.numel()) * dtype.itemsize for pair in factors.values())
