"""The one table of tensor names: what a file calls a tensor, and where it lives in our parameters.

Shapes: V vocabulary, D width, H query heads, G key-value heads, K head size, E experts, F expert hidden size.

A row says which part of our parameters a tensor of a file holds: a whole parameter, one expert of a stacked one
(``{e}`` in the name), or all its experts one after the other; of ``gate_up_proj`` (gate rows first) both halves or one.
A row expands to pieces, the smallest units: one parameter that is not stacked, or one matrix of one expert. A piece is
a run of values in its file, so the same table serves loading, saving, and conversion from one layout to another.
"""

from __future__ import annotations

import itertools
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
    "Layout",
    "Order",
    "Piece",
    "Row",
    "detect_layout",
    "highest",
    "is_router",
    "layer_of",
    "parameter_shapes",
    "pieces",
    "tensors",
    "why_refused",
]

Layout = Literal["per-expert", "fused", "consolidated", "eight-file", "gguf", "gguf-split", "gguf-gate-up"]
"""Hugging Face (two); Mistral's own, one tensor per expert matrix or all experts in one tensor; GGUF (three)."""
Half = Literal["both", "gate", "up"]
Order = Literal["same", "interleaved", "transposed"]

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
    """One line of the table: ``file`` and ``ours`` are name patterns. ``stacked`` is how all experts share a tensor:
    "EF" as [E, F, D], "E*F" as [E * F, D]. ``order`` is how a matrix of the file differs from ours."""

    file: str
    ours: str
    half: Half = "both"
    stacked: Literal["", "EF", "E*F"] = ""
    order: Order = "same"


_SHARED = tuple(Row(name, name) for name in PARAMETERS if ".mlp." not in name)
_MISTRAL = {
    EMBEDDING: "tok_embeddings.weight",
    "model.layers.{l}.input_layernorm.weight": "layers.{l}.attention_norm.weight",
    "model.layers.{l}.self_attn.q_proj.weight": "layers.{l}.attention.wq.weight",
    "model.layers.{l}.self_attn.k_proj.weight": "layers.{l}.attention.wk.weight",
    "model.layers.{l}.self_attn.v_proj.weight": "layers.{l}.attention.wv.weight",
    "model.layers.{l}.self_attn.o_proj.weight": "layers.{l}.attention.wo.weight",
    "model.layers.{l}.post_attention_layernorm.weight": "layers.{l}.ffn_norm.weight",
    "model.norm.weight": "norm.weight",
    HEAD: "output.weight",
}
_GGML = {
    EMBEDDING: "token_embd.weight",
    "model.layers.{l}.input_layernorm.weight": "blk.{l}.attn_norm.weight",
    "model.layers.{l}.self_attn.q_proj.weight": "blk.{l}.attn_q.weight",
    "model.layers.{l}.self_attn.k_proj.weight": "blk.{l}.attn_k.weight",
    "model.layers.{l}.self_attn.v_proj.weight": "blk.{l}.attn_v.weight",
    "model.layers.{l}.self_attn.o_proj.weight": "blk.{l}.attn_output.weight",
    "model.layers.{l}.post_attention_layernorm.weight": "blk.{l}.ffn_norm.weight",
    ROUTER: "blk.{l}.ffn_gate_inp.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}


def _interleaved(names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of layouts whose query and key rows are in pairs: row 2i + j of a head there is row jK/2 + i here."""
    return tuple(
        Row(file, ours, order="interleaved" if ours.endswith(("q_proj.weight", "k_proj.weight")) else "same")
        for ours, file in names.items()
    )


TABLE: Mapping[Layout, tuple[Row, ...]] = {
    "per-expert": (
        *_SHARED,
        Row("model.layers.{l}.block_sparse_moe.gate.weight", ROUTER),
        Row("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", GATE_UP, "gate"),
        Row("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", GATE_UP, "up"),
        Row("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", DOWN),
    ),
    "fused": (*_SHARED, Row(ROUTER, ROUTER), Row(GATE_UP, GATE_UP, stacked="EF"), Row(DOWN, DOWN, stacked="EF")),
    "consolidated": (
        *_interleaved(_MISTRAL),
        Row("layers.{l}.feed_forward.gate.weight", ROUTER),
        Row("layers.{l}.feed_forward.experts.{e}.w1.weight", GATE_UP, "gate"),
        Row("layers.{l}.feed_forward.experts.{e}.w3.weight", GATE_UP, "up"),
        Row("layers.{l}.feed_forward.experts.{e}.w2.weight", DOWN),
    ),
    # The eight .pt files of the 8x7B repository: w2 is stored like w1 and w3, as [E * F, D], each expert transposed.
    "eight-file": (
        *_interleaved(_MISTRAL),
        Row("layers.{l}.block_sparse_moe.gate.weight", ROUTER),
        Row("layers.{l}.block_sparse_moe.w1", GATE_UP, "gate", "E*F"),
        Row("layers.{l}.block_sparse_moe.w3", GATE_UP, "up", "E*F"),
        Row("layers.{l}.block_sparse_moe.w2", DOWN, stacked="E*F", order="transposed"),
    ),
    "gguf": (
        *_interleaved(_GGML),
        Row("blk.{l}.ffn_gate_exps.weight", GATE_UP, "gate", "EF"),
        Row("blk.{l}.ffn_up_exps.weight", GATE_UP, "up", "EF"),
        Row("blk.{l}.ffn_down_exps.weight", DOWN, stacked="EF"),
    ),
    "gguf-split": (
        *_interleaved(_GGML),
        Row("blk.{l}.ffn_gate.{e}.weight", GATE_UP, "gate"),
        Row("blk.{l}.ffn_up.{e}.weight", GATE_UP, "up"),
        Row("blk.{l}.ffn_down.{e}.weight", DOWN),
    ),
    "gguf-gate-up": (
        *_interleaved(_GGML),
        Row("blk.{l}.ffn_gate_up_exps.weight", GATE_UP, stacked="EF"),
        Row("blk.{l}.ffn_down_exps.weight", DOWN, stacked="EF"),
    ),
}

# What a name of an expert tensor looks like -> the layout.
_MARKS: Mapping[str, Layout] = {
    r"^model\.layers\.\d+\.block_sparse_moe\.": "per-expert",
    r"\.mlp\.experts\.": "fused",
    r"^layers\.\d+\.feed_forward\.": "consolidated",
    r"^layers\.\d+\.block_sparse_moe\.": "eight-file",
    r"^blk\.\d+\.ffn_(gate|up)_exps\.": "gguf",
    r"^blk\.\d+\.ffn_(gate|up|down)\.\d+\.": "gguf-split",
    r"^blk\.\d+\.ffn_gate_up_exps\.": "gguf-gate-up",
}

_LAYER = re.compile(r"^(?:(?:model\.)?layers|blk)\.(\d{1,6})\.")
_EXPERT = re.compile(r"\.(?:experts|ffn_gate|ffn_up|ffn_down)\.(\d{1,6})\.")
_REFUSED: Mapping[str, str] = {
    ".rotary_emb.inv_freq": "positions are computed from rope_theta and never read from a file",
    ".bias": "a Mixtral has no biases",
    ".q8": "this is the compact format of the embedded model, read with load_compact",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of values in a tensor of a file, and the part of our parameters that they are.

    The tensor is called ``name`` and has ``tensor_shape``; the piece is a matrix (or vector) of ``shape`` that begins
    at value number ``first``. It fills ``parameter``, or of a stacked one the matrix ``half`` of ``expert``.
    """

    name: str
    tensor_shape: tuple[int, ...]
    shape: tuple[int, ...]
    first: int
    parameter: str
    expert: int | None = None
    half: Half = "both"
    order: Order = "same"
    heads: int = 0

    @property
    def key(self) -> tuple[str, int | None, Half]:
        """What it is; the same in every layout."""
        return self.parameter, self.expert, self.half

    def of(self, parameter: Tensor) -> Tensor:
        """The contiguous view of our parameter that this piece fills."""
        if self.expert is None:
            return parameter
        part = parameter[self.expert]
        if self.half == "both":
            return part
        rows = self.shape[0]
        return part[:rows] if self.half == "gate" else part[rows:]

    def to_ours(self, values: Tensor) -> Tensor:
        """The values of the file (or its rows, as bytes) in our order; a view where that is possible."""
        if self.order == "transposed":
            return values.t()
        if self.order == "same":
            return values
        return values.view(self.heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)

    def to_file(self, values: Tensor) -> Tensor:
        """The inverse of ``to_ours``."""
        if self.order == "transposed":
            return values.t()
        if self.order == "same":
            return values
        return values.view(self.heads, 2, -1, values.shape[-1]).transpose(1, 2).reshape(values.shape)


def layer_of(parameter: str) -> int:
    """The layer of one of our parameters; 0 for those outside the layers."""
    match = _LAYER.match(parameter)
    return int(match.group(1)) if match else 0


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


def pieces(config: MixtralConfig, layout: Layout) -> list[Piece]:
    """Every piece that a checkpoint of this layout holds for this config, in the order of our parameters; the pieces of
    one tensor follow each other without a gap."""
    rows: dict[str, list[Row]] = {}
    for row in TABLE[layout]:
        rows.setdefault(row.ours, []).append(row)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found: list[Piece] = []
    for parameter, shape in parameter_shapes(config).items():
        layer = _LAYER.match(parameter)
        number = layer.group(1) if layer else ""
        pattern = _LAYER.sub("model.layers.{l}.", parameter)
        for row in rows[pattern]:
            if len(shape) == 3:
                found += _of_experts(row, parameter, shape, number)
            else:
                count = heads[parameter.split(".")[-2]] if row.order == "interleaved" else 0
                found.append(Piece(row.file.format(l=number), shape, shape, 0, parameter, order=row.order, heads=count))
    return found


def tensors(config: MixtralConfig, layout: Layout) -> list[list[Piece]]:
    """The pieces of every tensor of a checkpoint of this layout."""
    return [list(group) for _, group in itertools.groupby(pieces(config, layout), key=lambda piece: piece.name)]


def _of_experts(row: Row, parameter: str, shape: tuple[int, ...], layer: str) -> Iterator[Piece]:
    """The matrices of a stacked parameter [E, rows, columns] that a row of the table holds."""
    count, rows, columns = shape
    halves: tuple[Half, ...] = ("both",)
    if row.ours == GATE_UP:
        rows //= 2
        halves = ("gate", "up") if row.half == "both" else (row.half,)
    matrix = (columns, rows) if row.order == "transposed" else (rows, columns)
    tensor_shape: tuple[int, ...] = matrix
    if row.stacked == "EF":
        tensor_shape = (count, len(halves) * matrix[0], matrix[1])
    elif row.stacked:
        tensor_shape = (count * matrix[0], matrix[1])
    first = 0
    for expert in range(count):
        for half in halves:
            name = row.file.format(l=layer, e=expert)
            yield Piece(name, tensor_shape, matrix, first, parameter, expert, half, row.order)
            first = first + rows * columns if row.stacked else 0


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


def detect_layout(names: Iterable[str]) -> Layout:
    """The layout that the expert tensors of a checkpoint have.

    Raises:
        CheckpointError: no expert tensors, those of two layouts, or the compact format.
    """
    names = list(names)
    compact = [name for name in names if name.endswith(".q8")]
    if compact:
        raise CheckpointError(f"tensors such as {compact[0]!r}: {_REFUSED['.q8']}")
    found: dict[Layout, str] = {}
    for mark, layout in _MARKS.items():
        pattern = re.compile(mark)
        name = next((name for name in names if pattern.search(name)), None)
        if name is not None:
            found[layout] = name
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
