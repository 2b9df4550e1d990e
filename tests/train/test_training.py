"""What the recipes share: steps that are skipped, averaged weights, older states, folders of another recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixtral.errors import TrainingError
from mixtral.train import checkpoint, training
from mixtral.train.config import PretrainConfig
from mixtral.train.export import export_run
from mixtral.train.loop import StepReport
from mixtral.train.optim import NormGuard
from mixtral.train.pretrain import Pretraining, pretrain
from mixtral.train.training import open_state

Nano = Callable[..., PretrainConfig]
THRESHOLD = 2.7  # 2.49 and 2.30 were measured


def ignore(report: StepReport) -> None:
    """Nothing to tell."""


def test_a_step_with_a_gradient_far_above_the_others_is_skipped_counted_and_logged(tmp_path: Path, nano: Nano) -> None:
    run = Pretraining(nano(), tmp_path)
    run.guard = NormGuard(6.0, [1e-6] * NormGuard.FEWEST)
    before = {name: value.clone() for name, value in run.optimizer.state().items()}
    report = run.step()
    assert (report.skipped, report.step, run.steps_done) == (1, 1, 1)
    assert report.grad_norm > 6e-6
    assert all(torch.equal(value, before[name]) for name, value in run.optimizer.state().items())
    run.save()
    again = Pretraining(nano(), tmp_path)
    assert again.guard.skipped == 1
    assert again.guard.norms == run.guard.norms
    off = Pretraining(nano(optim={"skip_norm": 0.0}), tmp_path / "off")
    off.guard = NormGuard(0.0, [1e-6] * NormGuard.FEWEST)
    assert off.step().skipped == 0


def test_a_snapshot_is_of_its_moment_whatever_is_trained_before_it_is_committed(tmp_path: Path, nano: Nano) -> None:
    run = Pretraining(nano(), tmp_path)
    run.step()
    before = {name: value.clone() for name, value in run.optimizer.state().items()}
    tokens = run.tokens_total
    commit = run.snapshot()
    assert commit is not None
    run.step()
    assert commit().name == "step-00000001"
    step, tensors, values = checkpoint.load_latest(tmp_path) or pytest.fail("no state")
    assert (step, values["tokens_total"], len(values["guard"]["norms"])) == (1, tokens, 1)
    assert [name for name, value in before.items() if not torch.equal(value, tensors[name])] == []
    assert json.loads((tmp_path / "record.json").read_text())["training"]["steps"] == 1


def test_without_memory_for_a_copy_the_state_is_saved_in_place(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "available_bytes", lambda device: 1 << 20)
    assert Pretraining(nano(), tmp_path).snapshot() is None
    run = pretrain(nano(run={"steps": 2, "save_every": 1}), tmp_path, on_step=ignore)
    assert run.steps_done == 2
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000002"]


@pytest.mark.slow
def test_a_run_with_guard_and_average_resumes_bitwise(tmp_path: Path, nano: Nano) -> None:
    config = nano(optim={"ema": 0.9, "balance_scope": "global", "schedule": "cosine"}, data={"micro_batches": 2})
    pretrain(config, tmp_path / "straight", on_step=ignore)
    seen: list[StepReport] = []
    pretrain(config, tmp_path / "stopped", on_step=seen.append, stopping=lambda: len(seen) == 2)
    pretrain(config, tmp_path / "stopped", on_step=ignore)
    one, other = (checkpoint.load_latest(tmp_path / name) for name in ("straight", "stopped"))
    assert one is not None
    assert other is not None
    assert one[1].keys() == other[1].keys()
    assert [name for name, value in one[1].items() if not torch.equal(value, other[1][name])] == []
    clocks = {"seconds_total"}
    assert {n: v for n, v in one[2].items() if n not in clocks} == {
        n: v for n, v in other[2].items() if n not in clocks
    }


@pytest.mark.slow
def test_averaged_weights_are_evaluated_beside_the_others_and_exported(tmp_path: Path, nano: Nano) -> None:
    sizes = {"intermediate_size": 32}
    run = pretrain(nano(optim={"ema": 0.99}, model=sizes), tmp_path / "run", on_step=ignore)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = records[-1]
    assert last["validation_loss"] == run.validation_loss()
    assert last["averaged_validation_loss"] == run.averaged_loss() != last["validation_loss"]
    export_run(tmp_path / "run", tmp_path / "model")
    export_run(tmp_path / "run", tmp_path / "averaged", averaged=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("model", "averaged"))
    assert one.read_bytes() != other.read_bytes()
    pretrain(nano(run={"steps": 1}, model=sizes), tmp_path / "plain", on_step=ignore)
    with pytest.raises(TrainingError, match=r"kept no averaged weights; they need optim\.ema"):
        export_run(tmp_path / "plain", tmp_path / "x", averaged=True)


def test_the_health_of_the_routers_is_in_every_record_and_goes_on_after_a_stop(tmp_path: Path, nano: Nano) -> None:
    told: list[StepReport] = []
    pretrain(nano(), tmp_path, on_step=told.append, stopping=lambda: len(told) == 4)
    pretrain(nano(), tmp_path, on_step=told.append)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for report, record in zip(told, steps, strict=True):
        assert 0 < report.entropy <= 1
        assert record["max_violation"] == report.max_violation == report.load_max - 1
        assert {"dead", "collapsed", "agreement", "skipped"} <= record.keys()
    agreements = [report.agreement for report in told]
    assert agreements[0] == agreements[1] == 1.0
    assert agreements[2] == agreements[3] == agreements[4] < 1
    assert 0 < agreements[5] < 1


def test_starving_experts_are_counted_on_after_a_resume(tmp_path: Path, nano: Nano) -> None:
    run = Pretraining(nano(), tmp_path)
    run.step()
    run.health.starving_LE[1, 2] = 57
    run.save()
    assert int(Pretraining(nano(), tmp_path).health.starving_LE[1, 2]) == 57


def test_a_state_from_before_these_numbers_goes_on(tmp_path: Path, nano: Nano) -> None:
    pretrain(nano(run={"steps": 2}), tmp_path, on_step=ignore)
    step, tensors, values = checkpoint.load_latest(tmp_path) or pytest.fail("no state")
    old_tensors = {n: v for n, v in tensors.items() if not n.startswith(("probe.", "health."))}
    new = {"kind", "guard", "agreement", "squares_total"}
    config = {name: dict(table) for name, table in values["config"].items() if table and name != "record"}
    for name in ("schedule", "optimizer", "skip_norm", "ema", "balance_scope"):
        del config["optim"][name]
    old = {name: value for name, value in values.items() if name not in new} | {"config": config}
    checkpoint.save(tmp_path, step, old_tensors, old, keep_last=1)
    before = {"skip_norm": 0.0, "balance_scope": "micro"}
    going_on = nano(optim=before, run={"steps": 3})
    assert pretrain(going_on, tmp_path, on_step=ignore).steps_done == 3
    checkpoint.save(tmp_path / "x", step, old_tensors, old, keep_last=1)
    with pytest.raises(TrainingError, match=r"optim\.schedule is 'cosine', but the run was started with 'wsd'"):
        Pretraining(nano(optim=before | {"schedule": "cosine"}), tmp_path / "x")
    with pytest.raises(TrainingError, match=r"optim\.skip_norm is 6.0, but the run was started with 0.0"):
        Pretraining(nano(), tmp_path / "x")


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path, nano: Nano) -> None:
    pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    with pytest.raises(TrainingError, match="holds a run of pretrain, not of sft; choose another folder"):
        open_state(tmp_path, nano(), "sft")


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_every_scope_of_the_balance_loss_reaches_the_router(tmp_path: Path, nano: Nano, scope: str) -> None:
    name = "first.model.layers.0.mlp.gate.weight"
    found = []
    for coef in (0.0, 1.0):
        optim = {"balance_coef": coef, "balance_scope": scope, "clip_norm": 1e9}
        run = Pretraining(nano(optim=optim, data={"micro_batches": 2}), tmp_path / str(coef))
        assert 0.9 < run.step().balance < 2
        found.append(run.optimizer.state()[name])
    assert float((found[1] - found[0]).norm()) > 0.1 * float(found[0].norm())


def test_over_one_micro_batch_the_scopes_micro_and_global_are_the_same(tmp_path: Path, nano: Nano) -> None:
    one, other = (
        Pretraining(nano(optim={"balance_scope": scope, "balance_coef": 1.0}), tmp_path / scope).step()
        for scope in ("micro", "global")
    )
    assert one.balance == pytest.approx(other.balance, rel=1e-6)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


@pytest.mark.slow
def test_300_steps_of_a_nano_model_reach_the_recorded_loss(tmp_path: Path, nano: Nano) -> None:
    config = nano(run={"steps": 300, "save_every": 1000}, data={"documents_per_step": 8})
    run = Pretraining(config, tmp_path)
    losses = [run.step().loss for _ in range(300)]
    assert math.isfinite(sum(losses))
    assert sum(losses[-20:]) / 20 < THRESHOLD
    assert run.validation_loss() < THRESHOLD
