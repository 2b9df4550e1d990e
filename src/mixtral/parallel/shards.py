"""A model spread over the ranks of a mesh: built without memory, cut by the plan, filled piece by piece.

Data parallelism is FSDP2: a data rank has a part of every parameter, the parts are brought together for the layer that
needs them, and gradients are added (never averaged) into the parts. Routers stay whole and float32 on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mixtral.config import MixtralConfig
from mixtral.model import Mixtral, Output
from mixtral.model.mixtral import DecoderLayer, Linear
from mixtral.model.moe import Experts
from mixtral.parallel.expert import SplitExperts
from mixtral.parallel.head import HeadPart
from mixtral.parallel.mesh import Mesh
from mixtral.parallel.plan import Place, Region, Shapes, check, data_dim, is_owner, region
from mixtral.parallel.tensor import TensorAttention, TensorMixture

__all__ = ["Shards", "build", "local_part", "shapes_of"]


@dataclass(frozen=True, slots=True)
class Shards:
    """A model in parts. ``model`` is used like any other; ``parts`` are this rank's float32 values, to be changed in
    place; ``regions`` tell where they lie in the whole; ``owned`` are those this rank counts and saves."""

    model: Mixtral
    mesh: Mesh
    shapes: Shapes
    parts: Mapping[str, nn.Parameter]
    regions: Mapping[str, Region]
    owned: frozenset[str]
    head: HeadPart | None

    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Take this rank's part of every whole parameter."""
        self.forget_whole()
        with torch.no_grad():
            for name, whole in values:
                own, where = local_part(self.parts[name]), self.regions[name]
                stored = whole.view(where.shape)
                own.copy_(stored[where.within(Region.whole(where.shape))].reshape(own.shape))

    def forget_whole(self) -> None:
        """Before parts are written: what a forward pass without gradients brought together is of the old values."""
        cast(FSDPModule, self.model).reshard()

    def add_replicas(self, gradients: Mapping[str, Tensor]) -> None:
        """Finish gradients that FSDP has not: routers are added over data ranks, and what several ranks of tp hold
        alike becomes alike to the bit, in place.

        Every rank of tp has the whole gradient of such a parameter, so it is the mean that is taken: kernels whose sums
        depend on timing would otherwise let the copies drift apart, and with them the choice of experts.
        """
        axes = self.mesh.axes
        for name, gradient in gradients.items():
            if name.endswith("mlp.gate.weight"):
                gradient.copy_(self.mesh.sum(gradient)).div_(axes.tp)
            elif axes.tp > 1 and self._is_copied(name):
                gradient.copy_(self.mesh.sum(gradient, "tp")).div_(axes.tp)

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The length of the whole gradient, the same on every rank: each number is counted once, by its owner."""
        squares = torch.zeros((), dtype=torch.float64)
        for name, gradient in gradients.items():  # in their order: that of a set is another one in every process
            if name in self.owned:
                squares += float(gradient.square().sum())
        return math.sqrt(float(self.mesh.sum(squares)))

    def _is_copied(self, name: str) -> bool:
        """Whether all ranks of tp have this parameter alike: then the second of them does not own it."""
        return not is_owner(name, Place(tensor=1))


def build(config: MixtralConfig, mesh: Mesh, *, dtype: torch.dtype) -> Shards:
    """A model over all ranks of a mesh, its values not yet set. ``dtype`` is that of the products; values are float32.

    Raises:
        ConfigError: the axes do not fit the sizes.
    """
    check(config, mesh.axes)
    shapes = shapes_of(config)
    model = Mixtral(config, device="meta", dtype=torch.float32)
    head = _cut(model, mesh, shapes)
    # The names and parts as FSDP leaves them, before a forward pass puts whole parameters in their places.
    _shard(model, mesh, shapes, dtype)
    model.to_empty(device=mesh.device)
    parts = dict(model.named_parameters())
    regions = {name: region(name, shape, mesh.axes, mesh.place) for name, shape in shapes.items()}
    for name, part in parts.items():
        if local_part(part).numel() != math.prod(regions[name].size):
            raise RuntimeError(f"{name}: torch gave {local_part(part).shape}; the plan expects {regions[name]}")
    owned = frozenset(name for name in parts if is_owner(name, mesh.place))
    return Shards(model, mesh, shapes, parts, regions, owned, head)


def shapes_of(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a whole model."""
    model = Mixtral(config, device="meta", dtype=torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def local_part(parameter: Tensor) -> Tensor:
    """The values that are on this rank, as a plain tensor that shares their memory."""
    with torch.no_grad():
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _cut(model: Mixtral, mesh: Mesh, shapes: Shapes) -> HeadPart | None:
    """Put in the places of a layer's modules those that compute a rank's share."""
    axes, config = mesh.axes, model.config
    options: dict[str, Any] = {"device": torch.device("meta"), "dtype": torch.float32}
    hidden = config.intermediate_size // axes.tp
    for number, layer in enumerate(_layers(model)):
        if axes.ep > 1:
            layer.mlp.experts = SplitExperts(config, mesh.group("ep"), hidden, **options)
        elif axes.tp > 1:
            layer.mlp.experts = Experts(config.replace(intermediate_size=hidden), **options)
        if axes.tp > 1:
            layer.self_attn = TensorAttention(config, number, mesh.group("tp"), **options)
            layer.mlp = TensorMixture(layer.mlp.gate, layer.mlp.experts, mesh.group("tp"))
    if axes.tp == 1:
        return None
    rows = Region.whole(shapes["lm_head.weight"]).split(0, axes.tp, mesh.place.tensor)
    model.lm_head = Linear(config.hidden_size, rows.size[0], **options)
    return HeadPart(mesh.group("tp"), config.vocab_size, rows.start[0], rows.size[0])


def _shard(model: Mixtral, mesh: Mesh, shapes: Shapes, dtype: torch.dtype) -> None:
    if Output not in torch.utils._pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Output)  # FSDP looks for the tensors that gradients come in by
    dims = {id(parameter): data_dim(name, shapes[name], mesh.axes) for name, parameter in model.named_parameters()}
    routers: set[nn.Parameter] = {layer.mlp.gate.weight for layer in _layers(model)}
    # Angles are float32 and stay so: only parameters change their dtype.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(dims[id(parameter)])

    def spread(module: nn.Module, axis: str) -> None:
        spread_module = fully_shard(
            module,
            mesh=mesh.submesh(axis),
            mp_policy=precision,
            ignored_params=routers,
            shard_placement_fn=cast(Callable[[nn.Parameter], Shard | None], place),
        )
        assert isinstance(spread_module, FSDPModule)
        # A loss is divided by counts of the whole step, so gradients are sums. The second call: gloo has no scaled sum.
        spread_module.set_gradient_divide_factor(1.0)
        spread_module.set_force_sum_reduction_for_comms(True)

    for layer in _layers(model):
        if mesh.axes.ep > 1:
            spread(layer.mlp.experts, "rest")
        spread(layer, "dp")
    spread(model, "dp")


def _layers(model: Mixtral) -> Iterator[DecoderLayer]:
    return (cast(DecoderLayer, layer) for layer in model.model.layers)
