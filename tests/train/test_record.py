"""The record of a run: every field is there, null only with a reason, and the numbers add up."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.config import preset
from mixtral.parallel.mesh import Mesh
from mixtral.parallel.plan import Axes
from mixtral.plan.sizes import count_parameters
from mixtral.train import record
from mixtral.train.config import PretrainConfig, RecordConfig
from mixtral.train.loop import StepReport
from mixtral.train.pretrain import pretrain
from mixtral.train.record import flops
from mixtral.train.sft import sft
from mixtral.train.tune import SftConfig

Nano = Callable[..., PretrainConfig]
# What the cards of published models leave out, and where a record has it.
FIELDS = (
    *("optimizer.name", "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps"),
    *("optimizer.adamw.betas", "optimizer.adamw.eps", "optimizer.weight_decay", "optimizer.clip_norm"),
    *("optimizer.skip_norm", "optimizer.ema", "optimizer.steps_planned", "training.tokens_per_step"),
    *("training.longest_document", "training.tokens", "training.steps", "training.packing", "training.flops"),
    *("training.seconds", "training.tokens_per_second", "training.mfu", "training.peak_flops_per_second"),
    *("precision.masters_and_moments", "precision.matrix_products", "precision.loss_scaling", "data.sources"),
    *("data.languages", "data.filters", "data.deduplication", "data.epochs", "data.licence", "hardware.device"),
    *("hardware.devices", "hardware.processor", "hardware.threads", "parallelism.data", "parallelism.tensor"),
    *("parallelism.expert", "parallelism.pipeline", "router.balance_coef", "router.z_coef", "router.capacity_factor"),
    *("router.jitter", "router.load_of_last_step", "router.specialisation", "energy.kwh_estimated"),
    *("energy.kwh_method", "energy.co2_grams_estimated", "energy.co2_method", "software.mixtral", "software.torch"),
    *("software.commit", "software.python", "model.num_local_experts"),
)


def ignore(report: StepReport) -> None:
    """Nothing to tell."""


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return found


def at(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found[name]
    return found


def nulls(value: Any, path: str = "") -> set[str]:
    if isinstance(value, dict):
        return {one for name, inner in value.items() for one in nulls(inner, f"{path}.{name}".lstrip("."))}
    return {path} if value is None else set()


def test_a_pretraining_run_has_every_field_and_a_reason_for_each_null(tmp_path: Path, nano: Nano) -> None:
    run = pretrain(nano(run={"steps": 2}), tmp_path, on_step=ignore)
    found = read(tmp_path)
    for field in FIELDS:
        at(found, field)
    assert nulls(found) == found["unknown"].keys()
    assert nulls(found) <= {"router.specialisation", "software.commit", "hardware.processor"}
    assert all(found["unknown"].values())
    assert (found["kind"], found["training"]["steps"], found["training"]["tokens"]) == ("pretrain", 2, run.tokens_total)
    assert found["optimizer"]["muon"]["momentum"] == 0.95
    assert sum(found["data"]["mixture_percent"].values()) == 100
    assert found["seeds"] == {"weights": 1, "data": 1}
    training = found["training"]
    assert training["mfu"] == pytest.approx(training["flops"] / training["seconds"] / training["peak_flops_per_second"])


def test_what_only_the_user_knows_is_null_with_the_key_that_states_it(tmp_path: Path, plain: Path, talks: Path) -> None:
    tables: dict[str, Any] = {
        "data": {"train": str(talks), "documents_per_step": 4, "max_tokens": 200},
        "run": {"steps": 1, "dtype": "float32", "threads": 1},
    }
    sft(SftConfig.from_dict(tables, source="x"), tmp_path / "a", plain, on_step=ignore)
    found = read(tmp_path / "a")
    for name in ("sources", "languages", "filters", "licence"):
        assert found["data"][name] is None
        assert found["unknown"][f"data.{name}"] == f"only who made the files knows; state it as record.{name}"
    assert nulls(found) == found["unknown"].keys()
    assert (found["data"]["lines"], found["data"]["repeated_lines"], found["data"]["examples"]) == (12, 0, 13)
    assert found["optimizer"]["name"] == "AdamW"
    stated = {"record": {"sources": "the desk's own talks", "watts": 100.0, "co2_grams_per_kwh": 50.0}}
    run = sft(SftConfig.from_dict(tables | stated, source="x"), tmp_path / "b", plain, on_step=ignore)
    found = read(tmp_path / "b")
    assert found["data"]["sources"] == "the desk's own talks"
    assert "data.sources" not in found["unknown"]
    energy = found["energy"]
    assert energy["kwh_estimated"] == pytest.approx(100 * run.seconds_total / 3.6e6)
    assert energy["co2_grams_estimated"] == pytest.approx(50 * energy["kwh_estimated"])
    assert "as stated in record.watts" in energy["kwh_method"]


def test_what_the_record_says_may_be_changed_when_a_run_goes_on(tmp_path: Path, nano: Nano) -> None:
    pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    assert "assumed 10 W" in read(tmp_path)["energy"]["kwh_method"]
    stated = dataclasses.replace(nano(run={"steps": 2}), record=RecordConfig(watts=5.0))
    pretrain(stated, tmp_path, on_step=ignore)
    assert "times 5 W, as stated" in read(tmp_path)["energy"]["kwh_method"]


def test_several_ranks_count_together(tmp_path: Path, nano: Nano) -> None:
    run = pretrain(nano(run={"steps": 1, "threads": 1}), tmp_path, on_step=ignore)
    one = record.build_record(run)
    run.mesh = Mesh(Axes(dp=2, tp=2), 0, torch.device("cpu"), {})
    four = record.build_record(run)
    assert (four["hardware"]["device"], four["hardware"]["devices"], one["hardware"]["devices"]) == ("cpu", 4, 1)
    for part, name, times in (
        ("training", "peak_flops_per_second", 4),
        ("training", "mfu", 1 / 4),
        ("energy", "kwh_estimated", 4),
        ("energy", "co2_grams_estimated", 4),
    ):
        assert four[part][name] == pytest.approx(times * one[part][name])
    assert "10 W for each of 1 threads of 4 processes" in four["energy"]["kwh_method"]


def test_of_accelerators_nothing_is_made_up(tmp_path: Path, nano: Nano) -> None:
    run = pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    run.mesh = Mesh(Axes(dp=8), 0, torch.device("cuda", 0), {})
    found = record.build_record(run)
    assert (found["hardware"]["device"], found["hardware"]["devices"]) == ("cuda", 8)
    named = {"training.peak_flops_per_second", "training.peak_is", "training.mfu"}
    named |= {"energy.kwh_estimated", "energy.kwh_method", "energy.co2_grams_estimated"}
    assert named <= nulls(found) == found["unknown"].keys()
    assert "no step" not in found["unknown"]["training.mfu"]
    assert "record.watts" in found["unknown"]["energy.kwh_estimated"]
    run.config = dataclasses.replace(run.config, record=RecordConfig(watts=5600.0))
    stated = record.build_record(run)
    assert stated["energy"]["kwh_estimated"] == pytest.approx(5600 * run.seconds_total / 3.6e6)
    assert "energy.kwh_estimated" not in stated["unknown"]


def test_the_agreement_of_a_stopped_run_is_that_of_its_step_or_null(tmp_path: Path, nano: Nano) -> None:
    seen: list[StepReport] = []
    pretrain(nano(), tmp_path, on_step=seen.append, stopping=lambda: len(seen) == 4)
    found = read(tmp_path)
    assert found["router"]["choices_as_at_start"] is None
    assert "save_every" in found["unknown"]["router.choices_as_at_start"]
    pretrain(nano(), tmp_path, on_step=seen.append)
    assert read(tmp_path)["router"]["choices_as_at_start"] == seen[-1].agreement < 1


def test_operations_are_six_per_token_and_active_parameter_and_attention() -> None:
    config = preset("tiny")
    counts = count_parameters(config)
    active = counts.read_per_token - counts.norms
    assert flops(config, 1000, 0) == pytest.approx(6 * active * 1000)
    heads = config.num_attention_heads * config.head_dim
    # Two products of length x length x heads, of which half is needed, forward and twice backward.
    attention = config.num_hidden_layers * 2 * (2 * 512 * 512 * heads) / 2 * 3
    assert flops(config, 512, 512 * 512) - flops(config, 512, 0) == pytest.approx(attention)
    assert flops(config, 1000, 0, trained=0.0) == pytest.approx(4 * active * 1000)


def test_a_disk_that_refuses_the_record_costs_a_warning(
    tmp_path: Path, nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, *args: Any, **options: Any) -> int:
        if path.name == ".record.json.partial":
            raise OSError(28, "No space left on device")
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match=r"record.json: cannot be written \(No space left .*; training goes on"):
        run = pretrain(nano(run={"steps": 1}), tmp_path, on_step=ignore)
    assert run.steps_done == 1
    assert not list(tmp_path.glob("*record*"))


def test_the_commit_is_that_of_this_checkout_or_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record.commit_of_source.cache_clear()
    with warnings.catch_warnings(action="error"):
        found = record.commit_of_source()
    assert found is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", found)
    record.commit_of_source.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit_of_source() is None
    record.commit_of_source.cache_clear()


def test_a_commit_of_files_that_were_changed_since_is_dirty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "src" / "mixtral"
    (package / "train").mkdir(parents=True)
    (package / "train" / "record.py").write_text("one")
    monkeypatch.setattr(record, "__file__", str(package / "train" / "record.py"))

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x.example", *words], check=True
        )

    def found() -> str:
        record.commit_of_source.cache_clear()
        return record.commit_of_source() or ""

    git("init", "-q")
    git("add", "src")
    git("commit", "-q", "-m", "one")
    commit = found()
    assert len(commit) == 40
    (tmp_path / "notes").write_text("beside the package")
    assert found() == commit
    (package / "train" / "record.py").write_text("two")
    assert found() == f"{commit}-dirty"
    record.commit_of_source.cache_clear()
