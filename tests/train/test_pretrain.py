"""Pretraining on a nano model: exact resume, gradients under accumulation, a falling loss, and refusals."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral.errors import ConfigError, TrainingError
from mixtral.model import Batch, Documents, initial_values
from mixtral.ops import Route
from mixtral.train import checkpoint, training
from mixtral.train import pretrain as recipe
from mixtral.train.config import PretrainConfig
from mixtral.train.pretrain import Pretraining, StepReport, pretrain

Nano = Callable[..., PretrainConfig]


def ignore(report: StepReport) -> None:
    """Nothing to tell."""


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_masters_are_not_rounded(tmp_path: Path, nano: Nano, dtype: str) -> None:
    run = Pretraining(nano(run={"dtype": dtype}), tmp_path)
    expected = dict(initial_values(run.model, seed=run.config.run.seed))
    assert run.optimizer.masters.keys() == expected.keys()
    for name, value in run.model.named_parameters():
        assert torch.equal(run.optimizer.masters[name], expected[name])
        assert torch.equal(value, expected[name].to(value.dtype))


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
    lines = [record for record in records(tmp_path) if "loss" in record]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["tokens_total"] == reports[0].tokens + reports[1].tokens
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01 / 3, 0.02 / 3])
    assert 0 <= lines[0]["load_min"] <= 1 <= lines[0]["load_max"] <= 2
    assert lines[0]["balance"] + 1e-3 >= 1


def test_every_save_is_evaluated_told_and_logged(tmp_path: Path, nano: Nano) -> None:
    told: list[tuple[int, float]] = []
    run = pretrain(
        nano(run={"steps": 3, "save_every": 2}),
        tmp_path,
        on_step=ignore,
        on_validation=lambda step, loss: told.append((step, loss)),
    )
    assert [(record["step"], "loss" in record) for record in records(tmp_path)] == [
        (1, True),
        (2, True),
        (2, False),
        (3, True),
        (3, False),
    ]
    found = [record for record in records(tmp_path) if "loss" not in record]
    assert found == [{"step": step, "validation_loss": loss} for step, loss in told]
    assert told[-1][1] == run.validation_loss()


def test_evaluating_changes_neither_random_states_nor_the_result(tmp_path: Path, nano: Nano) -> None:
    plain, evaluated = Pretraining(nano(), tmp_path / "a"), Pretraining(nano(), tmp_path / "b")
    before = torch.get_rng_state(), random.getstate()
    for _ in range(3):
        plain.step()
        evaluated.validation_loss(batches=1)
        evaluated.step()
    evaluated.validation_loss(batches=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(parameter.grad is None for parameter in evaluated.model.parameters())
    expected, found = plain.optimizer.state(), evaluated.optimizer.state()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("prompt_weight", [0.0, 0.2, 1.0])
def test_the_validation_loss_is_the_mean_over_the_assistants_tokens(
    tmp_path: Path, nano: Nano, prompt_weight: float
) -> None:
    run = Pretraining(nano(data={"prompt_weight": prompt_weight}), tmp_path)
    for _ in range(3):
        run.step()
    (part,) = run.data.micro_batches(0, split="validation")
    context = Documents(part.lengths)
    with torch.no_grad():
        hidden_TD = run.model(Batch(part.inputs_T, context.positions_T, context)).hidden_TD
        logits_TR = hidden_TD @ run.model.lm_head.weight.T
    logits_TR[:, -1] += math.log(run.data.copies_of_last)
    losses_T = torch.nn.functional.cross_entropy(logits_TR, part.labels_T, reduction="none")
    own = float(losses_T[part.own_T].mean())
    assert abs(own - float(losses_T.mean())) > 4e-3  # four times what the comparison below forgives
    assert run.validation_loss(batches=1) == pytest.approx(own, rel=1e-4)


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path: Path, nano: Nano) -> None:
    straight = pretrain(nano(), tmp_path / "straight", on_step=ignore)

    def kill(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(nano(), tmp_path / "killed", on_step=kill)
    log = tmp_path / "killed" / "log.jsonl"
    assert [record["step"] for record in records(log.parent)] == [1, 2, 3, 3, 4, 5]
    log.write_bytes(log.read_bytes() + b'{"step": 6, "lo')
    pretrain(nano(), tmp_path / "killed", on_step=ignore)
    clocks = {"seconds", "seconds_total"}
    expected, found = (
        [{name: value for name, value in record.items() if name not in clocks} for record in records(tmp_path / name)]
        for name in ("straight", "killed")
    )
    assert [record["step"] for record in found] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert found == expected
    assert straight.steps_done == 6
    assert not list(log.parent.glob("*.tmp"))


def test_a_run_whose_states_are_all_damaged_does_not_start_from_nothing(tmp_path: Path, nano: Nano) -> None:
    pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    log = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "step-00000001" / "COMMIT").unlink()
    with pytest.raises(TrainingError, match="holds no whole run state"):
        pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    assert (tmp_path / "log.jsonl").read_bytes() == log


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


def test_a_run_may_be_made_longer_and_so_may_its_documents(tmp_path: Path, nano: Nano) -> None:
    pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    longer = nano(run={"steps": 2, "save_every": 50, "keep_last": 1}, model={"max_position_embeddings": 4096})
    run = pretrain(longer, tmp_path, on_step=ignore)
    assert run.steps_done == 2
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_a_mixture_that_holds_later_may_come_later(tmp_path: Path, nano: Nano) -> None:
    pretrain(nano(run={"steps": 2}), tmp_path, on_step=ignore)
    run = pretrain(nano(run={"steps": 3}, data={"later": {"2": {"story": 1}}}), tmp_path, on_step=ignore)
    assert run.steps_done == 3
    with pytest.raises(TrainingError, match=r"data\.later is \{\}, but the run was started with"):
        Pretraining(nano(run={"steps": 4}), tmp_path)
    with pytest.raises(TrainingError, match=r"data\.later"):
        Pretraining(nano(run={"steps": 4}, data={"later": {"1": {"sums": 1}, "2": {"story": 1}}}), tmp_path)
    with pytest.raises(ConfigError, match="unknown skill 'songs'"):
        Pretraining(nano(data={"later": {"2": {"songs": 1}}}), tmp_path / "other")


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

    def poisoned(routes: tuple[Route, ...], **options: Any) -> tuple[Tensor, Tensor]:
        balance, z = losses(routes, **options)
        calls.append(1)
        return (balance * math.nan if len(calls) == 3 else balance), z

    monkeypatch.setattr(recipe, "router_losses", poisoned)
    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite \(.*balance nan.*\); lower learning_rate"):
        pretrain(nano(run={"save_every": 2}), tmp_path, on_step=ignore)
    step, tensors = saved(tmp_path)
    assert step == 2
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


@pytest.mark.parametrize("name", ["loss", "balance", "z"])
def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = nano(data={"micro_batches": 2})
    entropy, losses = recipe.head_cross_entropy, recipe.router_losses
    plus = {"loss": 0.0, "balance": 0.0, "z": 0.0}  # a constant has no gradient

    def poisoned_entropy(*args: Any, **options: Any) -> tuple[Tensor, Any]:
        loss, rest = entropy(*args, **options)
        return loss + plus["loss"], rest

    def poisoned_losses(routes: tuple[Route, ...], **options: Any) -> tuple[Tensor, Tensor]:
        balance, z = losses(routes, **options)
        return balance + plus["balance"], z + plus["z"]

    monkeypatch.setattr(recipe, "head_cross_entropy", poisoned_entropy)
    monkeypatch.setattr(recipe, "router_losses", poisoned_losses)
    run, plain = Pretraining(config, tmp_path / "a"), Pretraining(config, tmp_path / "b")
    before = {key: value.clone() for key, value in run.optimizer.state().items()}
    plus[name] = math.inf
    with pytest.raises(TrainingError, match=rf"step 1: the loss is not finite \(.*{name} inf"):
        run.step()
    assert [key for key, value in run.optimizer.state().items() if not torch.equal(value, before[key])] == []
    assert run.steps_done == 0
    plus[name] = 0.0
    run.step()
    plain.step()
    expected = plain.optimizer.state()
    assert [key for key, value in run.optimizer.state().items() if not torch.equal(value, expected[key])] == []


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is(tmp_path: Path, nano: Nano) -> None:
    run = Pretraining(nano(), tmp_path)
    before = {key: value.clone() for key, value in run.optimizer.state().items()}
    run.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="step 1: the gradient is not finite; lower learning_rate"):
        run.step()
    assert [key for key, value in run.optimizer.state().items() if not torch.equal(value, before[key])] == []


def test_the_load_of_the_experts_is_that_of_the_whole_step(tmp_path: Path, nano: Nano) -> None:
    whole, parts = (
        Pretraining(nano(data={"unknown_per_mille": 0, "micro_batches": count}), tmp_path).step() for count in (1, 4)
    )
    assert whole.load_min < 1 < whole.load_max
    assert (parts.load_min, parts.load_max) == pytest.approx((whole.load_min, whole.load_max), rel=1e-5)


def test_a_document_longer_than_the_model_has_positions_is_refused(tmp_path: Path, nano: Nano) -> None:
    run = Pretraining(nano(), tmp_path)
    (part,) = run.data.micro_batches(0)
    longest = max(part.lengths)
    number = part.lengths.index(longest)
    short = Pretraining(nano(model={"max_position_embeddings": longest - 1}), tmp_path)
    says = f"document {number} of the train split has {longest} tokens to train; expected .*, {longest - 1}. Raise it"
    with pytest.raises(TrainingError, match=says) as caught:
        short.step()
    assert (caught.value.param, short.steps_done) == ("max_position_embeddings", 0)
    fitting = Pretraining(nano(model={"max_position_embeddings": longest}), tmp_path)
    assert fitting.step().loss == run.step().loss
    tiny = Pretraining(nano(model={"max_position_embeddings": 8}), tmp_path)
    with pytest.raises(TrainingError, match="of the validation split has"):
        tiny.validation_loss(batches=1)


def test_other_versions_are_told_when_a_run_goes_on(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    versions = training.versions()
    assert versions.keys() == {"torch", "mixtral"}
    assert versions.items() <= found[2].items()
    Pretraining(nano(), tmp_path)  # a warning is an error here
    monkeypatch.setattr(training, "__version__", "99.0")
    with pytest.warns(
        UserWarning, match=f"saved by mixtral {versions['mixtral']} .now 99.0.; going on may not"
    ) as told:
        Pretraining(nano(), tmp_path)
    assert len(told) == 1


def test_another_generator_is_told_and_both_stand_in_the_record(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generators(steps: int) -> list[Any]:
        run = pretrain(nano(run={"steps": steps}), tmp_path, on_step=ignore)
        written = json.loads((tmp_path / "record.json").read_text())["data"]["generators"]
        assert written == run.generators
        return run.generators

    first = recipe.generator_id()
    assert generators(1) == generators(2) == [[0, first]]
    monkeypatch.setattr(recipe, "generator_id", lambda: "another")
    with pytest.warns(UserWarning, match="another version of the generator; from step 2 on"):
        assert generators(3) == [[0, first], [2, "another"]]
    assert generators(4) == [[0, first], [2, "another"]]
    with warnings.catch_warnings(action="error"):  # a state without it says nothing
        assert recipe._generators(tmp_path, (5, {}, {})) == [[0, None], [5, "another"]]


def test_a_state_without_versions_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        training.warn_of_versions(tmp_path, {"machine": "x"})
        training.warn_of_versions(tmp_path, training.versions())
    with pytest.warns(UserWarning, match=r"saved by torch 1\.0 \(now .*\) and mixtral 0\.0 \(now "):
        training.warn_of_versions(tmp_path, {"torch": "1.0", "mixtral": "0.0"})


def test_time_is_up_before_the_first_step(tmp_path: Path, nano: Nano) -> None:
    run = pretrain(nano(), tmp_path, on_step=ignore, max_seconds=0)
    assert run.steps_done == 0
    assert checkpoint.load_latest(tmp_path) is None


def test_a_vocabulary_that_the_tokenizer_does_not_have_is_refused_before_any_document_is_read(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "choose_trained_ids", lambda *_: pytest.fail("documents were read"))
    with pytest.raises(TrainingError, match="vocab_size is 32000; the tokenizer has 32768 ids"):
        Pretraining(nano(model={"vocab_size": 32000}), tmp_path)
