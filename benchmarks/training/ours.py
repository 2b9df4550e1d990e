"""This project in the contests: its recipes, a step at a time."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from gate import Gate
from workloads import documents

from mixtral.config import preset
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.ops import head_cross_entropy
from mixtral.ops.memory import keep_freed
from mixtral.train.config import OptimConfig
from mixtral.train.dpo import Dpo
from mixtral.train.losses import router_losses
from mixtral.train.optim import Optimizer
from mixtral.train.sft import Sft
from mixtral.train.tune import DpoConfig, SftConfig

__all__ = ["pretrain", "sizes", "starting_weights", "tune"]


def sizes(settings: dict[str, Any]) -> Any:
    """The model of a pretraining contest."""
    config = preset("tiny").replace(vocab_size=settings["vocabulary"])
    if settings["model"] == "mid":
        config = config.replace(hidden_size=512, intermediate_size=1792, num_attention_heads=16, num_key_value_heads=8)
    return config


def starting_weights(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same for everyone, float32."""
    model = Mixtral(sizes(settings))
    initialise(model, seed=0)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def pretrain(gate: Gate, settings: dict[str, Any]) -> None:
    """bfloat16 products with float32 masters; Muon and AdamW, or AdamW alone; both router losses."""
    keep_freed()  # as every training run of ours
    start = starting_weights(settings)
    model = Mixtral(sizes(settings), dtype=torch.bfloat16)
    model.load_state_dict(start)
    kind = "adamw" if settings["who"] == "ours-adamw" else "muon"
    optimizer = Optimizer(model, OptimConfig(optimizer=kind))
    optimizer.masters = {name: value.float().clone() for name, value in start.items()}
    for number in itertools.count():
        gate.begin()
        texts = documents(number, settings)
        context = Documents([len(ids) - 1 for ids in texts])
        inputs = torch.tensor([i for ids in texts for i in ids[:-1]])
        labels = torch.tensor([i for ids in texts for i in ids[1:]])
        out = model(Batch(inputs, context.positions_T, context))
        weights = torch.full((len(labels),), 1 / len(labels))
        loss, _ = head_cross_entropy(out.hidden_TD, model.lm_head.weight, labels, weights)
        balance, z = router_losses(out.routes)
        (loss + 0.01 * balance + 0.001 * z).backward()  # type: ignore[no-untyped-call]
        optimizer.accumulate()
        optimizer.step(settings["rate"])
        gate.end(len(labels), float(loss.detach()))


def tune(gate: Gate, settings: dict[str, Any]) -> None:
    """SFT or DPO as the commands run it, without saving."""
    dpo = settings["contest"] == "dpo"
    values: dict[str, Any] = {
        "model": {"path": settings["base"]},
        "data": {
            "train": settings["data"],
            "documents_per_step": settings["documents"],
            "max_tokens": settings["length"],
            "seed": settings["seed"],
        },
        "optim": {"learning_rate": settings["rate"], "schedule": "constant", "warmup_steps": 0, "skip_norm": 0.0},
        "run": {"steps": settings["all_steps"], "dtype": "bfloat16", "threads": settings["threads"]},
    }
    if settings["rank"]:
        values["adapter"] = {"rank": settings["rank"], "alpha": 2.0 * settings["rank"]}
    if dpo:
        values["dpo"] = {"nll_coef": 0.0, "reference": "cached"}
    base = Path(settings["quantised"] if settings["who"] == "ours-int4" else settings["base"])
    with tempfile.TemporaryDirectory() as folder:
        run: Dpo | Sft
        if dpo:
            run = Dpo(DpoConfig.from_dict(values, source="benchmark"), Path(folder), base)
        else:
            run = Sft(SftConfig.from_dict(values, source="benchmark"), Path(folder), base)
        while True:
            gate.begin()
            report = run.step()
            gate.end(report.tokens, report.loss)
