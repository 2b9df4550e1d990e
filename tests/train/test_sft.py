"""SFT on a model of two layers: exact resume, the same gradient in any parts and packing, and models that come out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixtral
from mixtral.adapters import attach_factors
from mixtral.adapters.peft import read_adapter
from mixtral.errors import ConfigError, TrainingError
from mixtral.quant.modules import PackedLinear
from mixtral.train import checkpoint
from mixtral.train.export import export_run
from mixtral.train.fine import token_batch
from mixtral.train.loop import StepReport
from mixtral.train.sft import Sft, sft
from mixtral.train.training import forward
from mixtral.train.tune import SftConfig
from mixtral.weights import load_model, respelling_of, write_respelling
from mixtral.weights.convert import convert

Write = Callable[[str, Sequence[object]], Path]
Make = Callable[..., SftConfig]
ADAPTER = {"rank": 4, "dropout": 0.2}


def ignore(report: StepReport) -> None:
    """Nothing to tell."""


def config(path: Path, /, **changes: dict[str, Any]) -> SftConfig:
    tables: dict[str, Any] = {
        "data": {"train": str(path), "documents_per_step": 4, "max_tokens": 200, "tokens_per_part": 60},
        "optim": {"learning_rate": 3e-3, "warmup_steps": 1},
        "run": {"epochs": 2, "save_every": 3, "dtype": "float32", "threads": 1},
    }
    tables = {name: table | changes.pop(name, {}) for name, table in tables.items()}
    return SftConfig.from_dict(tables | changes, source="test")


def saved(folder: Path) -> dict[str, Tensor]:
    found = checkpoint.load_latest(folder)
    assert found is not None
    return found[1]


def gradients(settings: SftConfig, folder: Path, base: Path) -> dict[str, Tensor]:
    """Of the first step; the first moment holds a tenth of them."""
    run = Sft(settings, folder, base)
    run.step()
    state = run.optimizer.state()
    return {name: 10 * state[f"first.{name}"] for name in run.optimizer.parameters}


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["all", "adapter"])
def test_a_stopped_and_a_killed_run_end_bitwise_like_a_straight_one(
    tmp_path: Path, plain: Path, compact: Path, talks: Path, adapter: dict[str, Any] | None
) -> None:
    settings, base = (config(talks, adapter=adapter), plain) if adapter else (config(talks), compact)
    straight = sft(settings, tmp_path / "straight", base, on_step=ignore)
    assert straight.steps_done == 7  # 13 documents, twice, 4 in a step

    seen: list[StepReport] = []
    sft(settings, tmp_path / "stopped", base, on_step=seen.append, stopping=lambda: len(seen) == 2)

    def kill(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sft(settings, tmp_path / "killed", base, on_step=kill)
    expected = saved(tmp_path / "straight")
    for name in ("stopped", "killed"):
        sft(settings, tmp_path / name, base, on_step=ignore)
        found = saved(tmp_path / name)
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize("scope", ["micro", "sequence"])
@pytest.mark.parametrize("most", [1, 40, 100_000], ids=["alone", "parts", "whole"])
def test_the_gradient_of_a_step_is_the_same_in_any_parts_and_packing(
    tmp_path: Path, plain: Path, talks: Path, scope: str, most: int
) -> None:
    # Over a micro-batch the balance loss depends on what is in it, so only the cross entropy is the same for it.
    optim = {"clip_norm": 1e9, "balance_scope": scope, "z_coef": 0.1, "balance_coef": 1.0 if scope == "sequence" else 0}
    step = {"documents_per_step": 8}
    whole = gradients(config(talks, optim=optim, data=step | {"tokens_per_part": 100_000}), tmp_path / "a", plain)
    parts = gradients(config(talks, optim=optim, data=step | {"tokens_per_part": most}), tmp_path / "b", plain)
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-2
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_over_micro_batches_the_balance_loss_does_depend_on_the_parts(tmp_path: Path, plain: Path, talks: Path) -> None:
    """The test above would see it."""
    optim = {"clip_norm": 1e9, "balance_coef": 1.0}
    router = "model.layers.0.mlp.gate.weight"
    one, other = (
        gradients(config(talks, optim=optim, data={"tokens_per_part": most}), tmp_path / str(most), plain)[router]
        for most in (1, 100_000)
    )
    assert float((one - other).abs().max()) > 1e-4


def test_the_loss_is_the_mean_over_the_learnt_tokens_of_the_step(tmp_path: Path, plain: Path, lines: Write) -> None:
    values = [{"text": "One."}, {"text": "A much longer text of ten words or so, yes."}, {"text": "Two.", "weight": 3}]
    run = Sft(config(lines("x.jsonl", values), data={"documents_per_step": 3, "tokens_per_part": 1}), tmp_path, plain)
    model = load_model(plain, device="cpu")
    total = weight = 0.0
    for doc in run.lines.kept:
        ids = torch.from_numpy(doc.ids).long()
        batch = token_batch(run.start, [doc])
        assert batch.lengths == (len(ids) - 1,)
        with torch.no_grad():
            logits_TV = model.logits(forward(model, batch).hidden_TD)
        total += doc.weight * float(F.cross_entropy(logits_TV, ids[1:], reduction="sum"))
        weight += doc.weight * (len(ids) - 1)
    assert run.step().loss == pytest.approx(total / weight, rel=1e-5)


def test_prompts_are_not_learnt(tmp_path: Path, plain: Path, lines: Write) -> None:
    """The gradient of the head at ids that only stand in prompts comes from the softmax alone: it is never negative."""
    talk = [{"role": "user", "content": "zebra zebra"}, {"role": "assistant", "content": "horse"}]
    settings = config(lines("x.jsonl", [{"messages": talk}]), data={"documents_per_step": 1}, optim={"clip_norm": 1e9})
    run = Sft(settings, tmp_path, plain)
    (part,) = run.parts(0)
    answer = run.start.tokenizer.encode("horse")
    assert part.labels_T[part.own_T].tolist() == [*answer, run.start.tokenizer.eos_id]
    assert run.weight_of(part) == len(answer) + 1


def test_eight_conversations_are_learnt_by_heart(tmp_path: Path, compact: Path, lines: Write) -> None:
    colours = ("red", "blue", "green", "black", "white", "brown", "grey", "pink")
    talks = [
        {"messages": [{"role": "user", "content": f"Room {i}?"}, {"role": "assistant", "content": f"It is {colour}."}]}
        for i, colour in enumerate(colours)
    ]
    settings = config(
        lines("x.jsonl", talks),
        data={"documents_per_step": 8, "tokens_per_part": 1000},
        optim={"learning_rate": 1e-2, "schedule": "constant"},
        run={"steps": 60, "save_every": 1000},
    )
    run = Sft(settings, tmp_path, compact)
    losses = [run.step().loss for _ in range(60)]
    assert losses[0] > 5
    assert losses[-1] < 0.05


def test_an_adapter_leaves_the_base_as_it_is(tmp_path: Path, plain: Path, talks: Path) -> None:
    run = Sft(config(talks, adapter=ADAPTER), tmp_path, plain)
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    trained = set(run.optimizer.parameters)
    for _ in range(3):
        run.step()
    after = dict(run.model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == trained
    assert run.trained_part == 0


def test_the_embedded_kind_of_model_is_trained_on_its_shared_rows(tmp_path: Path, compact: Path, talks: Path) -> None:
    run = sft(config(talks), tmp_path / "run", compact, on_step=ignore)
    assert run.model.config.vocab_size < 2000
    assert export_run(tmp_path / "run", tmp_path / "model").startswith("int8 groups")
    before, after = mixtral.load(compact), mixtral.load(tmp_path / "model")
    assert after.tokenizer.respell == before.tokenizer.respell
    masters = saved(tmp_path / "run")
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(after.generator.model.get_parameter(gate), masters[f"master.{gate}"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_become_a_checkpoint(tmp_path: Path, plain: Path, talks: Path, dtype: str) -> None:
    run = sft(config(talks, run={"dtype": dtype}), tmp_path / "run", plain, on_step=ignore)
    what = export_run(tmp_path / "run", tmp_path / "model", dtype=dtype)
    assert what == f"a checkpoint in {dtype}"
    model = load_model(tmp_path / "model", device="cpu")
    for name, parameter in run.model.named_parameters():
        assert torch.equal(model.get_parameter(name).detach(), parameter.detach()), name


@pytest.mark.parametrize("known", [True, False], ids=["now", "older state"])
def test_a_respelling_is_exported_or_its_base_asked_for(
    tmp_path: Path, plain: Path, talks: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    base, respell = tmp_path / "base", {40: (41, 42)}
    shutil.copytree(plain, base)
    write_respelling(base, respell)
    if not known:
        own = Sft.own_values
        monkeypatch.setattr(Sft, "own_values", lambda self: {k: v for k, v in own(self).items() if k != "respelled"})
    sft(config(talks, run={"steps": 1}), tmp_path / "run", base, on_step=ignore)
    export_run(tmp_path / "run", tmp_path / "model")
    assert respelling_of(tmp_path / "model") == respell
    base.rename(tmp_path / "moved")
    with pytest.raises(TrainingError, match="of which the export needs the respelling; bring it back"):
        export_run(tmp_path / "run", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    shutil.copytree(plain, base)  # another model, and its ids are spelled in another way
    if known:
        with pytest.raises(TrainingError, match="is not the model that the run was started from"):
            export_run(tmp_path / "run", tmp_path / "other")


def test_without_a_respelling_the_base_may_be_gone(tmp_path: Path, plain: Path, talks: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    sft(config(talks, run={"steps": 1}), tmp_path / "run", base, on_step=ignore)
    shutil.rmtree(base)
    assert export_run(tmp_path / "run", tmp_path / "model") == "a checkpoint in bfloat16"


def test_an_adapter_becomes_a_peft_folder(tmp_path: Path, plain: Path, talks: Path) -> None:
    run = sft(config(talks, adapter={"rank": 4}), tmp_path / "run", plain, on_step=ignore)
    assert export_run(tmp_path / "run", tmp_path / "adapter") == "a PEFT adapter"
    model = load_model(plain, device="cpu", reference=True)
    attach_factors(model, read_adapter(tmp_path / "adapter", model.config).factors)
    (part, *_) = run.parts(0)
    with torch.no_grad():
        assert torch.equal(forward(model, part).hidden_TD, forward(run.model, part).hidden_TD)


def test_an_adapter_learns_beside_quantised_weights(tmp_path: Path, plain: Path, talks: Path) -> None:
    convert(plain, tmp_path / "int4", layout="per-expert", form="int4_g32")
    settings = config(talks, adapter={"rank": 4}, optim={"learning_rate": 2e-2, "schedule": "constant"})
    with pytest.raises(ConfigError, match="are quantised; all of a model can be trained from float weights only"):
        Sft(config(talks), tmp_path / "all", tmp_path / "int4")
    told: list[StepReport] = []
    run = sft(settings, tmp_path / "run", tmp_path / "int4", on_step=told.append)
    assert any(isinstance(module, PackedLinear) for module in run.model.modules())
    assert told[-1].loss < told[0].loss - 0.5
    assert export_run(tmp_path / "run", tmp_path / "adapter") == "a PEFT adapter"


def test_held_out_lines_are_evaluated_and_not_trained(tmp_path: Path, plain: Path, talks: Path, lines: Write) -> None:
    told: list[tuple[int, float]] = []
    held = lines("held.jsonl", [{"text": "Nobody trains this."}])
    settings = config(talks, data={"validation": str(held)})
    run = sft(settings, tmp_path, plain, on_step=ignore, on_validation=lambda step, loss: told.append((step, loss)))
    assert [step for step, _ in told] == [3, 6, 7]
    assert told[-1][1] == run.validation_loss()
    assert math.log(32768) * 0.8 < told[-1][1]
    assert len(run.lines.kept) == 13


def test_without_held_out_lines_nothing_is_evaluated(tmp_path: Path, plain: Path, talks: Path) -> None:
    sft(config(talks), tmp_path, plain, on_step=ignore, on_validation=lambda *_: pytest.fail("evaluated"))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all("loss" in record for record in records)


def test_a_run_does_not_go_on_with_other_lines_or_another_model(
    tmp_path: Path, plain: Path, compact: Path, talks: Path
) -> None:
    sft(config(talks, run={"steps": 1}), tmp_path / "run", plain, on_step=ignore)
    with pytest.raises(TrainingError, match="started with other model"):
        sft(config(talks, run={"steps": 2}), tmp_path / "run", compact, on_step=ignore)
    talks.write_text(talks.read_text() + '{"text": "more"}\n')
    with pytest.raises(TrainingError, match=r"started with other data \(sha256 .*bring the old files back"):
        sft(config(talks, run={"steps": 2}), tmp_path / "run", plain, on_step=ignore)


def test_files_may_lie_elsewhere_when_a_run_goes_on(tmp_path: Path, plain: Path, talks: Path) -> None:
    sft(config(talks, run={"steps": 1}), tmp_path / "run", plain, on_step=ignore)
    moved = talks.rename(tmp_path / "moved.jsonl")
    assert sft(config(moved, run={"steps": 2}), tmp_path / "run", plain, on_step=ignore).steps_done == 2


def test_a_run_does_not_go_on_as_another_kind(tmp_path: Path, plain: Path, talks: Path) -> None:
    sft(config(talks, run={"steps": 1}), tmp_path / "run", plain, on_step=ignore)
    with pytest.raises(TrainingError, match="started without the table adapter"):
        sft(config(talks, adapter=ADAPTER), tmp_path / "run", plain, on_step=ignore)
    with pytest.raises(TrainingError, match=r"optim.learning_rate is 0.5, but the run was started with 0.003"):
        sft(config(talks, optim={"learning_rate": 0.5}), tmp_path / "run", plain, on_step=ignore)


@pytest.mark.parametrize(
    ("data", "says"),
    [({"max_tokens": 1000}, "max_tokens is 1000; the model has 512"), ({"documents_per_step": 99}, "there are 13")],
)
def test_what_cannot_be_is_refused_before_training(
    tmp_path: Path, plain: Path, talks: Path, data: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Sft(config(talks, data=data), tmp_path, plain)


def test_epochs_decide_the_steps_and_steps_go_before_epochs(tmp_path: Path, plain: Path, talks: Path) -> None:
    assert Sft(config(talks, run={"epochs": 5}), tmp_path, plain).config.run.steps == math.ceil(13 * 5 / 4)
    assert Sft(config(talks, run={"steps": 2}), tmp_path, plain).config.run.steps == 2


def test_chosen_experts_are_trained_and_all_others_keep_their_bits(
    tmp_path: Path, plain: Path, compact: Path, talks: Path
) -> None:
    choice = tmp_path / "choice.json"
    choice.write_text(json.dumps({"scores": [], "experts": [[1], [0, 3]]}))
    settings = config(talks, experts={"file": str(choice)}, optim={"weight_decay": 0.5})
    seen: list[StepReport] = []
    sft(settings, tmp_path / "run", plain, on_step=seen.append, stopping=lambda: len(seen) == 3)
    run = sft(settings, tmp_path / "run", plain, on_step=ignore)
    assert (run.what, run.steps_done, run.optimizer.uses_muon) == ("chosen experts", 7, False)
    straight = sft(settings, tmp_path / "straight", plain, on_step=ignore)
    for name, master in straight.optimizer.masters.items():
        assert torch.equal(run.optimizer.masters[name], master)
    assert export_run(tmp_path / "run", tmp_path / "model", dtype="float32") == "a checkpoint in float32"
    before, after = (dict(load_model(path, device="cpu").named_parameters()) for path in (plain, tmp_path / "model"))
    for name, value in before.items():
        if ".experts." not in name:
            assert torch.equal(after[name], value), name
            continue
        changed = [e for e in range(4) if not torch.equal(after[name][e], value[e])]
        assert changed == [[1], [0, 3]][int(name.split(".")[2])]
    choice.write_text(json.dumps({"experts": [[1], [0]]}))
    with pytest.raises(TrainingError, match="names other experts than the run was started with"):
        sft(settings, tmp_path / "run", plain, on_step=ignore)
    shared = sft(settings, tmp_path / "shared", compact, on_step=ignore)
    assert export_run(tmp_path / "shared", tmp_path / "small").startswith("int8 groups")
    assert 0 < shared.trained_part < 0.5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "has no member experts"),
        ('{"experts": 3}', "experts are 3; expected a list"),
    ],
    ids=["no file", "deep", "a list", "a number"],
)
def test_a_choice_of_experts_that_is_none_is_refused(
    tmp_path: Path, plain: Path, talks: Path, content: str | None, says: str
) -> None:
    choice = tmp_path / "choice.json"
    if content is not None:
        choice.write_text(content)
    with pytest.raises(ConfigError, match=says):
        Sft(config(talks, experts={"file": str(choice)}), tmp_path / "run", plain)
    with pytest.raises(ConfigError, match="tables adapter and experts; expected one of them"):
        config(talks, experts={"file": str(choice)}, adapter=ADAPTER)
