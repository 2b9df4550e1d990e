"""Low-rank adapters (LoRA, arXiv 2106.09685) over dense or packed weights: put into a model and taken out again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixtral.adapters.attached import Attached, check_layers
from mixtral.adapters.factors import EXPERTS, Factors, LoraConfig, check_factors, new_factors, target_of
from mixtral.adapters.modules import BASES, Adapted, Switch
from mixtral.errors import ConfigError
from mixtral.model.mixtral import Linear, Mixtral
from mixtral.model.moe import Experts
from mixtral.quant.modules import PackedExperts, PackedLinear

__all__ = ["Adapter", "LoraConfig", "attach", "attach_factors", "expert_bytes"]

_log = logging.getLogger("mixtral")


class Adapter(Attached):
    """What ``attach`` put into a model: its parameters, a switch, and the way back.

    The parameters are float32 (or wider, as the model), and computed with in the dtype of the activations.
    """

    def __init__(self, model: Mixtral, dropout: float) -> None:
        super().__init__(model)
        self._switch = Switch(dropout=dropout)
        self._places: dict[str, tuple[str, str]] = {}  # parameter of the base -> module, pair in it

    def factors(self) -> dict[str, Factors]:
        """Copies of the present values, by the parameter that they are added to."""
        found = {}
        for parameter, (module, pair) in self._places.items():
            a, b, scale = _adapted(self.model, module).factors(pair)
            found[parameter] = Factors(a.detach().clone(), b.detach().clone(), scale)
        return found

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what its base does."""
        before, self._switch.on = self._switch.on, False
        try:
            yield
        finally:
            self._switch.on = before

    def detach(self) -> None:
        """Put the base back as it was; the values are gone, unless ``factors`` were taken."""
        super().detach()
        self._places = {}

    def _wrap(self, name: str, kind: type[nn.Module], factors: Mapping[str, Factors]) -> None:
        """Put an adapted module in the place of the one of that name; ``factors`` by parameter."""
        base = self.model.get_submodule(name)
        pairs = {}
        for parameter, pair in factors.items():
            target = target_of(parameter)
            short = target if target in EXPERTS else "lora"
            pairs[short] = pair
            self.names += [f"{name}.{short}_a", f"{name}.{short}_b"]
            self._places[parameter] = (name, short)
        self.replace(name, _KINDS[kind](base, pairs, self._switch))

    def _decode_head(self) -> None:
        """A dense head in the place of a packed one: a loss over the vocabulary reads it whole, and often."""
        head = self.model.lm_head
        if isinstance(head, PackedLinear):
            rows, width = head.packed.shape
            dense = Linear(width, rows, device="meta", dtype=self.model.dtype)
            dense.weight = nn.Parameter(head.packed.decode(self.model.dtype), requires_grad=False)
            self.replace("lm_head", dense)


_KINDS: Mapping[type[nn.Module], type[Adapted]] = {base: kind for kind, bases in BASES.items() for base in bases}


def attach(model: Mixtral, config: LoraConfig) -> Adapter:
    """Put new low-rank pairs into a model, which adds nothing as yet, and freeze everything else.

    The base may be dense or packed. Packed matrices are decoded in panels where they are used, forward and backward;
    a packed head is decoded once, for the loss reads it whole.

    Raises:
        ConfigError: the model is on compiled kernels, or adapted already.
    """
    dtype = torch.promote_types(model.dtype, torch.float32)
    return _attach(model, new_factors(model.config, config, dtype), config.dropout)


def attach_factors(model: Mixtral, factors: Mapping[str, Factors], *, dropout: float = 0.0) -> Adapter:
    """As ``attach``, with values that are there already, which are copied.

    Raises:
        CheckpointError: they do not fit the model.
    """
    check_factors(model.config, factors, source="adapter")
    dtype = torch.promote_types(model.dtype, torch.float32)
    own = {name: Factors(a.to(dtype, copy=True), b.to(dtype, copy=True), s) for name, (a, b, s) in factors.items()}
    return _attach(model, own, dropout)


def _attach(model: Mixtral, factors: Mapping[str, Factors], dropout: float) -> Adapter:
    check_layers(model)
    by_module: dict[str, dict[str, Factors]] = {}
    for parameter, pair in factors.items():
        placed = Factors(pair.a.to(model.device), pair.b.to(model.device), pair.scale)
        by_module.setdefault(parameter.rpartition(".")[0], {})[parameter] = placed
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and isinstance(module, PackedLinear | PackedExperts):
            by_module.setdefault(name, {})  # gradients must flow through it
    for name in by_module:
        _check_base(model, name)
    adapter = Adapter(model, dropout)
    for name, some in by_module.items():
        adapter._wrap(name, type(model.get_submodule(name)), some)
    adapter._decode_head()
    table = adapter.table()
    numbers = sum(one.numbers for one in table)
    _log.info("adapter: %s tensors, %s numbers; experts take %.2f bytes each", len(table), numbers, expert_bytes(model))
    return adapter


def _check_base(model: Mixtral, name: str) -> None:
    kind = type(model.get_submodule(name))
    if kind not in _KINDS:
        expected = ", ".join(sorted(base.__name__ for base in _KINDS))
        raise ConfigError(f"{name} is a {kind.__name__}; expected one of {expected}. Detach an adapter before another")


def _adapted(model: Mixtral, module: str) -> Adapted:
    found = model.get_submodule(module)
    assert isinstance(found, Adapted)
    return found


def expert_bytes(model: Mixtral) -> float:
    """Bytes in memory per number of the experts, without adapters: 2 for bfloat16, about 0.56 for int4 in groups of 32.

    Raises:
        ConfigError: no experts were found.
    """
    size, count = 0, 0
    for module in model.modules():
        if isinstance(module, Experts):
            tensors: list[Tensor] = [module.gate_up_proj, module.down_proj]
            size += sum(tensor.nbytes for tensor in tensors)
            count += sum(tensor.numel() for tensor in tensors)
        elif isinstance(module, PackedExperts):
            packed = [one for three in module.matrices() for one in three]
            size += sum(one.size_bytes for one in packed)
            count += sum(one.shape[0] * one.shape[1] for one in packed)
    if not count:
        raise ConfigError("the model holds no experts that could be counted")
    return size / count
