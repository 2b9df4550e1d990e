"""Training on an accelerator gives the numbers of the CPU; where there is none, the command says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.cli import main
from mixtral.parallel.mesh import alone
from mixtral.train.config import PretrainConfig
from mixtral.train.dpo import Dpo
from mixtral.train.pretrain import Pretraining
from mixtral.train.sft import Sft
from mixtral.train.training import Training
from mixtral.train.tune import DpoConfig, SftConfig

Nano = Callable[..., PretrainConfig]
TABLES: dict[str, Any] = {"run": {"epochs": 1, "dtype": "float32", "threads": 1}, "optim": {"learning_rate": 1e-3}}
needs_one = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


def two_steps(run: Training[Any, Any]) -> list[float]:
    first, second = run.step(), run.step()
    run.save()
    return [first.loss, first.balance, first.grad_norm, second.loss]


@needs_one
@pytest.mark.parametrize("adapter", [None, {"rank": 4, "dropout": 0.0}], ids=["all", "adapter"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_fine_tuning_on_an_accelerator_is_that_on_the_cpu(
    tmp_path: Path, compact: Path, talks: Path, pairs: Path, kind: str, adapter: dict[str, Any] | None
) -> None:
    data = {"train": str(talks if kind == "sft" else pairs), "documents_per_step": 4, "max_tokens": 200}
    recipe: Any = {"sft": (Sft, SftConfig), "dpo": (Dpo, DpoConfig)}[kind]
    config = recipe[1].from_dict(TABLES | {"data": data} | ({"adapter": adapter} if adapter else {}), source="test")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    found = [
        two_steps(recipe[0](config, tmp_path / place.type, compact, alone(place)))
        for place in (torch.device("cpu"), device)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@needs_one
def test_pretraining_on_an_accelerator_is_that_on_the_cpu(tmp_path: Path, nano: Nano) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    found = [
        two_steps(Pretraining(nano(), tmp_path / place.type, alone(place))) for place in (torch.device("cpu"), device)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-2)  # Muon rounds to bfloat16


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_device_that_is_not_there_is_refused(
    tmp_path: Path, talks: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    words = ["train", kind, "--data", str(talks), "--out", str(tmp_path / "run"), "--device", "cuda"]
    assert main(words) == 2
    assert "device is 'cuda', which this machine lacks; it has cpu" in capsys.readouterr().err
