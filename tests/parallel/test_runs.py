"""Pretraining over ranks: the numbers of one process, exact resume, and states that other layouts read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from pool import Ranks
from torch import Tensor

from mixtral.train import checkpoint
from mixtral.train.export import export_run
from mixtral.train.loop import StepReport

Nano = Callable[..., dict[str, dict[str, Any]]]


def state(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The newest state as one process reads it."""
    found = checkpoint.load_latest(folder)
    assert found is not None
    return found[0], found[1]


def same(first: tuple[int, dict[str, Tensor]], second: tuple[int, dict[str, Tensor]]) -> bool:
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    return all(torch.equal(value, second[1][name]) for name, value in first[1].items())


def distance(ours: list[StepReport], theirs: list[StepReport]) -> list[float]:
    """By step, the largest relative difference of losses, gradient norm and loads."""
    names = ("loss", "balance", "z", "grad_norm", "load_max", "load_min")
    pairs = [[(getattr(a, name), getattr(b, name)) for name in names] for a, b in zip(ours, theirs, strict=True)]
    assert [(a.tokens, a.step, a.tokens_total) for a in ours] == [(b.tokens, b.step, b.tokens_total) for b in theirs]
    return [max(abs(a - b) / abs(b) for a, b in step) for step in pairs]


@pytest.mark.parametrize(
    ("axes", "scope", "micro_batches"),
    [
        ("dp=2", "global", 1),
        pytest.param("dp=2", "sequence", 1, marks=pytest.mark.slow),
        ("dp=2,ep=2", "global", 2),
        pytest.param("dp=2", "global", 2, marks=pytest.mark.slow),
        pytest.param("dp=2,ep=2", "sequence", 1, marks=pytest.mark.slow),
        ("tp=2", "global", 1),
        pytest.param("tp=2", "sequence", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_two_ranks_is_that_of_one_process(
    two: Ranks, nano: Nano, tmp_path: Path, axes: str, scope: str, micro_batches: int
) -> None:
    tables = nano(optim={"balance_scope": scope}, data={"micro_batches": micro_batches}, run={"steps": 3})
    expected = runs.train(None, tables, str(tmp_path / "one"))
    reports = two("runs:train", axes, tables, str(tmp_path / "two"))
    assert reports[1] == []
    found = distance(reports[0], expected)
    # From the first update on differences grow: Muon rounds to bfloat16, and a router may decide otherwise.
    assert found[0] <= 2e-6
    assert found[1] <= 1e-3
    assert found[2] <= 3e-2
    (loss, both) = (json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[-1]) for n in ("one", "two"))
    assert loss["step"] == both["step"] == 3
    (alone, shared) = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("one", "two"))
    assert (alone["hardware"]["devices"], shared["hardware"]["devices"]) == (1, 2)
    assert shared["hardware"]["device"] == "cpu"
    assert "of 2 processes" in shared["energy"]["kwh_method"]
    assert both["validation_loss"] == pytest.approx(loss["validation_loss"], rel=1e-2)


@pytest.mark.parametrize("axes", ["dp=2", "tp=2"])
def test_a_run_begins_with_a_model_on_two_ranks_as_in_one_process(
    two: Ranks, nano: Nano, tmp_path: Path, axes: str
) -> None:
    sizes = {"intermediate_size": 64}  # int8 groups of 32
    runs.train(None, nano(model=sizes, run={"steps": 2}), str(tmp_path / "first"))
    export_run(tmp_path / "first", tmp_path / "model")
    tables = nano(model=sizes, run={"steps": 1}, data={"seed": 9}) | {"start": {"path": str(tmp_path / "model")}}
    expected = runs.train(None, tables, str(tmp_path / "one"))
    reports = two("runs:train", axes, tables, str(tmp_path / "two"))
    assert distance(reports[0], expected)[0] <= 2e-6
    weights, both = (state(tmp_path / name)[1] for name in ("one", "two"))
    torch.testing.assert_close(both, weights, atol=2e-4, rtol=1e-3)


def test_the_micro_scope_depends_on_the_ranks(two: Ranks, nano: Nano, tmp_path: Path) -> None:
    """What the scope ``global`` is for, and that the comparison above can fail."""
    tables = nano(optim={"balance_scope": "micro"}, run={"steps": 1})
    expected = runs.train(None, tables, str(tmp_path / "one"))
    reports = two("runs:train", "dp=2", tables, str(tmp_path / "two"))
    assert abs(reports[0][0].balance - expected[0].balance) > 1e-5
    assert reports[0][0].loss == pytest.approx(expected[0].loss, rel=1e-6)


@pytest.mark.parametrize(
    ("axes", "dtype"),
    [
        ("dp=2", "float32"),
        pytest.param("tp=2", "float32", marks=pytest.mark.slow),
        pytest.param("dp=2,ep=2", "float32", marks=pytest.mark.slow),
        pytest.param("dp=2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("tp=2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("dp=2,ep=2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_bitwise_like_a_straight_one(
    two: Ranks, nano: Nano, tmp_path: Path, axes: str, dtype: str
) -> None:
    tables = nano(run={"dtype": dtype})
    two("runs:train", axes, tables, str(tmp_path / "straight"))
    for _ in range(2):
        two("runs:train", axes, tables, str(tmp_path / "stopped"), 2)
    assert state(tmp_path / "stopped")[0] == 4
    assert same(state(tmp_path / "stopped"), state(tmp_path / "straight"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("dp=2", "tp=2"), ("dp=2,ep=2", "dp=2"), ("tp=2", "dp=2,ep=2")])
def test_a_state_is_read_by_another_layout(two: Ranks, nano: Nano, tmp_path: Path, before: str, after: str) -> None:
    tables = nano(run={"steps": 2})
    two("runs:train", before, tables, str(tmp_path))
    whole = state(tmp_path)
    losses = {two("runs:validation", axes, tables, str(tmp_path))[0] for axes in (before, after)}
    losses |= {runs.validation(None, tables, str(tmp_path))}
    assert {step for step, _ in losses} == {2}
    values = [loss for _, loss in losses if loss is not None]
    assert max(values) - min(values) <= 1e-5
    # Trained no further, the other layout writes the same values, cut otherwise.
    two("runs:resave", after, tables, str(tmp_path))
    assert same(state(tmp_path), whole)


@pytest.mark.slow
def test_a_state_of_one_process_goes_on_on_two_and_back(two: Ranks, nano: Nano, tmp_path: Path) -> None:
    tables = nano(run={"steps": 6})
    straight = runs.train(None, tables, str(tmp_path / "straight"))
    run = str(tmp_path / "run")
    reports = runs.train(None, tables, run, 2)
    reports += two("runs:train", "dp=2", tables, run, 2)[0]
    reports += runs.train(None, tables, run)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert max(distance(reports, straight)) <= 1e-2
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_index_names_shapes_and_places(two: Ranks, nano: Nano, tmp_path: Path) -> None:
    two("runs:train", "dp=2", nano(run={"steps": 1}), str(tmp_path))
    folder = tmp_path / "step-00000001"
    names = {"COMMIT", "index.json", "state.json", "state-rank000.safetensors", "state-rank001.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    index = json.loads((folder / "index.json").read_text())["tensors"]
    gate_up = index["master.model.layers.0.mlp.experts.gate_up_proj"]
    assert (gate_up["shape"], gate_up["stored"]) == ([4, 96, 32], [4, 2, 48, 32])
    places = [(p["file"], p["start"], p["size"]) for p in gate_up["pieces"]]
    assert places == [
        ("state-rank000.safetensors", [0, 0, 0, 0], [2, 2, 48, 32]),
        ("state-rank001.safetensors", [2, 0, 0, 0], [2, 2, 48, 32]),
    ]
    assert [piece["file"] for piece in index["steps"]["pieces"]] == ["state-rank000.safetensors"]
    assert json.loads((folder / "state.json").read_text())["config"]["run"]["steps"] == 1


@pytest.mark.parametrize(
    "harm", ["truncated", *(pytest.param(harm, marks=pytest.mark.slow) for harm in ("lost", "index"))]
)
def test_a_state_with_a_damaged_piece_is_passed_over_by_all(two: Ranks, nano: Nano, tmp_path: Path, harm: str) -> None:
    tables = nano()
    two("runs:train", "dp=2", tables, str(tmp_path))
    piece = tmp_path / "step-00000004" / ("index.json" if harm == "index" else "state-rank001.safetensors")
    if harm == "lost":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:-1])
    assert [step for step, _ in two("runs:validation_warned", "dp=2", tables, str(tmp_path))] == [2, 2]
    with pytest.warns(UserWarning, match="passed over step-00000004"):
        assert state(tmp_path)[0] == 2


def test_a_document_that_one_rank_refuses_stops_all(two: Ranks, nano: Nano, tmp_path: Path) -> None:
    tables = nano(model={"max_position_embeddings": 120})
    words = two("runs:refused", "dp=2", tables, str(tmp_path), 0)
    assert any("raise it; a run can go on" in said.lower() for said in words)
    assert all("tokens to train" in said or "another rank refused" in said for said in words)


def test_too_few_documents_for_the_ranks_are_refused(two: Ranks, nano: Nano, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected at least one for each of 2 data ranks"):
        two("runs:train", "dp=2", nano(data={"micro_batches": 4}), str(tmp_path))


@pytest.mark.slow
def test_averaged_weights_are_those_of_the_parts(two: Ranks, nano: Nano, tmp_path: Path) -> None:
    tables = nano(optim={"ema": 0.5})
    expected = runs.averaged(None, tables, str(tmp_path / "one"))
    for axes in ("dp=2", "tp=2"):
        found = two("runs:averaged", axes, tables, str(tmp_path / axes))[0]
        assert found[0] == found[2]
        assert found[0] != found[1]
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_write_tensors", "_commit"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_one_rank_stops_the_save_of_all(
    two: Ranks, nano: Nano, tmp_path: Path, rank: int, name: str
) -> None:
    words = two("runs:failing_disk", "dp=2", nano(), str(tmp_path), rank, name)
    if name == "_commit" and rank == 1:  # only the first one commits
        assert words == ["saved", "saved"]
        return
    assert "No space left on device" in words[rank]
    assert "another rank says why" in words[1 - rank]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000001"]
    assert state(tmp_path)[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "after", "commit"])
def test_a_rank_that_dies_while_saving_leaves_the_state_before(
    two: Ranks, nano: Nano, tmp_path: Path, place: str
) -> None:
    with pytest.raises(AssertionError, match="died"):
        two("runs:end_while_saving", "dp=2", nano(), str(tmp_path), place)
    assert state(tmp_path)[0] == 1
    # The next run goes on from there, and clears away what is left.
    reports = two("runs:train", "dp=2", nano(), str(tmp_path))[0]
    assert [report.step for report in reports] == [2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["dp=4,ep=2", "dp=2,tp=2", "dp=2,tp=2,ep=2"])
def test_four_ranks_train_save_and_go_on(four: Ranks, nano: Nano, tmp_path: Path, axes: str) -> None:
    tables = nano()
    expected = runs.train(None, tables, str(tmp_path / "one"))
    reports = four("runs:train", axes, tables, str(tmp_path / "four"))[0]
    found = distance(reports, expected)
    assert found[0] <= 2e-6
    assert max(found[:3]) <= 1e-3
    assert max(found) <= 3e-2  # a token or two of one step go to another expert
    shutil.copytree(tmp_path / "four" / "step-00000002", tmp_path / "again" / "step-00000002")
    four("runs:train", axes, tables, str(tmp_path / "again"))
    assert same(state(tmp_path / "again"), state(tmp_path / "four"))
    assert math.isfinite(reports[-1].loss)
