"""Pretraining on the town desk: read the configuration, choose the vocabulary rows, train, save, resume exactly."""

from __future__ import annotations

import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral import __version__
from mixtral.desk.source import Split
from mixtral.errors import TrainingError
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.ops import head_cross_entropy
from mixtral.tokenizer import Tokenizer
from mixtral.train import checkpoint
from mixtral.train.config import PretrainConfig
from mixtral.train.data import DeskData, TokenBatch, choose_trained_ids
from mixtral.train.losses import expert_load, router_losses
from mixtral.train.optim import Optimizer, learning_rate

__all__ = ["Pretraining", "StepReport", "pretrain"]

# May differ between the saved and the present configuration: they do not change what a step computes before the decay.
_MAY_CHANGE = {"steps", "save_every", "keep_last", "max_position_embeddings"}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. Losses are per token.

    ``load_max`` and ``load_min`` are the largest and the smallest share that an expert of any layer has of the choices
    of the whole step, in however many parts it was computed; 1 is even.
    """

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
            _warn_of_versions(folder, saved[2])
            self.optimizer.load(saved[1])
            self.steps_done = saved[0]
            self.tokens_total, self.seconds_total = saved[2]["tokens_total"], saved[2]["seconds_total"]

    def step(self) -> StepReport:
        """Train the next step.

        Raises:
            TrainingError: the loss or its gradient is not finite, or a document is too long; nothing was changed.
        """
        start = time.monotonic()
        parts = self._parts(self.steps_done)
        labelled = float(sum(part.weights_T.double().sum() for part in parts))
        tokens = sum(part.inputs_T.numel() for part in parts)
        sums = {"loss": 0.0, "balance": 0.0, "z": 0.0}
        loads_LE = torch.zeros(())
        for part in parts:
            loads_LE = loads_LE + self._backward(part, labelled, tokens, sums)
            self.optimizer.accumulate()
        if not all(math.isfinite(value) for value in sums.values()):
            self.optimizer.drop_gradients()
            values = ", ".join(f"{name} {value}" for name, value in sums.items())
            raise TrainingError(f"step {self.steps_done + 1}: the loss is not finite ({values}); lower learning_rate")
        rate = learning_rate(self.config.optim, self.steps_done, self.config.run.steps)
        norm = self.optimizer.step(rate)
        if not math.isfinite(norm):
            raise TrainingError(f"step {self.steps_done + 1}: the gradient is not finite; lower learning_rate")
        seconds = time.monotonic() - start
        self.steps_done += 1
        self.tokens_total += tokens
        self.seconds_total += seconds
        return StepReport(
            step=self.steps_done,
            grad_norm=norm,
            learning_rate=rate,
            load_max=float(loads_LE.max()),
            load_min=float(loads_LE.min()),
            tokens=tokens,
            seconds=seconds,
            tokens_total=self.tokens_total,
            seconds_total=self.seconds_total,
            **sums,
        )

    def _parts(self, step: int, split: Split = "train") -> list[TokenBatch]:
        """The parts of a step's batch.

        Raises:
            TrainingError: a document has more tokens than the model has positions.
        """
        parts = list(self.data.micro_batches(step, split=split))
        lengths = [length for part in parts for length in part.lengths]
        limit, longest = self.config.model.max_position_embeddings, max(lengths)
        if longest > limit:
            number = step * self.config.data.documents_per_step + lengths.index(longest)
            raise TrainingError(
                f"document {number} of the {split} split has {longest} tokens to train; expected at most "
                f"max_position_embeddings, {limit}. Raise it; a run can go on with a larger one",
                param="max_position_embeddings",
            )
        return parts

    def _backward(self, part: TokenBatch, labelled: float, tokens: int, sums: dict[str, float]) -> Tensor:
        """Gradients of one part; the part's share of every expert's load, [L, E] with L layers.

        Every term is divided by counts of the whole step, so that parts only need adding.
        """
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
        loads_LE = torch.stack([expert_load(route.picks_TA, route.logits_TE.shape[-1]) for route in out.routes])
        sums["loss"] += float(loss.detach())
        sums["balance"] += share * float(balance.detach())
        sums["z"] += share * float(z.detach())
        return share * loads_LE

    def save(self) -> Path:
        """Commit the run state of this moment; the folder it is in."""
        values = {
            "config": self.config.to_dict(),
            "trained_ids": self.trained_ids,
            "tokens_total": self.tokens_total,
            "seconds_total": self.seconds_total,
            **_versions(),
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
            for part in self._parts(step, split="validation"):
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
    with bitwise the same result as one run without a stop (same machine, same number of threads, same versions).

    Warns:
        UserWarning: the log could not be written, or a state before the last; the training goes on.

    Raises:
        TrainingError: the run cannot start or go on, another process trains in ``folder``, or the last state could not
            be saved.
    """
    start = time.monotonic()
    with checkpoint.exclusive(folder):
        run = Pretraining(config, folder)
        log = _Log(folder / "log.jsonl", run.steps_done)
        if run.steps_done and not log.evaluated:  # killed between the state and its evaluation
            _evaluate(run, log, on_validation)
        saved_at = run.steps_done
        while run.steps_done < config.run.steps and not stopping():
            if max_seconds is not None and time.monotonic() - start >= max_seconds:
                break
            report = run.step()
            log.add(asdict(report))
            on_step(report)
            is_last = run.steps_done == config.run.steps
            if run.steps_done % config.run.save_every == 0 and not is_last and _saved(run, log):
                saved_at = run.steps_done
                _evaluate(run, log, on_validation)
        if saved_at != run.steps_done:
            log.flush()
            run.save()
            _evaluate(run, log, on_validation)
    return run


def _saved(run: Pretraining, log: _Log) -> bool:
    """Commit the state. A disk that refuses may take the next one; what was trained is still in memory."""
    log.flush()
    try:
        run.save()
    except TrainingError as error:
        every = run.config.run.save_every
        warnings.warn(f"{error}; training goes on, the next try is after {every} more steps", stacklevel=3)
        return False
    return True


def _evaluate(run: Pretraining, log: _Log, on_validation: Callable[[int, float], None]) -> None:
    """The validation loss of a state that is saved: whoever is killed while evaluating has lost nothing."""
    loss = run.validation_loss()
    log.add({"step": run.steps_done, "validation_loss": loss})
    on_validation(run.steps_done, loss)


class _Log:
    """``log.jsonl``, a record per line. A disk that refuses one costs a warning, never what was trained.

    ``evaluated`` tells whether the log had the validation loss of step ``last`` when it was opened.
    """

    def __init__(self, path: Path, last: int) -> None:
        self._path = path
        self._waiting = b""  # lines that are not in the file
        self._warned = False
        self.evaluated = _trim_log(path, last)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, after those that the disk refused before."""
        self._waiting += json.dumps(record).encode() + b"\n"
        self._write(to_disk=False)

    def flush(self) -> None:
        """Bring all records to the disk, so that the log lacks no step of a state that is saved after this."""
        self._write(to_disk=True)

    def _write(self, *, to_disk: bool) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                end, rest = file.tell(), self._waiting
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    with suppress(OSError):  # else the next record would stand on a line with half of this one
                        file.truncate(end)
                    raise
                self._waiting = b""
                if to_disk:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"{self._path}: cannot be written ({error.strerror}); training goes on and tries again",
                    stacklevel=4,
                )
            self._warned = True


def _trim_log(path: Path, last: int) -> bool:
    """Drop what was logged after step ``last``, which will be trained again, and lines that were not written whole.

    Returns whether the validation loss of step ``last`` is in what stays.

    Raises:
        TrainingError: the disk refused; the log is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        content = path.read_bytes() if path.exists() else b""
        lines = [line for line in content.split(b"\n") if _is_record_up_to(last, line)]
        kept = b"".join(line + b"\n" for line in lines)
        if kept != content:
            with temporary.open("wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read or written ({error.strerror}); nothing was trained") from None
    records = [json.loads(line) for line in lines]
    return any(record["step"] == last and "validation_loss" in record for record in records)


def _is_record_up_to(last: int, line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= last


def _versions() -> dict[str, str]:
    """The software that decides what a step computes, to the bit."""
    return {"torch": str(torch.__version__), "mixtral": __version__}


def _warn_of_versions(folder: Path, saved: dict[str, Any]) -> None:
    # A state written before a version was saved in it says nothing about that one.
    others = [f"{name} {saved[name]} (now {now})" for name, now in _versions().items() if saved.get(name, now) != now]
    if others:
        warnings.warn(
            f"{folder}: the state was saved by {' and '.join(others)}; going on may not give bitwise the same result",
            stacklevel=4,
        )


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
