"""The plan: axes are read strictly, and the parts of all ranks cover every parameter exactly once."""

from __future__ import annotations

import math

import pytest
import torch

from mixtral.config import MixtralConfig, preset
from mixtral.errors import ConfigError
from mixtral.parallel.plan import Axes, Region, check, data_dim, is_owner, region, stored_shape
from mixtral.parallel.shards import shapes_of

LAYOUTS = ["dp=1", "dp=2", "dp=3", "tp=2", "dp=2,ep=2", "dp=4,ep=2", "dp=8,ep=2", "dp=2,tp=2,ep=2", "dp=16,tp=2,ep=4"]


def config(**changes: int) -> MixtralConfig:
    sizes = {
        "vocab_size": 101,
        "hidden_size": 24,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    return MixtralConfig(**(sizes | changes))


def test_axes_are_read() -> None:
    assert Axes.parse("dp=4, tp=2,ep=2") == Axes(dp=4, tp=2, ep=2)
    assert Axes.parse("tp=2").world == 2
    assert Axes.parse("dp=8,ep=2").rest == 4


@pytest.mark.parametrize("text", ["", "dp", "dp=0", "dp=-1", "dp=2,dp=2", "pp=2", "dp=2;tp=2", "dp=1.5", "dp=999999"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected axes dp, tp, ep"):
        Axes.parse(text)


@pytest.mark.parametrize("text", ["ep=2", "dp=3,ep=2", "tp=2,ep=2"])
def test_experts_borrow_from_data_ranks(text: str) -> None:
    with pytest.raises(ConfigError, match=r"ep=2 does not divide dp=.; ranks of ep are borrowed from dp"):
        Axes.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp=8", "tp=8 does not divide num_attention_heads 4"),
        ("tp=4", "tp=4 does not divide num_key_value_heads 2"),
        ("dp=8,ep=8", "ep=8 does not divide num_local_experts 4"),
        ("dp=5", "5 ranks cannot share 4 experts of width 24 evenly"),
    ],
)
def test_axes_that_do_not_fit_the_model_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(config(), Axes.parse(text))


@pytest.mark.parametrize("text", LAYOUTS)
def test_owners_cover_every_parameter_exactly_once(text: str) -> None:
    axes, sizes = Axes.parse(text), config(num_key_value_heads=4)
    check(sizes, axes)
    for name, shape in shapes_of(sizes).items():
        seen = torch.zeros(stored_shape(name, shape), dtype=torch.int64)
        for place in axes.places():
            box = region(name, shape, axes, place)
            if is_owner(name, place):
                seen[box.within(Region.whole(box.shape))] += 1
        assert bool((seen == 1).all()), name


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_place_is_the_inverse_of_the_numbering(text: str) -> None:
    axes = Axes.parse(text)
    for rank, place in enumerate(axes.places()):
        assert place.data * axes.tp + place.tensor == rank
        assert place.rest * axes.ep + place.expert == place.data


def test_experts_are_split_by_expert_or_by_width() -> None:
    name, shape = "model.layers.0.mlp.experts.gate_up_proj", (4, 24, 24)
    assert data_dim(name, shape, Axes(dp=4)) == 0
    assert data_dim(name, shape, Axes(dp=8)) == 2
    assert data_dim(name.replace("gate_up", "down"), (4, 24, 12), Axes(dp=8)) == 1
    # Every matrix of an expert stays whole where the ranks have experts of their own: Muon then needs no exchange.
    assert region(name, shape, Axes(dp=4), Axes(dp=4).place(1)).size == (1, 2, 12, 24)


def test_a_slice_of_an_expert_has_gate_and_up_rows_of_the_same_units() -> None:
    box = region("mlp.experts.gate_up_proj", (4, 24, 24), Axes(tp=2), Axes(tp=2).place(1))
    assert (box.start, box.size) == ((0, 0, 6, 0), (4, 2, 6, 24))
    down = region("mlp.experts.down_proj", (4, 24, 12), Axes(tp=2), Axes(tp=2).place(1))
    assert (down.start, down.size) == ((0, 0, 6), (4, 24, 6))


@pytest.mark.parametrize("name", ["8x7b", "8x22b"])
def test_published_sizes_fit_the_usual_axes(name: str) -> None:
    for text in ("dp=8", "dp=64", "dp=8,ep=8", "dp=64,ep=8", "dp=8,tp=8", "dp=16,tp=4,ep=8"):
        check(preset(name), Axes.parse(text))


def test_boxes_meet() -> None:
    whole = Region.whole((4, 6))
    left, right = whole.split(1, 2, 0), whole.split(1, 2, 1)
    assert left.common(right) is None
    assert whole.split(0, 2, 1).common(right) == Region((4, 6), (2, 3), (2, 3))
    assert Region((4, 6), (2, 3), (2, 3)).within(right) == (slice(2, 4), slice(0, 3))
    parts = [whole.split(0, 3, index).size[0] for index in range(3)]
    assert parts == [2, 2, 0]
    assert sum(parts) == 4


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match="'lora_a' is not in the table"):
        region("lora_a", (2, 2), Axes(dp=2), Axes(dp=2).place(0))


def test_parts_are_even() -> None:
    """No rank of a published model holds more than a hundredth more than the mean."""
    sizes = preset("8x7b")
    shapes = shapes_of(sizes)
    for text in ("dp=8", "dp=8,ep=8", "dp=16,ep=8"):
        axes = Axes.parse(text)
        held = [sum(math.prod(region(n, s, axes, place).size) for n, s in shapes.items()) for place in axes.places()]
        assert max(held) <= 1.01 * sum(held) / axes.world
