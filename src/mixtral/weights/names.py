"""The one table of tensor names: what a file calls a tensor, and where it lives in our parameters.

Shapes: V vocabulary, D width, H query heads, G key-value heads, K head size, E experts, F expert hidden size.

A row says that a tensor of a file is a whole parameter, or the part of a stacked expert parameter: one expert of it,
and of ``gate_up_proj`` (gate rows first) one half. The table is read in both directions: loading copies file -> part,
saving copies part -> file. ``{l}`` stands for a layer, ``{e}`` for an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError

__all__ = [
    "PARAMETERS",
    "ROUTER",
    "TABLE",
    "Half",
    "Piece",
    "Row",
    "Style",
    "detect_style",
    "highest",
    "is_router",
    "parameter_shapes",
    "pieces",
    "why_refused",
]

Style = Literal["per-expert", "fused"]
Half = Literal["both", "gate", "up"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ROUTER = "model.layers.{l}.mlp.gate.weight"
GATE_UP = "model.layers.{l}.mlp.experts.gate_up_proj"
DOWN = "model.layers.{l}.mlp.experts.down_proj"

# Our parameters in model order, with their shapes.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    EMBEDDING: ("V", "D"),
    "model.layers.{l}.input_layernorm.weight": ("D",),
    "model.layers.{l}.self_attn.q_proj.weight": ("HK", "D"),
    "model.layers.{l}.self_attn.k_proj.weight": ("GK", "D"),
    "model.layers.{l}.self_attn.v_proj.weight": ("GK", "D"),
    "model.layers.{l}.self_attn.o_proj.weight": ("D", "HK"),
    "model.layers.{l}.post_attention_layernorm.weight": ("D",),
    ROUTER: ("E", "D"),
    GATE_UP: ("E", "2F", "D"),
    DOWN: ("E", "D", "F"),
    "model.norm.weight": ("D",),
    HEAD: ("V", "D"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: ``file`` and ``ours`` are name patterns; ``{e}`` in ``file`` means one expert of ours."""

    file: str
    ours: str
    half: Half = "both"


_SHARED = tuple(Row(name, name) for name in PARAMETERS if ".mlp." not in name)

TABLE: Mapping[Style, tuple[Row, ...]] = {
    "per-expert": (
        *_SHARED,
        Row("model.layers.{l}.block_sparse_moe.gate.weight", ROUTER),
        Row("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", GATE_UP, "gate"),
        Row("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", GATE_UP, "up"),
        Row("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", DOWN),
    ),
    "fused": (*_SHARED, Row(ROUTER, ROUTER), Row(GATE_UP, GATE_UP), Row(DOWN, DOWN)),
}

# Part of a name -> the layout whose experts are called so.
_MARKS: Mapping[str, Style] = {".block_sparse_moe.": "per-expert", ".mlp.experts.": "fused"}

_LAYER = re.compile(r"^model\.layers\.(\d{1,6})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")
_REFUSED: Mapping[str, str] = {
    ".rotary_emb.inv_freq": "positions are computed from rope_theta and never read from a file",
    ".bias": "a Mixtral has no biases",
    ".qweight": "integer (GPTQ, AWQ) weights are not supported",
    ".q8": "this is the compact format of the embedded model, read with load_compact",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a file: its name and shape there, and the part of our parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None = None
    half: Half = "both"

    def of(self, parameter: Tensor) -> Tensor:
        """The view of our parameter that holds this tensor; its shape is ``self.shape`` and it is contiguous."""
        part = parameter if self.expert is None else parameter[self.expert]
        if self.half == "both":
            return part
        rows = self.shape[0]
        return part[:rows] if self.half == "gate" else part[rows:]


def is_router(parameter: str) -> bool:
    """Whether one of our parameters is a router weight: always fp32 in memory, never quantised."""
    return parameter.endswith(".mlp.gate.weight")


def parameter_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the model, in model order."""
    patterns = list(PARAMETERS)
    first = next(i for i, name in enumerate(patterns) if "{l}" in name)
    last = next(i for i, name in enumerate(patterns) if i > first and "{l}" not in name)
    names = [
        *patterns[:first],
        *(name.format(l=layer) for layer in range(config.num_hidden_layers) for name in patterns[first:last]),
        *patterns[last:],
    ]
    sizes = _sizes(config)
    return {name: tuple(sizes[axis] for axis in PARAMETERS[_LAYER.sub("model.layers.{l}.", name)]) for name in names}


def pieces(config: MixtralConfig, style: Style) -> list[Piece]:
    """Every tensor that a file of this style holds for this config, in the order of our parameters."""
    rows: dict[str, list[Row]] = {}
    for row in TABLE[style]:
        rows.setdefault(row.ours, []).append(row)
    found: list[Piece] = []
    for parameter, shape in parameter_shapes(config).items():
        layer = _LAYER.match(parameter)
        number = layer.group(1) if layer else ""
        pattern = _LAYER.sub("model.layers.{l}.", parameter)
        for row in rows[pattern]:
            found += _of_row(row, parameter, shape, number)
    return found


def _of_row(row: Row, parameter: str, shape: tuple[int, ...], layer: str) -> Iterator[Piece]:
    if "{e}" not in row.file:
        yield Piece(row.file.format(l=layer), shape, parameter)
        return
    rows = shape[1] if row.half == "both" else shape[1] // 2
    for expert in range(shape[0]):
        yield Piece(row.file.format(l=layer, e=expert), (rows, *shape[2:]), parameter, expert, row.half)


def _sizes(config: MixtralConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "HK": config.num_attention_heads * config.head_dim,
        "GK": config.num_key_value_heads * config.head_dim,
        "E": config.num_local_experts,
        "F": config.intermediate_size,
        "2F": 2 * config.intermediate_size,
    }


def detect_style(names: Iterable[str]) -> Style:
    """The layout that the expert tensors of a file have.

    Raises:
        CheckpointError: no expert tensors, those of two layouts, or the compact format.
    """
    names = list(names)
    compact = [name for name in names if name.endswith(".q8")]
    if compact:
        raise CheckpointError(f"tensors such as {compact[0]!r}: {_REFUSED['.q8']}")
    found = {style: name for name in names for mark, style in _MARKS.items() if mark in name}
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise CheckpointError(
            f"expert tensors of two layouts in one checkpoint: {', '.join(map(repr, found.values()))}"
        )
    raise CheckpointError(
        f"no Mixtral experts among {len(names)} tensors (one is {min(names, default=None)!r}); expected names such as "
        f"{TABLE['per-expert'][-1].file.format(l=0, e=0)!r} or {GATE_UP.format(l=0)!r}"
    )


def why_refused(name: str) -> str:
    """Why a tensor of this name can never belong to a Mixtral, in brackets, or an empty string."""
    return next((f"({reason})" for ending, reason in _REFUSED.items() if name.endswith(ending)), "")


def highest(names: Iterable[str], kind: Literal["layer", "expert"]) -> int:
    """The highest layer or expert number in the names, or -1."""
    pattern = _LAYER if kind == "layer" else _EXPERT
    return max((int(match.group(1)) for name in names if (match := pattern.search(name))), default=-1)
