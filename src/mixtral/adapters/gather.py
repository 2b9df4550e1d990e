"""Low-rank pairs as other programs store them, one file tensor per matrix or per stack -> factors of our parameters.

R rank, I values in, O values out, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mixtral.adapters.factors import Factors, target_of
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.weights.names import DOWN, GATE_UP, Piece, parameter_shapes, pieces

__all__ = ["Found", "gather", "pairs_by_module", "split_stack", "stack_of"]

_LORA = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")
_STACK = re.compile(r"^model\.layers\.(\d{1,6})\.mlp\.experts(\.base_layer)?$")


class Found(NamedTuple):
    """The tensors of one adapted module, as they are in the file."""

    a: Tensor
    b: Tensor


class _Part(NamedTuple):
    """What one matrix gets: a [R, I] and b [O, R] in our order of rows, and where it belongs."""

    piece: Piece
    factors: Factors


@dataclass(slots=True)
class _Stack:
    """Pairs of the experts of one parameter, by expert and half."""

    parts: list[_Part] = field(default_factory=list)


def pairs_by_module(tensors: Mapping[str, Tensor], source: str) -> dict[str, Found]:
    """lora_A and lora_B by the name of their module.

    Raises:
        CheckpointError: a tensor is neither, or one of the two is missing.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _LORA.match(name)
        if match is None:
            raise CheckpointError(
                f"{source}: {name!r} is no part of a LoRA adapter of Mixtral; expected names that end in lora_A.weight "
                "or lora_B.weight (DoRA, saved modules, embeddings and biases are not supported)"
            )
        if value.dim() != 2 or not value.is_floating_point():
            raise CheckpointError(f"{source}: {name!r} is {value.dtype} {list(value.shape)}; expected a float matrix")
        halves.setdefault(match["module"], {})[match["part"]] = value
    for module, found in halves.items():
        if len(found) < 2:
            raise CheckpointError(f"{source}: {module!r} has lora_{next(iter(found))} but not the other; it is damaged")
    return {module: Found(found["A"], found["B"]) for module, found in halves.items()}


def stack_of(module: str, modules: Mapping[str, object], *, prefers_down: Callable[[str], bool]) -> str | None:
    """The stacked parameter that a module with the name of all experts adapts, or None.

    PEFT wraps gate_up_proj first and down_proj around it, so where both are adapted ``base_layer`` is the former. Where
    one is, only the configuration tells which: ``prefers_down`` is asked with the name of the layer.
    """
    match = _STACK.match(module)
    if match is None:
        return None
    outer = f"model.layers.{match[1]}.mlp.experts"
    both = outer in modules and f"{outer}.base_layer" in modules
    if match[2]:
        return GATE_UP.format(l=match[1])
    return (DOWN if both or prefers_down(outer) else GATE_UP).format(l=match[1])


def split_stack(found: Found, shape: tuple[int, ...], *, old: bool, source: str) -> tuple[Tensor, Tensor]:
    """a [E, R, I] and b [E, O, R] of a stacked parameter [E, O, I] out of PEFT's two matrices.

    From 0.19 on lora_A is [E R, I], experts one after the other, and lora_B [O, R E], where the expert changes fastest.
    Before (``old``) the same, but for the transposed matrix, so that lora_A has O columns and lora_B I rows.

    Raises:
        CheckpointError: the tensors do not fit.
    """
    experts, out, width = shape
    if old:
        out, width = width, out
    total = found.a.shape[0]
    rank = total // experts
    if total != rank * experts or not rank or found.a.shape != (total, width) or found.b.shape != (out, total):
        raise CheckpointError(
            f"{source}: lora_A {list(found.a.shape)} and lora_B {list(found.b.shape)} do not fit {list(shape)}; "
            f"expected [{experts} * rank, {shape[2]}] and [{shape[1]}, rank * {experts}]: it belongs to another base"
        )
    a = found.a.reshape(experts, rank, width)
    b = found.b.reshape(out, rank, experts).permute(2, 0, 1)
    if old:
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a.float().contiguous(), b.float().contiguous()


def gather(
    config: MixtralConfig, modules: Mapping[str, Found], *, scale_of: Callable[[str, int], float], source: str
) -> dict[str, Factors]:
    """Factors of our parameters out of pairs for single matrices: of attention, of the router, or of single experts,
    with Hugging Face's names or Mistral's. ``scale_of`` gives the scale for a module and a rank.

    The pairs of w1 and w3 become one of twice the rank, block by block, which is exactly the same function; experts
    that have none get zeros.

    Raises:
        CheckpointError: a module is not one of the model's or can have no pair, or shapes do not fit.
    """
    known: dict[str, Piece] = {}
    for layout in ("per-expert", "consolidated"):
        for piece in pieces(config, layout):
            known[piece.name.removesuffix(".weight")] = piece
    known |= {piece.name.removesuffix(".weight"): piece for piece in pieces(config, "fused") if piece.expert is None}
    stacks: dict[str, _Stack] = {}
    factors: dict[str, Factors] = {}
    for module, found in modules.items():
        made = known.get(module)
        if made is None or not target_of(made.parameter):
            raise CheckpointError(
                f"{source}: adapts {module!r}, which is none of the matrices that can be adapted here"
            )
        rank = found.a.shape[0]
        out, width = made.shape
        if not rank or found.a.shape != (rank, width) or found.b.shape != (out, rank):
            raise CheckpointError(
                f"{source}: {module!r} is {[out, width]} in this model, but lora_A is {list(found.a.shape)} and lora_B "
                f"{list(found.b.shape)}; it belongs to another base"
            )
        pair = Factors(found.a.float(), made.to_ours(found.b.float()).contiguous(), scale_of(module, rank))
        if made.expert is None:
            factors[made.parameter] = pair
        else:
            stacks.setdefault(made.parameter, _Stack()).parts.append(_Part(made, pair))
    shapes = parameter_shapes(config)
    return factors | {name: _stacked(stack.parts, shapes[name]) for name, stack in stacks.items()}


def _stacked(parts: list[_Part], shape: tuple[int, ...]) -> Factors:
    """All experts' pairs as one. Where scales differ they go into b, and the common one is 1."""
    experts, out, width = shape
    scales = {part.factors.scale for part in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0
    halves = 1 if all(part.piece.half == "both" for part in parts) else 2
    rank = max(part.factors.rank for part in parts)
    a, b = torch.zeros((experts, halves * rank, width)), torch.zeros((experts, out, halves * rank))
    for piece, pair in parts:
        first = rank if piece.half == "up" else 0
        rows = slice(out // 2, out) if piece.half == "up" else slice(0, out // halves)
        expert = piece.expert or 0
        a[expert, first : first + pair.rank] = pair.a
        b[expert, rows, first : first + pair.rank] = pair.b * (pair.scale / scale)
    return Factors(a, b, scale)
