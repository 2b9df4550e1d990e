"""DPO: the formula in float64, the gradient through whole logits, and references that are the model of the start."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.errors import ConfigError
from mixtral.model import Mixtral
from mixtral.train import checkpoint
from mixtral.train.dpo import Dpo, PairBatch, PreferenceReport, dpo
from mixtral.train.loop import StepReport
from mixtral.train.losses import dpo_loss
from mixtral.train.training import Step, forward
from mixtral.train.tune import DpoConfig
from mixtral.weights import load_model

ADAPTER = {"rank": 4}


def ignore(report: StepReport) -> None:
    """Nothing to tell."""


def config(path: Path, /, **changes: dict[str, Any]) -> DpoConfig:
    tables: dict[str, Any] = {
        "data": {"train": str(path), "documents_per_step": 4, "max_tokens": 200, "tokens_per_part": 120},
        "optim": {"learning_rate": 3e-3, "warmup_steps": 1, "clip_norm": 1e9},
        "run": {"epochs": 2, "save_every": 2, "dtype": "float32", "threads": 1},
        "dpo": {"nll_coef": 0.0},
    }
    tables = {name: table | changes.pop(name, {}) for name, table in tables.items()}
    return DpoConfig.from_dict(tables | changes, source="test")


def preference(report: StepReport) -> PreferenceReport:
    assert isinstance(report, PreferenceReport)
    return report


def gradients(run: Dpo) -> dict[str, Tensor]:
    """Of the next step, from the first moments of AdamW, which must have been zero before."""
    run.step()
    state = run.optimizer.state()
    return {name: 10 * state[f"first.{name}"] for name in run.optimizer.parameters}


def trls_loss(policy: Tensor, reference: Tensor, beta: float, smoothing: float) -> Tensor:
    """``DPOTrainer`` of TRL, loss type "sigmoid", as its documentation and code have it."""
    chosen_logratios = policy[:, 0] - reference[:, 0]
    rejected_logratios = policy[:, 1] - reference[:, 1]
    delta = chosen_logratios - rejected_logratios
    return -F.logsigmoid(beta * delta) * (1 - smoothing) - F.logsigmoid(-beta * delta) * smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_the_loss_is_trls_in_float64_and_so_is_its_gradient(beta: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    policy, reference = (10 * torch.randn((32, 2), generator=generator, dtype=torch.float64) for _ in range(2))
    policy.requires_grad_()
    losses, margins = dpo_loss(policy, reference, beta, label_smoothing=smoothing)
    expected = trls_loss(policy, reference, beta, smoothing)
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=1e-14)
    found, wanted = (torch.autograd.grad(one.sum(), policy, retain_graph=True)[0] for one in (losses, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    by_hand = -beta * (torch.sigmoid(-beta * margins) - smoothing)
    torch.testing.assert_close(found[:, 0], by_hand.detach(), rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda p: dpo_loss(p, reference, beta, label_smoothing=smoothing)[0], policy)


def test_extreme_margins_stay_finite() -> None:
    policy = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    losses, _ = dpo_loss(policy, torch.zeros(2, 2), 0.1)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist() == pytest.approx([0.0, 2000.0])
    assert policy.grad is not None
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["all", "adapter"])
def test_the_loss_starts_at_ln_2(tmp_path: Path, plain: Path, pairs: Path, adapter: dict[str, Any] | None) -> None:
    settings = config(pairs, adapter=adapter) if adapter else config(pairs)
    report = preference(Dpo(settings, tmp_path, plain).step())
    assert report.loss == pytest.approx(math.log(2), abs=1e-6)
    assert (report.margin, report.kl) == pytest.approx((0, 0), abs=1e-6)
    assert report.routing_agreement == 1
    assert report.chosen_logprob < 0


@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_the_gradient_at_the_start_is_in_proportion_to_beta(
    tmp_path: Path, plain: Path, pairs: Path, factor: float
) -> None:
    """So without beta there is none: at the start every pair weighs beta / 2."""
    one = gradients(Dpo(config(pairs, dpo={"beta": 0.1}), tmp_path / "one", plain))
    other = gradients(Dpo(config(pairs, dpo={"beta": 0.1 * factor}), tmp_path / "other", plain))
    assert max(float(grad.abs().max()) for grad in one.values()) > 1e-3
    for name, grad in one.items():
        torch.testing.assert_close(other[name], factor * grad, rtol=1e-3, atol=1e-6 * factor)


def whole_logits_loss(model: Mixtral, base: Mixtral, run: Dpo, parts: list[PairBatch]) -> Tensor:
    """The loss of a step in float64, by its definition, over the logits of the whole vocabulary."""
    table = run.config.dpo
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        said = []
        for one in (model, base):
            logits_TV = one.lm_head(forward(one, part).hidden_TD)
            said.append(-F.cross_entropy(logits_TV, part.tokens.labels_T, reduction="none") * part.tokens.own_T)
        sums = [
            torch.stack([piece.sum() for piece in torch.split(values, part.lengths)]).view(-1, 2) for values in said
        ]
        sizes = torch.tensor([int(piece.sum()) for piece in torch.split(part.tokens.own_T, part.lengths)]).view(-1, 2)
        if table.length_normalised:
            policy, reference = sums[0] / sizes, sums[1] / sizes
        else:
            policy, reference = sums
        total = total + trls_loss(policy, reference.detach(), table.beta, table.label_smoothing).sum()
        total = total - table.nll_coef * (sums[0][:, 0] / sizes[:, 0]).sum()
    return total / run.config.data.documents_per_step


@pytest.mark.parametrize(
    "table",
    [{}, {"label_smoothing": 0.2}, {"nll_coef": 1.0}, {"length_normalised": True}, {"nll_coef": 0.5, "beta": 1.0}],
    ids=["plain", "smoothed", "likelihood", "per token", "mixed"],
)
def test_loss_and_gradient_are_those_of_the_definition_over_whole_logits(
    tmp_path: Path, plain: Path, pairs: Path, table: dict[str, Any]
) -> None:
    run = Dpo(config(pairs, dpo=table, optim={"learning_rate": 1e-2}), tmp_path, plain)
    for _ in range(2):  # away from the start, where all margins are 0
        run.step()
    model, base = copy.deepcopy(run.model).double(), load_model(plain, device="cpu").double()
    model.requires_grad_()
    parts = run.parts(2)
    expected = whole_logits_loss(model, base, run, parts)
    expected.backward()  # type: ignore[no-untyped-call]
    sizes = run.model.config
    step = Step(4.0, 1, dict.fromkeys(run.sums, 0.0), torch.zeros((sizes.num_hidden_layers, 4), dtype=torch.int64))
    for part in parts:
        run.backward(part, step)
    assert step.sums["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, parameter in run.model.named_parameters():
        wanted = model.get_parameter(name).grad
        assert parameter.grad is not None
        assert wanted is not None
        error = (parameter.grad.double() - wanted).norm() / (wanted.norm() + 1e-6)
        assert float(error) < 1e-3, name


@pytest.mark.parametrize("most", [1, 100_000])
def test_the_gradient_is_the_same_in_any_parts(tmp_path: Path, plain: Path, pairs: Path, most: int) -> None:
    one = gradients(Dpo(config(pairs), tmp_path / "a", plain))
    other = gradients(Dpo(config(pairs, data={"tokens_per_part": most}), tmp_path / "b", plain))
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)


def test_a_switched_off_adapter_is_a_frozen_copy_of_the_start(tmp_path: Path, plain: Path, pairs: Path) -> None:
    run = Dpo(config(pairs, adapter=ADAPTER, dpo={"reference": "adapter-off"}), tmp_path, plain)
    assert not (tmp_path / "reference").exists()
    for _ in range(3):
        assert run.step().step
    base = load_model(plain, device="cpu")
    (part, *_) = run.parts(0)
    found = run._reference(part)
    with torch.no_grad():
        out = forward(base, part)
        logits_TV = base.logits(out.hidden_TD)
    expected = -F.cross_entropy(logits_TV, part.tokens.labels_T, reduction="none")[part.tokens.own_T]
    torch.testing.assert_close(found.logprobs_A, expected, rtol=1e-5, atol=1e-5)
    picks = torch.stack([route.picks_TA[part.tokens.own_T] for route in out.routes], 1)
    assert torch.equal(found.picks_ALK.long(), picks)
    policy = run._say(part, as_reference=False)
    assert not torch.allclose(policy.logprobs_A, found.logprobs_A, atol=1e-3)


def test_a_cached_reference_says_what_a_live_one_says(tmp_path: Path, plain: Path, pairs: Path) -> None:
    runs = {
        name: dpo(config(pairs, adapter=ADAPTER, dpo={"reference": name}), tmp_path / name, plain, on_step=ignore)
        for name in ("adapter-off", "cached")
    }
    assert (tmp_path / "cached" / "reference" / "logprobs.f32").stat().st_size > 0
    live, cached = (runs[name]._reference(runs[name].parts(1)[0]) for name in ("adapter-off", "cached"))
    torch.testing.assert_close(cached.logprobs_A, live.logprobs_A, rtol=1e-5, atol=1e-5)
    assert torch.equal(cached.picks_ALK, live.picks_ALK)
    for name, value in runs["cached"].optimizer.masters.items():
        torch.testing.assert_close(value, runs["adapter-off"].optimizer.masters[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("epochs", "adapter", "cached"), [(1, True, False), (2, True, True), (1, False, True)], ids=str
)
def test_auto_caches_where_it_pays_or_must(
    tmp_path: Path, plain: Path, pairs: Path, epochs: int, adapter: bool, cached: bool
) -> None:
    tables: dict[str, Any] = {"run": {"epochs": epochs}} | ({"adapter": ADAPTER} if adapter else {})
    Dpo(config(pairs, **tables), tmp_path, plain)
    assert (tmp_path / "reference").exists() == cached


def test_all_weights_have_no_adapter_to_switch_off(tmp_path: Path, plain: Path, pairs: Path) -> None:
    with pytest.raises(ConfigError, match='reference is "adapter-off", but there is no adapter to switch off'):
        Dpo(config(pairs, dpo={"reference": "adapter-off"}), tmp_path, plain)


def test_a_resumed_run_is_bitwise_the_straight_one_and_keeps_its_reference(
    tmp_path: Path, plain: Path, pairs: Path
) -> None:
    dpo(config(pairs), tmp_path / "straight", plain, on_step=ignore)
    seen: list[StepReport] = []
    dpo(config(pairs), tmp_path / "stopped", plain, on_step=seen.append, stopping=lambda: len(seen) == 3)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped" / "reference").iterdir()}
    dpo(config(pairs), tmp_path / "stopped", plain, on_step=ignore)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    one, other = (checkpoint.load_latest(tmp_path / name) for name in ("straight", "stopped"))
    assert one is not None
    assert other is not None
    assert one[0] == other[0] == 5
    assert [name for name, value in one[1].items() if not torch.equal(value, other[1][name])] == []


@pytest.mark.parametrize("harm", ["lost", "short", "other"])
def test_a_damaged_reference_is_made_again_from_the_start_not_from_the_trained_model(
    tmp_path: Path, plain: Path, pairs: Path, harm: str
) -> None:
    seen: list[StepReport] = []
    first = dpo(config(pairs), tmp_path, plain, on_step=seen.append, stopping=lambda: len(seen) == 3)
    expected = first._reference(first.parts(0)[0]).logprobs_A.clone()
    folder = tmp_path / "reference"
    if harm == "lost":
        (folder / "picks.i16").unlink()
    elif harm == "short":
        (folder / "logprobs.f32").write_bytes((folder / "logprobs.f32").read_bytes()[:-4])
    else:
        (folder / "reference.json").write_text('{"key": "x"}')
    again = Dpo(config(pairs), tmp_path, plain)
    assert again.steps_done == 3
    assert torch.equal(again._reference(again.parts(0)[0]).logprobs_A, expected)


def test_training_makes_the_chosen_answers_likelier(tmp_path: Path, plain: Path, pairs: Path) -> None:
    told: list[PreferenceReport] = []
    settings = config(
        pairs,
        data={"held_out_percent": 25},
        run={"steps": 12, "save_every": 100},
        dpo={"nll_coef": 0.1},
    )
    losses: list[float] = []
    run = dpo(
        settings,
        tmp_path,
        plain,
        on_step=lambda report: told.append(preference(report)),
        on_validation=lambda step, loss: losses.append(loss),
    )
    first, last = told[0], told[-1]
    assert abs(first.margin) < 1e-5
    assert last.accuracy == 1
    assert last.margin > 0.5
    assert last.loss < first.loss
    assert last.kl > first.kl
    assert "accuracy 1.00" in last.highlights()
    assert run.held_out
    assert losses
    assert losses[-1] < first.loss


def test_the_likelihood_term_keeps_the_chosen_answers_likely(tmp_path: Path, plain: Path, pairs: Path) -> None:
    ends = []
    for coef in (0.0, 1.0):
        run = Dpo(config(pairs, dpo={"nll_coef": coef}, run={"steps": 8}), tmp_path / str(coef), plain)
        ends.append([preference(run.step()).chosen_logprob for _ in range(8)][-1])
    assert ends[1] > ends[0]
