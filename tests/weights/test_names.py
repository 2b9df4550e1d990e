from __future__ import annotations

import pytest
import torch

from mixtral.config import PRESETS, MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.weights.names import PARAMETERS, TABLE, detect_style, highest, is_router, parameter_shapes, pieces


@pytest.mark.parametrize(
    ("preset", "style", "count"),
    [("8x7b", "per-expert", 995), ("8x7b", "fused", 291), ("8x22b", "per-expert", 1739), ("8x22b", "fused", 507)],
)
def test_tensor_counts_of_both_sizes(preset: str, style: str, count: int) -> None:
    plan = pieces(PRESETS[preset], style)  # type: ignore[arg-type]
    assert len({piece.name for piece in plan}) == len(plan) == count


@pytest.mark.parametrize("style", TABLE)
def test_pieces_cover_every_value_of_every_parameter_once(small: MixtralConfig, style: str) -> None:
    touched = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in parameter_shapes(small).items()}
    for piece in pieces(small, style):  # type: ignore[arg-type]
        part = piece.of(touched[piece.parameter])
        assert tuple(part.shape) == piece.shape
        assert part.is_contiguous()
        part += 1
    assert all(bool((value == 1).all()) for value in touched.values())


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


def test_detect_style_by_content() -> None:
    assert detect_style(["model.layers.0.block_sparse_moe.experts.0.w1.weight"]) == "per-expert"
    assert detect_style(["model.layers.0.mlp.experts.down_proj"]) == "fused"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "no Mixtral experts among 0"),
        (["model.layers.0.mlp.gate_proj.weight"], "no Mixtral experts among 1"),
        (["model.layers.0.mlp.experts.down_proj.q8"], "load_compact"),
        (["a.block_sparse_moe.experts.0.w1.weight", "a.mlp.experts.down_proj"], "two layouts"),
    ],
)
def test_detect_style_refuses(names: list[str], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        detect_style(names)


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
