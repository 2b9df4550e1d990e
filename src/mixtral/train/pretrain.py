"""Pretraining on the town desk: read the configuration, choose the vocabulary rows, train, save, resume exactly."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mixtral.errors import TrainingError
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.ops import head_cross_entropy
from mixtral.tokenizer import Tokenizer
from mixtral.train import checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.data import DeskData, TokenBatch, choose_trained_ids
from mixtral.train.losses import expert_load, router_losses
from mixtral.train.memory import keep_freed_memory
from mixtral.train.optim import Optimizer, learning_rate

__all__ = ["Pretraining", "StepReport", "pretrain"]

# May differ between the saved and the present configuration: they do not change what a step computes before the decay.
_MAY_CHANGE = {"steps", "save_every", "keep_last"}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. Losses are per token; ``load_max`` is the largest expert share in any layer (1 = even)."""

    step: int
    loss: float
    balance: float
    z: float
    grad_norm: float
    learning_rate: float
    load_max: float
    load_min: float
    tokens: int
    seconds: float
    tokens_total: int
    seconds_total: float


class Pretraining:
    """One run in one folder: ``step()`` trains a step, ``save()`` commits the state; a new object resumes from it."""

    def __init__(self, config: PretrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.steps_done, self.tokens_total, self.seconds_total = 0, 0, 0.0
        torch.set_num_threads(config.run.threads)
        keep_freed_memory()
        tokenizer = Tokenizer.from_version("v3")
        if config.model.vocab_size != tokenizer.vocab_size:
            raise TrainingError(
                f"vocab_size is {config.model.vocab_size}; the tokenizer has {tokenizer.vocab_size} ids",
                param="vocab_size",
            )
        saved = checkpoint.load_latest(folder)
        if saved is None:
            trained = choose_trained_ids(tokenizer, config.data)
        else:
            _check_same(config, saved[2]["config"])
            trained = saved[2]["trained_ids"]
        self.trained_ids: list[int] = trained
        self.data = DeskData(config.data, trained)
        dtype = torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32
        self.model = Mixtral(config.model.replace(vocab_size=self.data.rows), dtype=dtype)
        initialise(self.model, seed=config.run.seed)
        self.optimizer = Optimizer(self.model, config.optim)
        if saved is not None:
            self.optimizer.load(saved[1])
            self.steps_done = saved[0]
            self.tokens_total, self.seconds_total = saved[2]["tokens_total"], saved[2]["seconds_total"]

    def step(self) -> StepReport:
        """Train the next step.

        Raises:
            TrainingError: the loss is not a number; the last saved state is the one to go back to.
        """
        start = time.monotonic()
        parts = list(self.data.micro_batches(self.steps_done))
        labelled = float(sum(part.weights_T.double().sum() for part in parts))
        tokens = sum(part.inputs_T.numel() for part in parts)
        sums = {"loss": 0.0, "balance": 0.0, "z": 0.0, "load_max": 0.0, "load_min": math.inf}
        for part in parts:
            self._backward(part, labelled, tokens, sums)
            self.optimizer.accumulate()
        rate = learning_rate(self.config.optim, self.steps_done, self.config.run.steps)
        norm = self.optimizer.step(rate)
        if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
            raise TrainingError(
                f"step {self.steps_done + 1}: the loss or its gradient is not finite; lower learning_rate"
            )
        seconds = time.monotonic() - start
        self.steps_done += 1
        self.tokens_total += tokens
        self.seconds_total += seconds
        return StepReport(
            step=self.steps_done,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            seconds=seconds,
            tokens_total=self.tokens_total,
            seconds_total=self.seconds_total,
            **sums,
        )

    def _backward(self, part: TokenBatch, labelled: float, tokens: int, sums: dict[str, float]) -> None:
        """Gradients of one part. Every term is divided by counts of the whole step, so that parts only need adding."""
        context = Documents(part.lengths)
        out = self.model(Batch(part.inputs_T, context.positions_T, context))
        loss, _ = head_cross_entropy(
            out.hidden_TD,
            self.model.lm_head.weight,
            part.labels_T,
            part.weights_T / labelled,
            copies_of_last=self.data.copies_of_last,
        )
        balance, z = router_losses(out.routes)
        share = part.inputs_T.numel() / tokens
        optim = self.config.optim
        (loss + share * (optim.balance_coef * balance + optim.z_coef * z)).backward()  # type: ignore[no-untyped-call]
        loads = torch.stack([expert_load(route.picks_TA, route.logits_TE.shape[-1]) for route in out.routes])
        sums["loss"] += float(loss.detach())
        sums["balance"] += share * float(balance.detach())
        sums["z"] += share * float(z.detach())
        sums["load_max"] = max(sums["load_max"], float(loads.max()))
        sums["load_min"] = min(sums["load_min"], float(loads.min()))

    def save(self) -> Path:
        """Commit the run state of this moment; the folder it is in."""
        values = {
            "config": self.config.to_dict(),
            "trained_ids": self.trained_ids,
            "tokens_total": self.tokens_total,
            "seconds_total": self.seconds_total,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
        }
        tensors = self.optimizer.state()
        return checkpoint.save(self.folder, self.steps_done, tensors, values, keep_last=self.config.run.keep_last)

    @torch.no_grad()
    def validation_loss(self, batches: int = 4) -> float:
        """Mean cross entropy, in nats, of the assistant's tokens (and plain text) in the first validation documents.

        It draws nothing at random and changes nothing, so a run is the same however often it is evaluated.
        """
        total, count = 0.0, 0
        for step in range(batches):
            for part in self.data.micro_batches(step, split="validation"):
                context = Documents(part.lengths)
                hidden_TD = self.model(Batch(part.inputs_T, context.positions_T, context)).hidden_TD
                loss, _ = head_cross_entropy(
                    hidden_TD,
                    self.model.lm_head.weight,
                    part.labels_T,
                    part.own_T.float(),
                    copies_of_last=self.data.copies_of_last,
                )
                total, count = total + float(loss), count + int(part.own_T.sum())
        return total / count


def pretrain(
    config: PretrainConfig,
    folder: Path,
    *,
    on_step: Callable[[StepReport], None],
    on_validation: Callable[[int, float], None] = lambda step, loss: None,
    max_seconds: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Pretraining:
    """Train to the end of the configuration, or until ``max_seconds`` or ``stopping()``; the state is saved at the end.

    Every step is appended to ``log.jsonl`` in ``folder``; so is, after every save, the validation loss, which
    ``on_validation`` gets with the number of the step. Called again with the same folder it goes on where it stopped,
    with bitwise the same result as one run without a stop (same machine, same number of threads).
    """
    start = time.monotonic()
    run = Pretraining(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    _trim_log(log, run.steps_done)
    saved_at = run.steps_done
    while run.steps_done < config.run.steps and not stopping():
        if max_seconds is not None and time.monotonic() - start >= max_seconds:
            break
        report = run.step()
        _log(log, asdict(report))
        on_step(report)
        if run.steps_done % config.run.save_every == 0:
            _save(run, log, on_validation)
            saved_at = run.steps_done
    if saved_at != run.steps_done:
        _save(run, log, on_validation)
    return run


def _save(run: Pretraining, log: Path, on_validation: Callable[[int, float], None]) -> None:
    """Commit the state, then evaluate it: whoever is killed while evaluating has lost nothing."""
    run.save()
    loss = run.validation_loss()
    _log(log, {"step": run.steps_done, "validation_loss": loss})
    on_validation(run.steps_done, loss)


def _trim_log(path: Path, last: int) -> None:
    """Drop what was logged after step ``last``, which will be trained again, and lines that were not written whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    kept = b"".join(line + b"\n" for line in content.split(b"\n") if _is_record_up_to(last, line))
    if kept != content:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(kept)
        temporary.replace(path)


def _is_record_up_to(last: int, line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= last


def _log(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _check_same(config: PretrainConfig, saved: dict[str, Any]) -> None:
    now = config.to_dict()
    for table, values in now.items():
        for name, value in values.items():
            if name not in _MAY_CHANGE and saved[table].get(name) != value:
                raise TrainingError(
                    f"{table}.{name} is {value!r}, but the run was started with {saved[table].get(name)!r}; "
                    "resume with the old value or start in a new folder",
                    param=name,
                )
