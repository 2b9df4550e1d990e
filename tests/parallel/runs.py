"""Training runs on the ranks of a test: each job trains in a folder and returns what its steps reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral.parallel.mesh import Mesh
from mixtral.train.config import PretrainConfig
from mixtral.train.pretrain import Pretraining, StepReport, pretrain


def train(mesh: Mesh | None, tables: Mapping[str, Any], folder: str, last: int | None = None) -> list[StepReport]:
    """Train in a folder, to the end or to step ``last``; the reports, on the first rank alone."""
    seen: list[StepReport] = []
    done = 0

    def stopping() -> bool:
        return last is not None and run_steps(seen, done) >= last

    config = PretrainConfig.from_dict(tables, source="test")
    pretrain(config, Path(folder), on_step=seen.append, stopping=stopping, mesh=mesh)
    return seen


def run_steps(seen: list[StepReport], before: int) -> int:
    return seen[-1].step if seen else before


def step(mesh: Mesh | None, tables: Mapping[str, Any], folder: str) -> StepReport:
    """One step, nothing saved."""
    return Pretraining(PretrainConfig.from_dict(tables, source="test"), Path(folder), mesh).step()
