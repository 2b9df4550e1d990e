"""Train `examples/nano.toml` anew and compare its validation loss with the published one; `make reproduce-nano`.

    python benchmarks/training/reproduce_nano.py               # a run that was stopped goes on
    python benchmarks/training/reproduce_nano.py --seed 3      # how far runs differ: another seed, nothing is compared

The weights are not the same on another processor, where sums are rounded in another order; the loss is, within the
tolerance. Ends with an error if it is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from mixtral.bench.machine import machine
from mixtral.train.config import read_pretrain_config
from mixtral.train.loop import StepReport
from mixtral.train.pretrain import pretrain

CONFIG = Path(__file__).parents[2] / "examples" / "nano.toml"
PUBLISHED, TOLERANCE = 1.034, 0.05
"""Validation loss in nats per token of the assistant, and the most that a run may differ from it. Seed 3 gave 1.050."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder of the run")
    parser.add_argument("--seed", type=int, help="of weights and documents, instead of those of the file")
    parser.add_argument("--anew", action="store_true", help="remove the folder first")
    given = parser.parse_args()
    config = read_pretrain_config(CONFIG)
    if given.seed is not None:
        config = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, seed=given.seed),
            data=dataclasses.replace(config.data, seed=given.seed),
        )
    if given.anew:
        shutil.rmtree(given.out, ignore_errors=True)

    def on_step(report: StepReport) -> None:
        if report.step % 20 == 0:
            speed = report.tokens / report.seconds
            print(f"step {report.step}/{config.run.steps}  loss {report.loss:.4f}  {speed:,.0f} tok/s", file=sys.stderr)

    run = pretrain(config, given.out, on_step=on_step)
    loss = run.validation_loss()
    answer = {
        "validation_loss": loss,
        "published": PUBLISHED,
        "tolerance": TOLERANCE,
        "tokens": run.tokens_total,
        "seconds": run.seconds_total,
        "machine": machine(),
    }
    print(json.dumps(answer, indent=1))
    if given.seed is None and abs(loss - PUBLISHED) > TOLERANCE:
        sys.exit(f"the validation loss is {loss:.4f}; expected {PUBLISHED} within {TOLERANCE}")


if __name__ == "__main__":
    main()
