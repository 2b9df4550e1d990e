"""The numbers of ``log.jsonl`` for TensorBoard, if it is installed."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixtral.errors import ConfigError
from mixtral.train.loop import StepReport

__all__ = ["Board", "check_installed"]

_GROUPS = {
    "loss": ("loss", "balance", "z"),
    "router": ("load_min", "load_max", "entropy", "max_violation", "dead", "collapsed", "agreement"),
    "optim": ("grad_norm", "learning_rate", "skipped"),
    "preference": (
        *("margin", "accuracy", "kl", "chosen_logprob", "rejected_logprob"),
        "routing_agreement",
    ),
}


def check_installed() -> None:
    """Raises ConfigError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard needs the package tensorboard, which is not installed: pip install 'mixtral[train]'",
            param="tensorboard",
        )


class Board:
    """Event files in a folder ``tensorboard``; steps that are trained again replace what stood there.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        check_installed()
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def step(self, report: StepReport) -> None:
        """Write the numbers of a step."""
        values = asdict(report)
        writer = self._open(report.step)
        for group, names in _GROUPS.items():
            for name in names:
                if name in values and math.isfinite(values[name]):
                    writer.add_scalar(f"{group}/{name}", values[name], report.step)
        writer.add_scalar("speed/tokens_per_second", report.tokens / max(report.seconds, 1e-9), report.step)

    def validation(self, step: int, loss: float) -> None:
        """Write the loss on held-out text."""
        writer = self._open(step + 1)  # the numbers of this step may be there already, and it is not trained again
        writer.add_scalar("loss/validation", loss, step)
        writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        return self._writer
