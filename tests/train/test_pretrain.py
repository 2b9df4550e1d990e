"""Pretraining on a nano model: exact resume, gradients under accumulation, a falling loss, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral.errors import TrainingError
from mixtral.ops import Route
from mixtral.train import checkpoint
from mixtral.train import pretrain as recipe
from mixtral.train.config import PretrainConfig
from mixtral.train.pretrain import Pretraining, StepReport, pretrain

Nano = Callable[..., PretrainConfig]


def ignore(report: StepReport) -> None:
    """Nothing to tell."""


def saved(folder: Path) -> tuple[int, dict[str, Tensor]]:
    found = checkpoint.load_latest(folder)
    assert found is not None
    return found[0], found[1]


def gradients(config: PretrainConfig, folder: Path) -> dict[str, Tensor]:
    """The gradients of the first step, out of the first moments (which hold a tenth of them for AdamW)."""
    run = Pretraining(config, folder)
    run.step()
    state = run.optimizer.state()
    return {
        name: state[f"first.{name}"] * (10 if f"second.{name}" in state else 1) for name in run.optimizer.parameters
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_and_a_killed_run_end_bitwise_like_a_straight_one(tmp_path: Path, nano: Nano, dtype: str) -> None:
    config = nano(run={"dtype": dtype})
    pretrain(config, tmp_path / "straight", on_step=ignore)

    seen: list[StepReport] = []
    pretrain(config, tmp_path / "stopped", on_step=seen.append, stopping=lambda: len(seen) == 3)
    assert saved(tmp_path / "stopped")[0] == 3

    def kill(report: StepReport) -> None:
        if report.step == 5:  # two steps after the last saved state
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "killed", on_step=kill)
    assert saved(tmp_path / "killed")[0] == 3

    step, expected = saved(tmp_path / "straight")
    assert step == 6
    for name in ("stopped", "killed"):
        again: list[StepReport] = []
        run = pretrain(config, tmp_path / name, on_step=again.append)
        assert [report.step for report in again] == [4, 5, 6]
        found = saved(tmp_path / name)[1]
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
        for key, parameter in run.model.named_parameters():
            assert torch.equal(parameter.detach(), expected[f"master.{key}"].to(parameter.dtype))


def test_the_log_has_one_line_per_step_with_finite_numbers(tmp_path: Path, nano: Nano) -> None:
    reports: list[StepReport] = []
    pretrain(nano(run={"steps": 2}), tmp_path, on_step=reports.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["tokens_total"] == reports[0].tokens + reports[1].tokens
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01 / 3, 0.02 / 3])
    assert 0 <= lines[0]["load_min"] <= 1 <= lines[0]["load_max"] <= 2
    assert lines[0]["balance"] + 1e-3 >= 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"optim": {"learning_rate": 0.02}}, r"optim\.learning_rate is 0\.02, .* started with 0\.01"),
        ({"data": {"documents_per_step": 8}}, r"data\.documents_per_step"),
        ({"model": {"hidden_size": 64}}, r"model\.hidden_size"),
        ({"run": {"seed": 2}}, r"run\.seed"),
    ],
)
def test_a_run_goes_on_only_with_its_own_configuration(
    tmp_path: Path, nano: Nano, change: dict[str, Any], name: str
) -> None:
    values = {"config": nano().to_dict(), "trained_ids": [], "tokens_total": 0, "seconds_total": 0.0}
    checkpoint.save(tmp_path, 1, {"steps": torch.tensor([1])}, values, keep_last=1)
    with pytest.raises(TrainingError, match=name):
        Pretraining(nano(**change), tmp_path)


def test_a_run_may_be_made_longer(tmp_path: Path, nano: Nano) -> None:
    pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    run = pretrain(nano(run={"steps": 2, "save_every": 50, "keep_last": 1}), tmp_path, on_step=ignore)
    assert run.steps_done == 2
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_the_sum_over_parts_is_the_gradient_of_the_step(tmp_path: Path, nano: Nano) -> None:
    # Balance is a product of means over a part, so only without it parts and whole agree; the z loss is additive.
    optim = {"balance_coef": 0.0, "clip_norm": 1e9}
    plain = {"unknown_per_mille": 0}
    whole = gradients(nano(optim=optim, data=plain), tmp_path / "a")
    parts = gradients(nano(optim=optim, data=plain | {"micro_batches": 2}), tmp_path / "b")
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-3
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_balance_and_z_losses_reach_the_router(tmp_path: Path, nano: Nano) -> None:
    name = "model.layers.0.mlp.gate.weight"
    found = [
        gradients(nano(optim={"balance_coef": balance, "z_coef": z, "clip_norm": 1e9}), tmp_path / "none")[name]
        for balance, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    ]
    assert float(found[0].norm()) > 0
    assert float((found[1] - found[0]).norm()) > 0.1 * float(found[0].norm())
    assert float((found[2] - found[0]).norm()) > 0.1 * float(found[0].norm())


def test_the_loss_starts_at_the_uniform_guess_and_falls(tmp_path: Path, nano: Nano) -> None:
    run = Pretraining(nano(run={"steps": 30}), tmp_path)
    uniform = math.log(32768)
    assert run.validation_loss(batches=1) == pytest.approx(uniform, abs=0.05)
    losses = [run.step().loss for _ in range(30)]
    assert losses[0] == pytest.approx(uniform, abs=0.05)
    assert sum(losses[-5:]) / 5 < uniform - 4
    assert run.validation_loss(batches=1) < uniform - 3


def test_a_step_that_is_not_finite_is_refused_and_the_last_state_stays(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    losses = recipe.router_losses

    def poisoned(routes: tuple[Route, ...]) -> tuple[Tensor, Tensor]:
        balance, z = losses(routes)
        calls.append(1)
        return (balance * math.nan if len(calls) == 3 else balance), z

    monkeypatch.setattr(recipe, "router_losses", poisoned)
    with pytest.raises(TrainingError, match="step 3: the loss or its gradient is not finite; lower learning_rate"):
        pretrain(nano(run={"save_every": 2}), tmp_path, on_step=ignore)
    step, tensors = saved(tmp_path)
    assert step == 2
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_time_is_up_before_the_first_step(tmp_path: Path, nano: Nano) -> None:
    run = pretrain(nano(), tmp_path, on_step=ignore, max_seconds=0)
    assert run.steps_done == 0
    assert checkpoint.load_latest(tmp_path) is None


def test_a_vocabulary_that_the_tokenizer_does_not_have_is_refused(tmp_path: Path, nano: Nano) -> None:
    with pytest.raises(TrainingError, match="vocab_size is 32000; the tokenizer has 32768 ids"):
        Pretraining(nano(model={"vocab_size": 32000}), tmp_path)
