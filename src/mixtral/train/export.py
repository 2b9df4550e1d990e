"""The newest state of a run -> a folder that ``mixtral.load`` reads: a compact or an ordinary model, or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.adapters import Factors
from mixtral.adapters.factors import EXPERTS, new_factors, target_of
from mixtral.adapters.peft import write_adapter
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError, TrainingError
from mixtral.model import Mixtral
from mixtral.tokenizer import Tokenizer
from mixtral.train import checkpoint
from mixtral.train.start import fingerprint, load_start
from mixtral.train.tune import AdapterConfig
from mixtral.weights import dtype_of, respelling_of, save_compact, save_model, write_respelling
from mixtral.weights.names import EMBEDDING, HEAD, is_router
from mixtral.weights.save import check_folder
from mixtral.weights.vocab import build_respell, expand_rows, row_map

__all__ = ["export_run"]


def export_run(
    run_folder: Path, destination: Path, *, dtype: str | None = None, averaged: bool = False, overwrite: bool = False
) -> str:
    """Write the float32 masters of the newest state; what was written, in words.

    A run on shared vocabulary rows becomes int8 groups, with the respelling of the ids it did not train, or with
    ``dtype`` an ordinary checkpoint with the respelling beside it; a run of all weights of another model an ordinary
    checkpoint (None: bfloat16); a run of an adapter a PEFT folder. ``averaged`` takes the averaged weights.

    Raises:
        TrainingError: there is no such run, it holds no whole state, or it has no averaged weights; or the export needs
            the model that the run was started from, which is not there any more.
        ConfigError: ``dtype`` is not a model's, or has no effect on what the run becomes.
        CheckpointError: a size of the model is no multiple of 32, or the destination cannot be written, or is not empty
            (and not ``overwrite``).
    """
    wanted = dtype_of(dtype)
    _check_destination(destination, overwrite=overwrite)
    saved = checkpoint.load_latest(run_folder) if run_folder.is_dir() else None
    if saved is None:
        what = "holds no whole run state" if run_folder.is_dir() else "no such folder"
        raise TrainingError(f"{run_folder}: {what}; expected the folder that `mixtral train ... --out` wrote")
    step, tensors, values = saved
    prefix = "average." if averaged else "master."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not weights:
        raise TrainingError(f"{run_folder}: the run kept no averaged weights; they need optim.ema above 0")
    config = values["config"]
    if config.get("adapter"):
        if dtype is not None:
            what = "an adapter, in float32"
            raise ConfigError(f"dtype is {dtype!r}, but the run becomes {what}; leave dtype out", param="dtype")
        _export_adapter(weights, values, destination, overwrite=overwrite)
        return "a PEFT adapter"
    if values.get("experts"):
        weights = _with_experts(weights, values)
    sizes = MixtralConfig.from_dict(
        values.get("model") or config["model"], source=f"{run_folder}: state of step {step}"
    )
    if values["trained_ids"] is None:
        respell = _respelling(values)
        model = _filled(Mixtral(sizes, device="meta"), weights, wanted or torch.bfloat16)
        save_model(model, destination, overwrite=overwrite)
        write_respelling(destination, respell)
        return f"a checkpoint in {dtype or 'bfloat16'}"
    sizes = sizes.replace(vocab_size=values.get("vocab_size", sizes.vocab_size))
    row_of_id, respell = _vocabulary(values)
    weights |= {name: expand_rows(weights[name], row_of_id) for name in (EMBEDDING, HEAD)}
    model = _filled(Mixtral(sizes, device="meta"), weights, wanted or torch.float32)
    if dtype is not None:
        save_model(model, destination, overwrite=overwrite)
        write_respelling(destination, respell)
        return f"a checkpoint in {dtype}"
    save_compact(model, destination, row_of_id=row_of_id, respell=respell, metadata=_notes(step, values))
    return "int8 groups with shared vocabulary rows"


def _check_destination(folder: Path, *, overwrite: bool) -> None:
    try:
        check_folder(folder, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _with_experts(chosen: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Tensor]:
    """All weights of the base, with the chosen experts as they were trained."""
    weights = load_start(_base(values, "all other weights"), dtype="float32", full=True).masters
    for name, value in chosen.items():
        owner, _, leaf = name.rpartition(".")
        stack, _, expert = leaf.rpartition("_")
        weights[f"{owner}.{stack}_proj"][int(expert)] = value
    return weights


def _respelling(values: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    """How the base spells ids without rows of their own; without it they would all look alike to the model."""
    respelled = values.get("respelled")
    if not values.get("base") or respelled is False:
        return {}
    base = Path(values["base"])
    if respelled is None and base.exists():  # the state does not tell, and its fingerprint may be of an older kind
        return respelling_of(base)
    return respelling_of(_base(values, "the respelling"))


def _base(values: dict[str, Any], needed: str) -> Path:
    """Where the model lies that the run was started from, if it is still the same."""
    base = Path(values["base"])
    if not base.exists() or fingerprint(base) != values["base_sha256"]:
        raise TrainingError(
            f"{base}: is not the model that the run was started from, of which the export needs {needed}; bring it back"
        )
    return base


def _vocabulary(values: dict[str, Any]) -> tuple[Tensor, dict[int, tuple[int, ...]]]:
    """The row of every id, and the spelling of those that have none of their own."""
    trained = values["trained_ids"]
    tokenizer = Tokenizer.from_version(values.get("tokenizer", "v3"))
    respell = build_respell([tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], set(trained))
    return row_map(trained, tokenizer.vocab_size), respell


def _notes(step: int, values: dict[str, Any]) -> dict[str, str]:
    """What the file says about the run."""
    config = values["config"]
    numbers = {
        "kind": values.get("kind", "pretrain"),
        "steps": step,
        "steps_planned": config["run"]["steps"],
        "tokens": values["tokens_total"],
        "seconds": round(values["seconds_total"]),
        "seed": config["run"]["seed"],
        "data_seed": config["data"]["seed"],
        "trained_rows": len(values["trained_ids"]),
        "torch": values["torch"],
    }
    if values.get("base_sha256"):
        numbers["base_sha256"] = values["base_sha256"]
    return {name: str(value) for name, value in numbers.items()}


def _filled(model: Mixtral, weights: dict[str, Tensor], dtype: torch.dtype) -> Mixtral:
    """A model of those weights; routers stay float32."""
    rounded = {name: value if is_router(name) else value.to(dtype) for name, value in weights.items()}
    model.load_state_dict(rounded, assign=True)
    return model


def _export_adapter(weights: dict[str, Tensor], values: dict[str, Any], destination: Path, *, overwrite: bool) -> None:
    adapter = AdapterConfig(**values["config"]["adapter"])
    sizes = MixtralConfig.from_dict(values["model"], source="state")
    factors = {}
    for parameter, blank in new_factors(sizes, adapter.lora(), torch.float32).items():
        target = target_of(parameter)
        owner = parameter.rpartition(".")[0]
        pair = f"{owner}.{target if target in EXPERTS else 'lora'}"
        factors[parameter] = Factors(weights[f"{pair}_a"], weights[f"{pair}_b"], blank.scale)
    base = values["config"]["model"]["path"]
    write_adapter(destination, sizes, factors, base=base, dropout=adapter.dropout, overwrite=overwrite)
