"""The newest state of a pretraining run -> the compact folder that ``mixtral.load`` reads."""

from __future__ import annotations

from pathlib import Path

import torch

from mixtral.errors import TrainingError
from mixtral.model import Mixtral
from mixtral.train import checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.data import DeskData
from mixtral.weights.compact import save_compact
from mixtral.weights.names import EMBEDDING, HEAD
from mixtral.weights.vocab import expand_rows

__all__ = ["export_run"]


def export_run(run_folder: Path, destination: Path) -> None:
    """Write the float32 masters of the newest state as int8 groups, with the respelling of the ids it did not train.

    Raises:
        TrainingError: there is no such run, or it holds no whole state.
        CheckpointError: a size of the model is no multiple of 32, or the destination cannot be written.
    """
    saved = checkpoint.load_latest(run_folder) if run_folder.is_dir() else None
    if saved is None:
        what = "holds no whole run state" if run_folder.is_dir() else "no such folder"
        raise TrainingError(f"{run_folder}: {what}; expected the folder that `mixtral train pretrain --out` wrote")
    step, tensors, values = saved
    config = PretrainConfig.from_dict(values["config"], source=f"{run_folder}: state of step {step}")
    data = DeskData(config.data, values["trained_ids"])
    model = Mixtral(config.model, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            master = tensors[f"master.{name}"]
            parameter.copy_(expand_rows(master, data.row_of_id) if name in (EMBEDDING, HEAD) else master)
    numbers = {
        "steps": step,
        "steps_planned": config.run.steps,
        "tokens": values["tokens_total"],
        "seconds": round(values["seconds_total"]),
        "seed": config.run.seed,
        "data_seed": config.data.seed,
        "trained_rows": len(values["trained_ids"]),
        "torch": values["torch"],
    }
    metadata = {name: str(value) for name, value in numbers.items()}
    save_compact(model, destination, row_of_id=data.row_of_id, respell=data.respell, metadata=metadata)
