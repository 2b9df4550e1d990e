"""Adapters for programs that know no stacked experts: PEFT with w1, w2 and w3 of every expert, and Mistral's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixtral.adapters.factors import Factors, check_factors, target_of
from mixtral.adapters.peft import (
    ADAPTER_FILES,
    CONFIG_NAME,
    MISTRAL_NAME,
    PEFT_PREFIX,
    WEIGHTS_NAME,
    refuse_folder,
)
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.files.commit import Commit
from mixtral.files.safetensors import inside, read_json, record, write_shard
from mixtral.weights.consolidated import PARAMS_NAME
from mixtral.weights.names import pieces
from mixtral.weights.save import to_json

__all__ = ["SCALING", "modules_of", "write_mistral", "write_per_expert"]

SCALING = 2.0
"""What mistral-inference multiplies with unless it is told otherwise."""


def modules_of(
    config: MixtralConfig, factors: Mapping[str, Factors], layout: Literal["per-expert", "consolidated"]
) -> dict[str, Factors]:
    """The pairs of every matrix, by the name of its module in a layout. Gate and up have the same a."""
    found = {}
    for piece in pieces(config, layout):
        if piece.parameter not in factors:
            continue
        a, b, scale = factors[piece.parameter]
        if piece.expert is not None:
            a, b = a[piece.expert], b[piece.expert]
        if piece.half != "both":
            b = b.chunk(2)[0 if piece.half == "gate" else 1]
        found[piece.name.removesuffix(".weight")] = Factors(a.float(), piece.to_file(b.float()), scale)
    return found


def write_per_expert(
    folder: Path,
    config: MixtralConfig,
    factors: Mapping[str, Factors],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PEFT folder with a module per matrix, as before experts were stacked. Scales go into lora_B.

    Raises:
        CheckpointError: the factors do not fit the config, the folder holds an adapter (and not ``overwrite``), or
            cannot be written.
    """
    check_factors(config, factors, source="adapter")
    modules = modules_of(config, factors, "per-expert")
    whole = all(_layers(factors, target) == config.num_hidden_layers for target in map(target_of, factors))
    named: dict[str, int] = {}
    for module, pair in modules.items():
        named[module.rpartition(".")[2] if whole and _is_even(modules, module) else module] = pair.rank
    first = next(iter(named.values()))
    others = {name: rank for name, rank in named.items() if rank != first}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "r": first,
        "lora_alpha": first,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(named),
        "lora_dropout": 0.0,
    }
    tensors = {f"{PEFT_PREFIX}{name}": value for name, value in _tensors(modules, 1.0).items()}
    _write(folder, {WEIGHTS_NAME: tensors, CONFIG_NAME: values}, torch.float32, overwrite=overwrite)


def _layers(factors: Mapping[str, Factors], target: str) -> int:
    return sum(target_of(parameter) == target for parameter in factors)


def _is_even(modules: Mapping[str, Factors], module: str) -> bool:
    """Whether all modules of the same kind have the same rank."""
    kind = module.rpartition(".")[2]
    return len({pair.rank for name, pair in modules.items() if name.rpartition(".")[2] == kind}) == 1


def write_mistral(
    folder: Path,
    config: MixtralConfig,
    factors: Mapping[str, Factors],
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> None:
    """Write ``lora.safetensors`` with Mistral's names, for a scale of ``SCALING``, in the dtype of the model that is to
    load it, as mistral-inference demands. Matrices without a pair get one of zeros, which it demands as well.

    Raises:
        CheckpointError: as ``write_per_expert``; or the folder has a ``params.json`` (and not ``overwrite``), or one
            of a model.
    """
    check_factors(config, factors, source="adapter")
    modules = modules_of(config, factors, "consolidated")
    for piece in pieces(config, "consolidated"):
        module = piece.name.removesuffix(".weight")
        if target_of(piece.parameter) and module not in modules:
            out, width = piece.shape
            modules[module] = Factors(torch.zeros((1, width)), torch.zeros((out, 1)), SCALING)
    params = {"lora": {"enable": True, "rank": max(pair.rank for pair in factors.values()), "scaling": SCALING}}
    files: dict[str, Mapping[str, Any]] = {MISTRAL_NAME: _tensors(modules, SCALING), PARAMS_NAME: params}
    _write(folder, files, dtype, overwrite=overwrite)


def _tensors(modules: Mapping[str, Factors], scale: float) -> dict[str, Tensor]:
    found = {}
    for module, pair in modules.items():
        found[f"{module}.lora_A.weight"] = pair.a.contiguous()
        found[f"{module}.lora_B.weight"] = (pair.b * (pair.scale / scale)).contiguous()
    return found


def _write(folder: Path, files: Mapping[str, Mapping[str, Any]], dtype: torch.dtype, *, overwrite: bool) -> None:
    folder = Path(folder)
    refuse_folder(folder, overwrite=overwrite)
    if PARAMS_NAME in files and (folder / PARAMS_NAME).exists():
        _refuse_params(folder, overwrite=overwrite)
    try:
        with Commit(folder) as commit:
            for name, content in files.items():
                if name.endswith(".safetensors"):
                    records = [record(key, value.to(dtype)) for key, value in sorted(content.items())]
                    write_shard(commit.path(name), records, {"format": "pt"})
                else:
                    commit.path(name).write_text(to_json(dict(content)), encoding="utf-8")
            commit.finish(remove=ADAPTER_FILES)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _refuse_params(folder: Path, *, overwrite: bool) -> None:
    """A folder of Mistral's cannot be read any more without the sizes in its ``params.json``."""
    if not overwrite:
        raise CheckpointError(f"{folder}: holds a {PARAMS_NAME}; choose another folder, or overwrite it explicitly")
    other = next((key for key in read_json(inside(folder, PARAMS_NAME), PARAMS_NAME) if key != "lora"), None)
    if other is not None:
        raise CheckpointError(
            f"{folder}: its {PARAMS_NAME} has {other!r:.80}, as that of a model; an adapter's has lora alone. Choose "
            "another folder"
        )
