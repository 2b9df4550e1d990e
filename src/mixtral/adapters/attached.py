"""Modules that are put into a model for training and taken out again, and the list of what is trained meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from mixtral.errors import ConfigError
from mixtral.model.mixtral import DecoderLayer, Mixtral

__all__ = ["Attached", "Trained", "check_layers"]


class Trained(NamedTuple):
    """A tensor that is trained, and how many numbers it has."""

    name: str
    shape: tuple[int, ...]
    numbers: int


class Attached:
    """Freezes a model, and keeps what was put into it, what stood there before, and ``names`` of what is trained."""

    def __init__(self, model: Mixtral) -> None:
        self.model = model
        self.names: list[str] = []
        self._wanted_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._bases: dict[str, nn.Module] = {}
        model.requires_grad_(False)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of the one of that name."""
        base = self.model.get_submodule(name)
        self.model.set_submodule(name, module.train(base.training))
        self._bases[name] = base

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters, by their names in the model."""
        for name in self.names:
            yield name, self.model.get_parameter(name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters."""
        for _, parameter in self.named_parameters():
            yield parameter

    def table(self) -> list[Trained]:
        """The trained tensors."""
        return [Trained(name, tuple(value.shape), value.numel()) for name, value in self.named_parameters()]

    def detach(self) -> None:
        """Put back the modules of the model, and which of its parameters want gradients."""
        for name, base in self._bases.items():
            self.model.set_submodule(name, base.train(self.model.training))
        for name, wanted in self._wanted_grad.items():
            self.model.get_parameter(name).requires_grad_(wanted)
        self._bases, self.names = {}, []


def check_layers(model: Mixtral) -> None:
    """Refuse a model that cannot be trained.

    Raises:
        ConfigError: it is on compiled kernels.
    """
    for number, layer in enumerate(model.model.layers):
        if type(layer) is not DecoderLayer:
            raise ConfigError(
                f"layer {number} is a {type(layer).__name__}, which runs on compiled kernels and has no backward pass; "
                "load the model with reference=True"
            )
