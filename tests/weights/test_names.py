from __future__ import annotations

import math

import pytest
import torch

from mixtral.config import PRESETS, MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.weights.names import (
    PARAMETERS,
    TABLE,
    Layout,
    detect_layout,
    highest,
    is_router,
    parameter_shapes,
    pieces,
    tensors,
)


@pytest.mark.parametrize(
    ("preset", "layout", "count"),
    [
        ("8x7b", "per-expert", 995),
        ("8x7b", "consolidated", 995),
        ("8x7b", "fused", 291),
        ("8x7b", "eight-file", 323),
        ("8x7b", "gguf", 323),
        ("8x7b", "gguf-split", 995),
        ("8x7b", "gguf-gate-up", 291),
        ("8x22b", "per-expert", 1739),
        ("8x22b", "fused", 507),
        ("8x22b", "gguf", 563),
    ],
)
def test_tensor_counts_of_both_sizes(preset: str, layout: str, count: int) -> None:
    found = tensors(PRESETS[preset], layout)  # type: ignore[arg-type]
    assert len({pieces[0].name for pieces in found}) == len(found) == count


@pytest.mark.parametrize("layout", TABLE)
def test_pieces_cover_every_value_of_every_parameter_and_of_every_tensor_once(
    small: MixtralConfig, layout: Layout
) -> None:
    touched = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in parameter_shapes(small).items()}
    for tensor in tensors(small, layout):
        position = 0
        for piece in tensor:
            part = piece.of(touched[piece.parameter])
            assert part.is_contiguous()
            part += 1
            assert piece.to_ours(torch.empty(piece.shape)).shape == part.shape
            assert (piece.first, piece.tensor_shape) == (position, tensor[0].tensor_shape)
            position += math.prod(piece.shape)
        assert position == math.prod(tensor[0].tensor_shape)
    assert all(bool((value == 1).all()) for value in touched.values())


@pytest.mark.parametrize("layout", TABLE)
def test_every_layout_has_the_same_pieces(small: MixtralConfig, layout: Layout) -> None:
    keys = [piece.key for piece in pieces(small, layout)]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {piece.key for piece in pieces(small, "per-expert")}


def test_rows_of_queries_and_keys() -> None:
    """B1: row 2i + j of a head in Mistral's files is row jK/2 + i here; heads stay apart; values are not touched."""
    config = PRESETS["8x22b"]
    wq, wk, wv = pieces(config, "consolidated")[2:5]
    assert (wq.heads, wk.heads, wv.order) == (48, 8, "same")
    numbers = torch.arange(6144)[:, None]
    ours = wq.to_ours(numbers)[:, 0].tolist()
    assert ours[:3] == [0, 2, 4]
    assert ours[64:67] == [1, 3, 5]
    assert ours[128:130] == [128, 130]
    assert torch.equal(wq.to_file(wq.to_ours(numbers)), numbers)


def test_gate_is_the_first_half_and_up_the_second(small: MixtralConfig) -> None:
    """A5: w1 fills rows 0..F-1 of gate_up_proj, w3 rows F..2F-1, of its own expert."""
    named = {piece.name: piece for piece in pieces(small, "per-expert")}
    rows = torch.arange(2 * small.intermediate_size).view(1, -1, 1)
    stacked = (rows + 1000 * torch.arange(small.num_local_experts).view(-1, 1, 1)).expand(-1, -1, small.hidden_size)
    w1 = named["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    w3 = named["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert w1.parameter == w3.parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert w1.of(stacked)[:, 0].tolist() == [2000 + i for i in range(96)]
    assert w3.of(stacked)[:, 0].tolist() == [2096 + i for i in range(96)]


def test_every_row_leads_to_a_known_parameter() -> None:
    for rows in TABLE.values():
        assert {row.ours for row in rows} == set(PARAMETERS)


def test_detect_layout_by_content() -> None:
    assert detect_layout(["model.layers.0.block_sparse_moe.experts.0.w1.weight"]) == "per-expert"
    for layout in TABLE:
        assert detect_layout(piece.name for piece in pieces(PRESETS["tiny"], layout)) == layout


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "no Mixtral experts among 0"),
        (["model.layers.0.mlp.gate_proj.weight"], "no Mixtral experts among 1"),
        (["model.layers.0.mlp.experts.down_proj.q8"], "load_compact"),
        (["model.layers.0.block_sparse_moe.experts.0.w1.weight", "a.mlp.experts.down_proj"], "two layouts"),
        (["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"], "no Mixtral experts among 2"),
    ],
)
def test_detect_layout_refuses(names: list[str], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        detect_layout(names)


def test_highest_numbers_of_names() -> None:
    names = [
        "model.layers.3.block_sparse_moe.experts.11.w1.weight",
        "model.layers.20.mlp.gate.weight",
        "lm_head.weight",
    ]
    assert (highest(names, "layer"), highest(names, "expert")) == (20, 11)
    assert highest(["lm_head.weight", "model.layers." + "9" * 5000 + ".x"], "layer") == -1


def test_only_the_router_is_a_router(small: MixtralConfig) -> None:
    routers = [name for name in parameter_shapes(small) if is_router(name)]
    assert routers == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
