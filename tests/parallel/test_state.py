"""Pieces of a state: written by the ranks of one layout, read by those of another, without any processes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import TrainingError
from mixtral.parallel.mesh import Mesh, alone
from mixtral.parallel.plan import Axes, Region, region
from mixtral.parallel.shards import shapes_of
from mixtral.parallel.state import INDEX, WHOLE, StateFiles, box_of, index_of, part_name, pieces_of, write_part

CONFIG = MixtralConfig(
    vocab_size=21,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)
SHAPES = shapes_of(CONFIG)
LAYOUTS = ["dp=1", "dp=2", "tp=2", "dp=2,ep=2", "dp=8", "dp=4,tp=2,ep=2", "dp=2,tp=4"]


def ranks(text: str) -> list[Mesh]:
    """The meshes of all ranks of a layout, for arithmetic alone."""
    axes = Axes.parse(text)
    if axes.world == 1:
        return [alone()]
    return [Mesh(axes, rank, torch.device("cpu"), {"dp": None}) for rank in range(axes.world)]  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """A state: masters, and a tensor that belongs to no parameter."""
    count = itertools.count()
    tensors = {f"master.{name}": torch.randn(shape) + next(count) for name, shape in SHAPES.items()}
    return tensors | {"steps": torch.tensor([7])}


def part_of(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What a rank has: its part of every parameter, and all of the rest."""
    found = {"steps": tensors["steps"]}
    for name, shape in SHAPES.items():
        box = region(name, shape, mesh.axes, mesh.place)
        values = tensors[f"master.{name}"].view(box.shape)[box.within(Region.whole(box.shape))]
        found[f"master.{name}"] = values.flatten(1, 2) if values.dim() > len(shape) else values
    return found


def write(folder: Path, tensors: dict[str, Tensor], text: str) -> None:
    meshes = ranks(text)
    if meshes[0].is_alone:
        save_file(tensors, folder / WHOLE)
        return
    for mesh in meshes:
        write_part(folder / part_name(mesh.rank), pieces_of(part_of(tensors, mesh), SHAPES, mesh))
    (folder / INDEX).write_text(json.dumps(index_of(folder, len(meshes))))


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_every_layout_reads_every_other(tmp_path: Path, whole: dict[str, Tensor], before: str, after: str) -> None:
    write(tmp_path, whole, before)
    files = StateFiles(tmp_path)
    assert files.shapes == {name: tuple(value.shape) for name, value in whole.items()}
    for mesh in ranks(after):
        found = files.read({name: box_of(name, shape, mesh) for name, shape in files.shapes.items()})
        expected = part_of(whole, mesh)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name


def test_every_number_is_written_once(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    write(tmp_path, whole, "dp=4,tp=2,ep=2")
    sizes = [sum(value.numel() for value in load_file(path).values()) for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 8
    assert sum(sizes) == sum(value.numel() for value in whole.values())


def test_a_missing_piece_is_seen_before_the_commit(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    for mesh in ranks("dp=2"):
        pieces = pieces_of(part_of(whole, mesh), SHAPES, mesh)
        if mesh.rank == 1:
            del pieces["master.lm_head.weight"]
        write_part(tmp_path / part_name(mesh.rank), pieces)
    with pytest.raises(TrainingError, match=r"pieces of master\.lm_head\.weight have 88 values; expected 168"):
        index_of(tmp_path, 2)
    with pytest.raises(FileNotFoundError):
        index_of(tmp_path, 3)


def test_another_model_is_refused(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    write(tmp_path, whole, "dp=2")
    files = StateFiles(tmp_path)
    with pytest.raises(TrainingError, match=r"no tensor 'second\.x'"):
        files.read({"second.x": None})
    with pytest.raises(TrainingError, match=r"steps has the shape .1,.; expected .2,."):
        files.read({"steps": Region.whole((2,))})
