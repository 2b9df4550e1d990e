"""What the ranks compute in the tests: each job gets the mesh first and returns plain values and tensors."""

from __future__ import annotations

import contextlib
import os
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mixtral import ops
from mixtral.config import MixtralConfig
from mixtral.model import Batch, Documents, Mixtral, initial_values, initialise
from mixtral.ops import Route, head_cross_entropy
from mixtral.parallel import tensor
from mixtral.parallel.expert import SplitExperts
from mixtral.parallel.head import HeadPart, split_cross_entropy
from mixtral.parallel.matrices import Matrices
from mixtral.parallel.mesh import Mesh
from mixtral.parallel.plan import Region
from mixtral.parallel.shards import Shards, build, local_part
from mixtral.train.config import OptimConfig
from mixtral.train.optim import Optimizer

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


def head(mesh: Mesh, rows: int, tokens: int) -> tuple[float, float, float, float]:
    """Errors of loss, log-probabilities and both gradients of the split cross entropy."""
    generator = torch.Generator().manual_seed(rows)
    hidden, head_RD = torch.randn((tokens, 16), generator=generator), torch.randn((rows, 16), generator=generator)
    labels, weights = (
        torch.randint(0, rows - 1, (tokens,), generator=generator),
        torch.rand(tokens, generator=generator),
    )
    wholes = [value.clone().requires_grad_() for value in (hidden, head_RD)]
    expected, logprobs = head_cross_entropy(wholes[0], wholes[1], labels, weights, copies_of_last=9)
    (2 * expected).backward()
    box = Region.whole((rows, 16)).split(0, mesh.axes.tp, mesh.place.tensor)
    part = HeadPart(mesh.group("tp"), rows, box.start[0], box.size[0])
    own = [hidden.clone().requires_grad_(), head_RD[box.within(Region.whole(box.shape))].clone().requires_grad_()]
    loss, found = split_cross_entropy(own[0], own[1], labels, weights, part=part, copies_of_last=9)
    (2 * loss).backward()
    rows_grad = own[1].grad
    assert own[0].grad is not None
    assert wholes[0].grad is not None
    assert wholes[1].grad is not None
    assert rows_grad is not None
    mine = wholes[1].grad[box.within(Region.whole(box.shape))]
    return (
        float((loss - expected).detach().abs()),
        float((found - logprobs).abs().max()),
        float((own[0].grad - wholes[0].grad).abs().max()),
        float((rows_grad - mine).abs().max()) if mine.numel() else 0.0,
    )


def experts(mesh: Mesh, tokens: list[int], first: list[int]) -> dict[str, float]:
    """Errors of a layer of split experts. ``tokens`` of every rank; they choose experts from ``first`` on."""
    generator = torch.Generator().manual_seed(3)
    count, width, hidden = CONFIG.num_local_experts, CONFIG.hidden_size, CONFIG.intermediate_size
    gate_up = torch.randn((count, 2 * hidden, width), generator=generator) * 0.2
    down = torch.randn((count, width, hidden), generator=generator) * 0.2
    every = []
    for number, start in zip(tokens, first, strict=True):
        x = torch.randn((number, width), generator=generator)
        picks = torch.stack([torch.arange(number) % (count - start), torch.arange(1, number + 1) % (count - start)], 1)
        every.append((x, picks + start, torch.rand((number, 2), generator=generator)))
    upstream = [torch.randn((n, width), generator=generator) for n in tokens]
    whole = [torch.cat([one[i] for one in every]) for i in range(3)]
    leaves = [whole[0].requires_grad_(), whole[2].requires_grad_(), gate_up.requires_grad_(), down.requires_grad_()]
    out = ops.experts(leaves[0], whole[1], leaves[1], leaves[2], leaves[3])
    out.backward(torch.cat(upstream))
    split = SplitExperts(CONFIG, mesh.group("ep"), hidden, device="cpu", dtype=torch.float32)
    own = count // mesh.axes.ep
    mine = slice(mesh.place.expert * own, (mesh.place.expert + 1) * own)
    with torch.no_grad():
        split.gate_up_proj.copy_(gate_up[mine])
        split.down_proj.copy_(down[mine])
    x, picks, weights = every[mesh.place.data]
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    made = split(x, Route(torch.zeros((len(x), count)), picks, weights))
    made.backward(upstream[mesh.place.data])
    begin = sum(tokens[: mesh.place.data])
    rows = slice(begin, begin + len(x))
    pairs = {
        "out": (made.detach(), out.detach()[rows]),
        "x": (x.grad, leaves[0].grad[rows]),
        "weights": (weights.grad, leaves[1].grad[rows]),
        "gate_up": (split.gate_up_proj.grad, leaves[2].grad[mine]),
        "down": (split.down_proj.grad, leaves[3].grad[mine]),
    }
    assert all(a is not None and a.shape == b.shape for a, b in pairs.values())
    return {name: float((a - b).abs().max()) if b.numel() else 0.0 for name, (a, b) in pairs.items()}


def muon(mesh: Mesh, steps: int) -> dict[str, float]:
    """Largest difference of the masters after some steps with the same gradients, relative to the largest change.

    Without clipping, whose factor differs in the last bit: what is orthogonalised is then the same to the bit.
    """
    config = OptimConfig(learning_rate=1e-2, clip_norm=1e9)
    whole, shards = reference(), build(CONFIG, mesh, dtype=torch.float32)
    fill(shards, whole)
    one, several = Optimizer(whole, config), Optimizer(shards.model, config, shards=shards)
    start = {name: master.clone() for name, master in one.masters.items()}
    generator = torch.Generator().manual_seed(4)
    norms = []
    for _ in range(steps):
        for name, parameter in whole.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            where = shards.regions[name]
            own = parameter.grad.view(where.shape)[where.within(Region.whole(where.shape))]
            # A router's gradient is added up over data ranks, and what ranks of tp have alike is averaged.
            several._grads[name] = own.reshape(several.masters[name].shape).clone()
            if name.endswith("mlp.gate.weight"):
                several._grads[name] /= mesh.axes.dp
        one.accumulate()
        norms.append(one.step(1e-2) / several.step(1e-2) - 1)
    assert max(map(abs, norms)) < 1e-6, norms
    found = {}
    for name, master in one.masters.items():
        where = shards.regions[name]
        wanted = master.view(where.shape)[where.within(Region.whole(where.shape))].reshape(several.masters[name].shape)
        moved = (master - start[name]).abs().max()
        found[name] = float((several.masters[name] - wanted).abs().max() / moved) if wanted.numel() else 0.0
    return found


def averaged_gradients(mesh: Mesh) -> tuple[float, dict[str, float], float]:
    """The fault of many frameworks: gradients divided by the number of ranks."""
    whole, parts = reference(), documents()
    loss_of(whole, parts, 100.0).backward()
    shards = build(CONFIG, mesh, dtype=torch.float32)
    for module in shards.model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(mesh.axes.dp))
    fill(shards, whole)
    loss_of(shards.model, parts[mesh.place.data :: mesh.axes.dp], 100.0, shards).backward()
    found = gradients_of(shards)
    return 0.0, worst(shards, found, whole), shards.norm(found) / norm_of(whole) - 1


def split_router(mesh: Mesh) -> dict[str, float]:
    """The fault of several frameworks under tensor parallelism: a rank's own part of the router's gradient alone."""
    whole, parts = reference(), documents()
    loss_of(whole, parts, 100.0).backward()
    shards = build(CONFIG, mesh, dtype=torch.float32)
    fill(shards, whole)
    with unittest.mock.patch.object(tensor, "enter", lambda group, *values: values):
        loss_of(shards.model, parts, 100.0, shards).backward()
    return worst(shards, gradients_of(shards), whole)


def muon_of_pieces(mesh: Mesh) -> dict[str, float]:
    """The fault that Muon invites: every rank orthogonalises what it has of a matrix."""

    def apply(matrices: Matrices, function: Callable[[Tensor], Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: function(value) for name, value in values.items()}

    with unittest.mock.patch.object(Matrices, "apply", apply):
        return muon(mesh, 1)


def talk(mesh: Mesh) -> tuple[float, list[float], bool, bool]:
    """Sums over all ranks, what all have, and whether any says yes."""
    own = torch.tensor([mesh.rank + 1.0])
    gathered = [float(value) for value in mesh.gather(own.clone())]
    return float(mesh.sum(own.clone())), gathered, mesh.any(mesh.rank == 1), mesh.any(False)


def listening(mesh: Mesh) -> list[str]:
    """The addresses on which this process accepts connections."""
    inodes = set()
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(handle))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                address = bytes.fromhex(words[1].split(":")[0])
                found.append(".".join(str(byte) for byte in reversed(address)) if len(address) == 4 else words[1])
    return found
