"""What the ranks compute in the tests: each job gets the mesh first and returns plain values and tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.model import Batch, Documents, Mixtral, initial_values, initialise
from mixtral.ops import head_cross_entropy
from mixtral.parallel.head import split_cross_entropy
from mixtral.parallel.mesh import Mesh
from mixtral.parallel.plan import Region
from mixtral.parallel.shards import Shards, build, local_part

CONFIG = MixtralConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=512,
)
LENGTHS = (9, 30, 5, 17, 22, 8, 3, 40)
Parts = list[tuple[Tensor, Tensor, Tensor, tuple[int, ...]]]


def documents(seed: int = 5) -> Parts:
    """Inputs, labels, weights and length of documents; the labels and weights are random too."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in LENGTHS:
        ids = torch.randint(0, CONFIG.vocab_size - 1, (2, length), generator=generator)
        found.append((ids[0], ids[1], torch.rand(length, generator=generator), (length,)))
    return found


def together(parts: Parts) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    inputs, labels, weights, lengths = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(labels), torch.cat(weights), tuple(n for one in lengths for n in one)


def loss_of(model: Mixtral, parts: Parts, total: float, shards: Shards | None = None) -> Tensor:
    """Cross entropy and a term that reaches the router's logits, both divided by the step's ``total``."""
    inputs, labels, weights, lengths = together(parts)
    context = Documents(lengths)
    out = model(Batch(inputs, context.positions_T, context))
    if shards is None or shards.head is None:
        loss, _ = head_cross_entropy(out.hidden_TD, model.lm_head.weight, labels, weights / total, copies_of_last=7)
    else:
        loss, _ = split_cross_entropy(
            out.hidden_TD, model.lm_head.weight, labels, weights / total, part=shards.head, copies_of_last=7
        )
    z = sum(route.logits_TE.logsumexp(-1).square().sum() for route in out.routes)
    return loss + 0.01 * z / total


def reference(std: float = 0.2, favour: int | None = None) -> Mixtral:
    """One process, the whole model."""
    model = Mixtral(CONFIG)
    initialise(model, seed=1, std=std)
    if favour is not None:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.copy_(favoured(layer.mlp.gate.weight, favour))
    return model


def favoured(weight: Tensor, count: int) -> Tensor:
    """A router's weight by which all tokens choose among the first ``count`` experts."""
    changed = weight.clone()
    changed[count:] = changed[:1] * torch.linspace(0.5, 0.9, weight.shape[0] - count)[:, None]
    return changed


def fill(shards: Shards, model: Mixtral) -> None:
    shards.fill((name, parameter.detach()) for name, parameter in model.named_parameters())


def gradients_of(shards: Shards) -> dict[str, Tensor]:
    found = {}
    for name, part in shards.parts.items():
        assert part.grad is not None, name
        found[name] = local_part(part.grad).clone()
    shards.add_replicas(found)
    return found


def worst(shards: Shards, found: dict[str, Tensor], model: Mixtral) -> dict[str, float]:
    """Largest difference from the whole model's gradients, relative to the largest gradient of the parameter."""
    result = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        where = shards.regions[name]
        wanted = parameter.grad.reshape(where.shape)[where.within(Region.whole(where.shape))]
        difference = (found[name].reshape(where.size) - wanted).abs()
        result[name] = float(difference.max() / parameter.grad.abs().max()) if difference.numel() else 0.0
    return result


def norm_of(model: Mixtral) -> float:
    return (
        float(torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum())
        ** 0.5
    )


def parity(mesh: Mesh, favour: int | None = None, micro_batches: int = 1) -> tuple[float, dict[str, float], float]:
    """Relative errors of a step's loss, of every gradient and of the gradient's norm against one process."""
    whole = reference(favour=favour)
    parts = documents()
    total = float(sum(part[2].double().sum() for part in parts))
    expected = loss_of(whole, parts, total)
    expected.backward()
    shards = build(CONFIG, mesh, dtype=torch.float32)
    fill(shards, whole)
    own = parts[mesh.place.data :: mesh.axes.dp]
    loss = torch.zeros(())
    size = len(own) // micro_batches
    sums: dict[str, Tensor] = {}
    for start in range(0, len(own), size):
        part = loss_of(shards.model, own[start : start + size], total, shards)
        part.backward()
        loss += part.detach()
    sums = gradients_of(shards)
    loss = mesh.sum(loss, "dp")
    norm, wanted = shards.norm(sums), norm_of(whole)
    return float(loss / expected.detach() - 1), worst(shards, sums, whole), norm / wanted - 1


def values_of(mesh: Mesh) -> int:
    """How many numbers this rank holds."""
    shards = build(CONFIG, mesh, dtype=torch.float32)
    shards.fill(initial_values(Mixtral(CONFIG, device="meta"), seed=1))
    return sum(local_part(part).numel() for part in shards.parts.values())
