"""Training runs on the ranks of a test: each job trains in a folder and returns what its steps reported."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mixtral.errors import ConfigError, TrainingError
from mixtral.parallel.mesh import Mesh
from mixtral.train import checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.dpo import Dpo, PairBatch
from mixtral.train.pretrain import Pretraining, StepReport, pretrain
from mixtral.train.reference import Said
from mixtral.train.sft import Sft
from mixtral.train.tune import DpoConfig, SftConfig

Tables = Mapping[str, Any]


def config_of(tables: Tables) -> PretrainConfig:
    return PretrainConfig.from_dict(tables, source="test")


def train(mesh: Mesh | None, tables: Tables, folder: str, count: int | None = None) -> list[StepReport]:
    """Train in a folder, to the end or ``count`` steps; the reports, on the first rank alone."""
    seen: list[StepReport] = []
    pretrain(
        config_of(tables),
        Path(folder),
        on_step=seen.append,
        stopping=lambda: count is not None and len(seen) >= count,
        mesh=mesh,
    )
    return seen


def validation(mesh: Mesh | None, tables: Tables, folder: str) -> tuple[int, float | None]:
    """Steps of the newest state and its validation loss."""
    run = Pretraining(config_of(tables), Path(folder), mesh)
    return run.steps_done, run.validation_loss()


def refused(mesh: Mesh, tables: Tables, folder: str, step: int) -> str:
    """The words by which a run's step is refused."""
    run = Pretraining(config_of(tables), Path(folder), mesh)
    run.steps_done = step
    before = {name: part.clone() for name, part in run.optimizer.parts.items()}
    try:
        run.step()
    except TrainingError as error:
        assert all(torch.equal(before[name], part) for name, part in run.optimizer.parts.items())
        return str(error)
    return "trained"


def averaged(mesh: Mesh | None, tables: Tables, folder: str) -> tuple[float | None, float | None, float | None]:
    """Validation loss of the weights, of the averaged ones, and of the weights again, after two steps."""
    run = Pretraining(config_of(tables), Path(folder), mesh)
    run.step()
    run.step()
    return run.validation_loss(), run.averaged_loss(), run.validation_loss()


def end_while_saving(mesh: Mesh, tables: Tables, folder: str, place: str) -> None:
    """One rank dies at a ``place`` while the second state is saved; this job has no answer."""
    run = Pretraining(config_of(tables), Path(folder), mesh)
    run.step()
    run.save()
    run.step()
    if mesh.rank == (1 if place != "commit" else 0):
        name = {"before": "_write_tensors", "after": "_of_all_ranks", "commit": "_commit"}[place]
        setattr(checkpoint, name, lambda *arguments, **named: os._exit(9))
    run.save()


def failing_disk(mesh: Mesh, tables: Tables, folder: str, rank: int, name: str) -> str:
    """The words by which saving is refused when one rank's disk refuses, and that the next try succeeds."""
    run = Pretraining(config_of(tables), Path(folder), mesh)
    run.step()
    run.save()
    run.step()
    right = getattr(checkpoint, name)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    if mesh.rank == rank:
        setattr(checkpoint, name, fail)
    try:
        run.save()
    except TrainingError as error:
        return str(error)
    finally:
        setattr(checkpoint, name, right)
    return "saved"


def resave(mesh: Mesh, tables: Tables, folder: str) -> None:
    """Read the newest state and write it again."""
    Pretraining(config_of(tables), Path(folder), mesh).save()


def validation_warned(mesh: Mesh, tables: Tables, folder: str) -> tuple[int, float | None]:
    """As ``validation``; newer states are passed over with a warning, on every rank."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = validation(mesh, tables, folder)
    assert any("passed over step-00000004" in str(warning.message) for warning in caught)
    return found


def tune(
    mesh: Mesh | None, kind: str, tables: Tables, folder: str, base: str, count: int | None = None
) -> list[StepReport]:
    """Fine-tune a model in a folder, as ``train``."""
    seen: list[StepReport] = []
    recipe: Any = {"sft": (Sft, SftConfig), "dpo": (Dpo, DpoConfig)}[kind]
    recipe[0].train(
        recipe[1].from_dict(tables, source="test"),
        Path(folder),
        Path(base),
        on_step=seen.append,
        stopping=lambda: count is not None and len(seen) >= count,
        mesh=mesh,
    )
    return seen


def refused_tuning(mesh: Mesh, tables: Tables, folder: str, base: str) -> str:
    """The words by which a run is refused."""
    try:
        Sft(SftConfig.from_dict(tables, source="test"), Path(folder), Path(base), mesh)
    except ConfigError as error:
        return str(error)
    return "built"


def reference_without_space(mesh: Mesh, tables: Tables, folder: str, base: str) -> str:
    """The words by which a run on pairs is refused when the first rank's disk refuses the reference's second part."""
    right, parts = Dpo._say, []

    def fail(run: Dpo, part: PairBatch) -> Said:
        parts.append(part)
        if len(parts) == 2:
            raise OSError(28, "No space left on device")
        return right(run, part)

    Dpo._say = fail
    try:
        Dpo(DpoConfig.from_dict(tables, source="test"), Path(folder), Path(base), mesh)
    except TrainingError as error:
        return str(error)
    finally:
        Dpo._say = right
    return "prepared"


def tuning_without_space(mesh: Mesh, tables: Tables, folder: str, base: str) -> str:
    """The words by which a save is refused when the first rank's disk refuses."""
    run = Sft(SftConfig.from_dict(tables, source="test"), Path(folder), Path(base), mesh)
    run.step()
    right = checkpoint._commit

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoint._commit = fail
    try:
        run.save()
    except TrainingError as error:
        return str(error)
    finally:
        checkpoint._commit = right
    return "saved"
