"""How long the steps of a pretraining run wait for its saves.

    python benchmarks/training/stall.py --turns 3

``tiny`` on documents of the desk, saved by a thread and in place, in turns. A stall is what the steps between two saves
take longer than as many steps without one: the copy, or the whole save, and what the thread takes from the steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from mixtral.bench.machine import machine
from mixtral.train import pretrain as recipe
from mixtral.train.config import PretrainConfig
from mixtral.train.pretrain import Pretraining, pretrain

EVERY, SAVES = 6, 3


class _ByThread(Pretraining):
    def validation_loss(self, batches: int = 4) -> None:  # type: ignore[override]
        """None: an evaluation is not part of a save."""


class _InPlace(_ByThread):
    def snapshot(self) -> None:
        """None: as where memory is short."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    found: dict[str, list[float]] = {"thread": [], "in_place": []}
    for _ in range(turns):
        for name, kind in (("thread", _ByThread), ("in_place", _InPlace)):
            found[name] += stalls(kind)
    report = {
        name: {"median": statistics.median(costs), "most": max(costs), "saves": len(costs)}
        for name, costs in found.items()
    }
    print(json.dumps({"seconds": report, "machine": machine()}, indent=1))


def stalls(kind: Callable[..., Pretraining]) -> list[float]:
    """Seconds that each save costs. All steps are the same one, so that they differ in nothing else."""
    times: list[float] = []
    config = PretrainConfig.from_dict(
        {
            "model": {"preset": "tiny"},
            "data": {"seed": 2, "documents_per_step": 96, "trained_rows": 4095},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
            "run": {"steps": EVERY * (SAVES + 1) + 1, "save_every": EVERY},
        },
        source="stall.py",
    )
    first = Pretraining.parts
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(recipe, "Pretraining", kind),
        patch.object(kind, "parts", lambda run, step, split="train": first(run, 0, split)),
    ):
        pretrain(config, Path(folder), on_step=lambda report: times.append(time.perf_counter()))
    took = [after - before for before, after in itertools.pairwise(times)]
    # took[i] is that of step i + 2; the first steps have no save yet.
    usual = statistics.median(took[1 : EVERY - 1])
    return [sum(took[i : i + EVERY]) - EVERY * usual for i in range(EVERY - 1, EVERY * SAVES, EVERY)]


if __name__ == "__main__":
    main()
