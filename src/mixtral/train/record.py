"""``record.json`` of a run: everything that published recipes leave out, and what it cost.

A field that nobody can know is null, and ``unknown`` says why. Numbers that are not measured say so in their names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import subprocess
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixtral import __version__
from mixtral.config import MixtralConfig
from mixtral.ops.cores import usable_cores
from mixtral.parallel.mesh import Mesh
from mixtral.train.config import RecordConfig, RunConfig
from mixtral.train.health import ALARM_LOAD, ALARM_STEPS
from mixtral.train.optim import ADAM_BETAS, ADAM_EPS, MUON_MOMENTUM

if TYPE_CHECKING:
    from mixtral.train.training import Training

__all__ = ["NAME", "build_record", "commit_of_source", "flops", "write_record"]

NAME = "record.json"
# A server of about 300 W whose 30 cores share processor, memory, fans and the losses of the power supply.
WATTS_PER_THREAD = 10.0
_PEAK_SIZE = 1024
_STATED = ("sources", "languages", "filters", "deduplication", "licence")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a run. A disk that refuses costs a warning, never what was trained."""
    temporary = folder / f".{NAME}.partial"
    try:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(folder / NAME)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        warnings.warn(f"{folder / NAME}: cannot be written ({error.strerror}); training goes on", stacklevel=3)


def build_record(run: Training[Any, Any]) -> dict[str, Any]:
    """The record as plain JSON values; ``unknown`` maps the path of every field that is null to the reason."""
    config = run.config
    record = {
        "kind": run.kind,
        "software": _software(),
        "seeds": {"weights_and_order": config.run.seed},
        "model": dataclasses.asdict(run.model.config),
        "optimizer": _optimizer(run),
        "router": _router(run),
        "precision": _precision(config.run),
        "parallelism": {
            "devices": run.mesh.axes.world,
            "data": run.mesh.axes.dp,
            "tensor": run.mesh.axes.tp,
            "expert": run.mesh.axes.ep,
            "pipeline": 1,
        },
        "hardware": _hardware(config.run, run.mesh),
        **run.facts(),
    }
    record["training"] = {**_amounts(run), **record.get("training", {})}
    record["energy"] = _energy(run, config.record)
    _state(record, config.record)
    record["unknown"] = _reasons(record)
    return record


def flops(config: MixtralConfig, tokens: int, squares: int, *, trained: float = 1.0) -> float:
    """Floating-point operations of training: forward and both backward passes of the matrices, causal attention.

    6 per token and active parameter without the embedding; 6 L H K per token pair of a document, half of all pairs.
    ``squares`` is the sum of the squared document lengths; ``trained`` the part of the active parameters that needs
    gradients of its own: a frozen one costs 4 per token.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = layers * 2 * width * (heads + keys)
    experts = layers * config.num_experts_per_tok * 3 * width * config.intermediate_size
    routers = layers * config.num_local_experts * width
    active = attention + experts + routers + config.vocab_size * width
    return (4 + 2 * trained) * active * tokens + 6.0 * layers * heads * squares


def _software() -> dict[str, Any]:
    return {
        "mixtral": __version__,
        "commit": commit_of_source(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


@functools.cache
def commit_of_source() -> str | None:
    """The commit of the source tree this runs from, with ``-dirty`` if files of the package are not as it has them.

    None if it is installed elsewhere, or there is no git. A run asks when it starts: later the tree may be another.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        words = ["git", "-C", str(package), *command]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() / "src" / "mixtral" != package:
            return None
        return f"{commit}-dirty" if git("status", "--porcelain", "--", ".") else commit
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _optimizer(run: Training[Any, Any]) -> dict[str, Any]:
    optim, steps = run.config.optim, run.config.run.steps
    muon = {"momentum": MUON_MOMENTUM, "nesterov": True, "newton_schulz_steps": 5} if run.optimizer.uses_muon else None
    return {
        "name": "Muon for attention and experts, AdamW for the rest" if muon else "AdamW",
        "adamw": {"betas": list(ADAM_BETAS), "eps": ADAM_EPS},
        "muon": muon if muon else "not used",
        "weight_decay": optim.weight_decay,
        "weight_decay_on_norms": 0.0,
        "clip_norm": optim.clip_norm,
        "skip_norm": optim.skip_norm,
        "ema": optim.ema,
        "learning_rate": optim.learning_rate,
        "schedule": optim.schedule,
        "warmup_steps": optim.warmup_steps,
        "decay_fraction": optim.decay_fraction if optim.schedule == "wsd" else "not used",
        "steps_planned": steps,
    }


def _router(run: Training[Any, Any]) -> dict[str, Any]:
    optim, loads_LE = run.config.optim, run.loads_LE
    return {
        "balance_coef": optim.balance_coef,
        "balance_scope": optim.balance_scope,
        "balance_coef_as_router_aux_loss_coef": optim.balance_coef / run.model.config.num_experts_per_tok,
        "z_coef": optim.z_coef,
        "capacity_factor": "none: no token is dropped",
        "jitter": 0.0,
        "load_of_last_step": [[round(load, 4) for load in row] for row in loads_LE.tolist()],
        "starving_experts": int((run.health.starving_LE >= ALARM_STEPS).sum()),
        "starving_means": f"below {ALARM_LOAD} of an even load for {ALARM_STEPS} steps",
        "choices_as_at_start": run.agreement,
        "specialisation": None,
    }


def _precision(run: RunConfig) -> dict[str, Any]:
    return {
        "masters_and_moments": "float32",
        "matrix_products": run.dtype,
        "router_norms_losses": "float32",
        "autocast": False,
        "loss_scaling": "none",
        "recomputation": "SwiGLU of the experts, shares of attention",
    }


def _hardware(run: RunConfig, mesh: Mesh) -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else None
    return {
        "device": mesh.device.type,
        "devices": mesh.axes.world,
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": run.threads,
        "memory_bytes": pages,
        "system": platform.platform(),
    }


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _amounts(run: Training[Any, Any]) -> dict[str, Any]:
    work = flops(run.model.config, run.tokens_total, run.squares_total, trained=run.trained_part)
    seconds = run.seconds_total
    # Of all ranks together; the kernels that are timed here are those of the CPU.
    is_known = run.mesh.device.type == "cpu"
    peak = _peak(run.config.run.dtype, run.config.run.threads) * run.mesh.axes.world if is_known else None
    return {
        "steps": run.steps_done,
        "steps_skipped": run.guard.skipped,
        "tokens": run.tokens_total,
        "tokens_per_step": round(run.tokens_total / run.steps_done, 1) if run.steps_done else None,
        "seconds": seconds,
        "seconds_are": "of training steps; without evaluation and saving",
        "tokens_per_second": run.tokens_total / seconds if seconds else None,
        "flops": work,
        "flops_are": "calculated from sizes, tokens and document lengths",
        "peak_flops_per_second": peak,
        "peak_is": f"measured: product of two {_PEAK_SIZE} x {_PEAK_SIZE} matrices, same dtype and threads, by devices"
        if is_known
        else None,
        "mfu": work / seconds / peak if seconds and peak else None,
    }


@functools.cache
def _peak(dtype: str, threads: int) -> float:
    """Measured operations per second of a matrix product; the best of three. ``threads`` are those set now."""
    matrix = torch.ones((_PEAK_SIZE, _PEAK_SIZE), dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        best = max(best, 2.0 * _PEAK_SIZE**3 / (time.perf_counter() - start))
    return best


def _energy(run: Training[Any, Any], stated: RecordConfig) -> dict[str, Any]:
    watts, how = _watts(run, stated)
    kwh = None if watts is None else watts * run.seconds_total / 3.6e6
    return {
        "kwh_estimated": kwh,
        "kwh_method": how,
        "co2_grams_estimated": None if kwh is None else kwh * stated.co2_grams_per_kwh,
        "co2_method": f"kWh times {stated.co2_grams_per_kwh:g} g/kWh, from record.co2_grams_per_kwh "
        "(its default is about the world's average); making the hardware is not counted",
    }


def _watts(run: Training[Any, Any], stated: RecordConfig) -> tuple[float | None, str | None]:
    """Power drawn by all ranks together, and how the energy follows from it."""
    threads, ranks = run.config.run.threads, run.mesh.axes.world
    if stated.watts:
        return stated.watts, f"seconds of training times {stated.watts:g} W, as stated in record.watts"
    if run.mesh.device.type != "cpu":
        return None, None
    of_all = f"{threads} threads" + (f" of {ranks} processes" if ranks > 1 else "")
    how = f"seconds of training times an assumed {WATTS_PER_THREAD:g} W for each of {of_all}; not measured"
    return WATTS_PER_THREAD * threads * ranks, how


def _state(record: dict[str, Any], stated: RecordConfig) -> None:
    """Fill the facts about the data that only the user knows; a recipe that knows them has filled them already."""
    data = record.setdefault("data", {})
    for name in _STATED:
        data[name] = getattr(stated, name) or data.get(name)


_REASONS = {
    "software.commit": "not run from a git checkout of the project",
    "router.specialisation": "not a number of training; `log.jsonl` has the entropy and the drift of the choices",
    "router.choices_as_at_start": "measured every run.save_every steps and at the end, not where a run is stopped",
    "hardware.processor": "the system does not tell it",
    "hardware.memory_bytes": "the system does not tell it",
    "training.tokens_per_step": "no step was trained",
    "training.tokens_per_second": "no step was trained",
    "training.mfu": "no step was trained",
}
_NO_PEAK = "measured on CPUs only"
_REASONS_OF_DEVICES = {
    "training.peak_flops_per_second": _NO_PEAK,
    "training.peak_is": _NO_PEAK,
    "training.mfu": "needs the peak of the device, which is not measured",
    "energy.kwh_estimated": "the power of this device is not known; state it as record.watts",
    "energy.kwh_method": "the power of this device is not known; state it as record.watts",
    "energy.co2_grams_estimated": "the power of this device is not known; state it as record.watts",
}


def _reasons(record: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    queue: list[tuple[str, Any]] = [("", record)]
    while queue:
        path, value = queue.pop()
        if isinstance(value, dict):
            queue += [(f"{path}.{name}".lstrip("."), one) for name, one in value.items()]
        elif value is None:
            found[path] = _reason(path, record["hardware"]["device"])
    return dict(sorted(found.items()))


def _reason(path: str, device: str) -> str:
    name = path.removeprefix("data.")
    if name in _STATED:
        return f"only who made the files knows; state it as record.{name}"
    more = {} if device == "cpu" else _REASONS_OF_DEVICES
    return (_REASONS | more).get(path, "not known to the run")
