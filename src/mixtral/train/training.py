"""What pretraining, SFT and DPO share: a step over parts, the run state, the guards, the routers' health, the record.

A recipe says what its batches are, what a part of one adds to the gradient, and what else belongs to its run state.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mixtral import __version__
from mixtral.errors import TrainingError
from mixtral.model import Batch, Documents, Mixtral
from mixtral.model.batch import Output
from mixtral.ops.memory import available_bytes, keep_freed
from mixtral.parallel.mesh import Mesh, alone
from mixtral.parallel.state import Piece, pieces_of
from mixtral.train import checkpoint
from mixtral.train.config import OptimConfig
from mixtral.train.health import Probe, RouterHealth
from mixtral.train.loop import Settings, StepReport
from mixtral.train.optim import NormGuard, Optimizer, learning_rate
from mixtral.train.record import build_record, commit_of_source, write_record

__all__ = ["Part", "Saved", "Step", "Training", "check_same", "forward", "open_state", "versions", "warn_of_versions"]

# May differ between the saved and the present configuration: they do not change what a step computes before the decay.
# Of files only the place may: what is in them is compared.
_MAY_CHANGE = {"steps", "epochs", "save_every", "keep_last", "max_position_embeddings"}
_PLACES = {"path", "train", "validation", "file"}
_BEFORE = {"skip_norm": 0.0, "balance_scope": "micro"}  # there was no guard, and no other scope
_NOT_OF_THE_OPTIMIZER = ("probe.", "health.")

Saved = tuple[int, dict[str, Tensor], dict[str, Any]]
"""A run state: its step, tensors and values."""


class Part(Protocol):
    """A part of a step's batch: T tokens of whole documents, one after the other."""

    @property
    def inputs_T(self) -> Tensor:
        """Rows of the embedding, int64."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        ...


@dataclass(slots=True)
class Step:
    """A step while it is computed. Every term is divided by counts of the whole step, so that parts only need adding.

    ``labelled`` is the sum of the loss weights (of DPO: the number of pairs), ``counts_LE`` the choices so far.
    """

    labelled: float
    tokens: int
    sums: dict[str, float]
    counts_LE: Tensor
    mesh: Mesh = field(default_factory=alone)

    def share(self, part: Part) -> float:
        """The part of the step's tokens that a part has."""
        return part.inputs_T.numel() / self.tokens

    def add(self, **terms: Tensor | float) -> None:
        """Add to the sums of the step."""
        for name, value in terms.items():
            self.sums[name] += float(value.detach() if isinstance(value, Tensor) else value)

    def count(self, out: Output) -> None:
        """Count the choices of a part; before the balance loss of scope ``global`` is computed."""
        counts = [
            torch.bincount(route.picks_TA.reshape(-1), minlength=route.logits_TE.shape[-1]) for route in out.routes
        ]
        self.counts_LE = self.counts_LE + self.mesh.sum(torch.stack(counts).cpu(), "dp")

    def add_ranks(self) -> None:
        """Make the sums those of all ranks."""
        total = self.mesh.sum(torch.tensor([*self.sums.values()], dtype=torch.float64), "dp")
        self.sums = dict(zip(self.sums, total.tolist(), strict=True))

    def loads_LE(self) -> Tensor:
        """Share of every expert in the choices so far; 1 is even."""
        return self.counts_LE.float() * (self.counts_LE.shape[1] / self.counts_LE.sum(-1, keepdim=True))

    def balanced_over(self, optim: OptimConfig, part: Part) -> dict[str, Any]:
        """What ``router_losses`` needs to take the balance loss over the scope of the configuration."""
        if optim.balance_scope == "sequence":
            return {"lengths": part.lengths}
        return {"loads_LE": self.loads_LE().to(self.mesh.device)} if optim.balance_scope == "global" else {}


def forward(model: Mixtral, part: Part) -> Output:
    """The model's output for whole documents."""
    context = Documents(part.lengths, device=model.device)
    out: Output = model(Batch(part.inputs_T.to(model.device), context.positions_T, context))
    return out


C = TypeVar("C", bound=Settings)
P = TypeVar("P", bound=Part)


class Training(ABC, Generic[C, P]):
    """One run in one folder: ``step()`` trains a step, ``save()`` commits the state; a new object resumes from it."""

    kind: ClassVar[str]
    report: ClassVar[type[StepReport]] = StepReport
    sums: ClassVar[tuple[str, ...]] = ("loss", "balance", "z")

    model: Mixtral
    optimizer: Optimizer

    def __init__(self, config: C, folder: Path, mesh: Mesh | None = None) -> None:
        self.config, self.folder = config, folder
        self.mesh = alone() if mesh is None else mesh
        self.steps_done, self.tokens_total, self.seconds_total = 0, 0, 0.0
        self.squares_total = 0  # of document lengths: attention's work
        torch.set_num_threads(config.run.threads)
        keep_freed()
        commit_of_source()  # asked now, as it is kept: when the record is written the tree may be another

    def begin(self, model: Mixtral, optimizer: Optimizer, probe: Part, saved: Saved | None) -> None:
        """The last step of every ``__init__``: take over the saved state, if there is one."""
        self.model, self.optimizer = model, optimizer
        sizes = model.config
        self.health = RouterHealth(sizes.num_hidden_layers, sizes.num_local_experts)
        self.guard = NormGuard(self.config.optim.skip_norm)
        self._probe = Probe(probe.inputs_T, probe.lengths)
        self._loads_LE = torch.ones((sizes.num_hidden_layers, sizes.num_local_experts))
        if saved is None:
            self._probe.begin(model)
            return
        self.steps_done, tensors, values = saved
        warn_of_versions(self.folder, values)
        optimizer.load({n: value for n, value in tensors.items() if not n.startswith(_NOT_OF_THE_OPTIMIZER)})
        self.tokens_total, self.seconds_total = values["tokens_total"], values["seconds_total"]
        self.squares_total = values.get("squares_total", 0)
        guard = values.get("guard", {})
        self.guard = NormGuard(self.config.optim.skip_norm, guard.get("norms", ()), guard.get("skipped", 0))
        if "health.starving" in tensors:
            self.health.starving_LE, self._loads_LE = tensors["health.starving"], tensors["health.loads"]
        if not self._probe.resume(tensors, values.get("agreement", 1.0)):
            self._probe.begin(model)

    @abstractmethod
    def parts(self, step: int) -> list[P]:
        """The parts of a step's batch."""

    @abstractmethod
    def weight_of(self, part: P) -> float:
        """What the part adds to the count by which the loss is divided."""

    @abstractmethod
    def backward(self, part: P, step: Step) -> None:
        """Leave the gradients of a part in the parameters, and its terms and choices in ``step``."""

    @abstractmethod
    def own_values(self) -> dict[str, Any]:
        """What the run state needs beside the shared values, as plain JSON values."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the run record says about data and model, as plain JSON values."""

    @abstractmethod
    def validation_loss(self) -> float | None:
        """The loss on held-out text, None where there is none."""

    def averaged_loss(self) -> float | None:
        """The validation loss of the averaged weights."""
        with self.optimizer.averaged():
            return self.validation_loss()

    def step(self) -> StepReport:
        """Train the next step.

        Raises:
            TrainingError: the loss or its gradient is not finite, or a document is too long; nothing was changed.
        """
        start = time.monotonic()
        parts = self._parts_of_all()
        sizes = self.model.config
        labelled, tokens, squares = self._counts(parts)
        step = Step(
            labelled=labelled,
            tokens=tokens,
            sums=dict.fromkeys(self.sums, 0.0),
            counts_LE=torch.zeros((sizes.num_hidden_layers, sizes.num_local_experts), dtype=torch.int64),
            mesh=self.mesh,
        )
        for part in parts:
            self.backward(part, step)
            self.optimizer.accumulate()
        step.add_ranks()
        self.optimizer.add_ranks(self.mesh)
        rate, norm = self._update(step)
        seconds = time.monotonic() - start
        self.steps_done += 1
        self.tokens_total += step.tokens
        self.squares_total += squares
        self.seconds_total += seconds
        self._loads_LE = step.loads_LE()
        health = self.health.update(self.steps_done, self._loads_LE)
        if self._probes:
            self._probe.measure(self.model)
        return self.report(
            step=self.steps_done,
            grad_norm=norm,
            learning_rate=rate,
            tokens=step.tokens,
            seconds=seconds,
            tokens_total=self.tokens_total,
            seconds_total=self.seconds_total,
            agreement=self._probe.agreement,
            skipped=self.guard.skipped,
            **health,
            **dict[str, Any](step.sums),
        )

    def _parts_of_all(self) -> list[P]:
        """This rank's parts of the next step; refused on all ranks if one refuses its own."""
        parts: list[P] = []
        problem = None
        try:
            parts = self.parts(self.steps_done)
        except TrainingError as error:
            problem = error
        if self.mesh.any(problem is not None):
            raise problem or TrainingError("another rank refused its documents; it says why")
        return parts

    def _counts(self, parts: list[P]) -> tuple[float, int, int]:
        """Loss weights, tokens, and squared document lengths of the step, over all ranks."""
        own = [
            sum(self.weight_of(part) for part in parts),
            sum(part.inputs_T.numel() for part in parts),
            sum(length * length for part in parts for length in part.lengths),
        ]
        labelled, tokens, squares = self.mesh.sum(torch.tensor(own, dtype=torch.float64), "dp").tolist()
        return labelled, int(tokens), int(squares)

    def _update(self, step: Step) -> tuple[float, float]:
        """Learning rate and gradient norm of a step; the masters are changed, unless the gradient is too long."""
        number = self.steps_done + 1
        if not all(math.isfinite(value) for value in step.sums.values()):
            self.optimizer.drop_gradients()
            values = ", ".join(f"{name} {value}" for name, value in step.sums.items())
            raise TrainingError(f"step {number}: the loss is not finite ({values}); lower learning_rate")
        rate = learning_rate(self.config.optim, self.steps_done, self.config.run.steps)
        limit = self.guard.limit()
        norm = self.optimizer.step(rate, limit)
        if not math.isfinite(norm):
            raise TrainingError(f"step {number}: the gradient is not finite; lower learning_rate")
        self.guard.note(norm, skipped=norm > limit)
        return rate, norm

    def save(self) -> Path:
        """Commit the run state of this moment, and write the run record; the folder the state is in.

        Where every rank has the whole state, the first one does it, and the others wait.
        """
        shards = self.optimizer.shards
        tensors = self._tensors()
        commit = self._commit(tensors if shards is None else pieces_of(tensors, shards.shapes, self.mesh))
        if shards is not None or self.mesh.is_alone:
            return commit()
        problem = None
        try:
            path = commit() if self.mesh.is_first else self.folder
        except TrainingError as error:
            problem = error
        if self.mesh.any(problem is not None):
            raise problem or TrainingError("the first rank could not save the state; it says why")
        return path

    def snapshot(self) -> Callable[[], Path] | None:
        """What commits a copy of the run state of this moment, for a thread.

        None on several ranks, which must commit together, and where memory would be short with a copy.
        """
        tensors = self._tensors()
        size = sum(value.nbytes for value in tensors.values())
        if not self.mesh.is_alone or 1.5 * size > available_bytes(torch.device("cpu")):
            return None
        return self._commit({name: value.to("cpu", copy=True) for name, value in tensors.items()})

    def _tensors(self) -> dict[str, Tensor]:
        return self.optimizer.state() | {
            "probe.picks": self._probe.start_LTA,
            "health.starving": self.health.starving_LE,
            "health.loads": self._loads_LE,
        }

    def _commit(self, tensors: Mapping[str, Tensor] | Mapping[str, Piece]) -> Callable[[], Path]:
        """What commits these tensors with the values of this moment."""
        values = {
            "kind": self.kind,
            "config": self.config.to_dict(),
            **self.own_values(),
            "tokens_total": self.tokens_total,
            "squares_total": self.squares_total,
            "seconds_total": self.seconds_total,
            "guard": {"norms": self.guard.norms, "skipped": self.guard.skipped},
            "agreement": self._probe.agreement,
            **versions(),
            "machine": platform.processor() or platform.machine(),
        }
        step, record = self.steps_done, build_record(self) if self.mesh.is_first else None
        mesh = alone() if self.optimizer.shards is None else self.mesh

        def commit() -> Path:
            keep = self.config.run.keep_last
            path = checkpoint.save(self.folder, step, tensors, values, keep_last=keep, mesh=mesh)
            if record is not None:
                write_record(self.folder, record)
            return path

        return commit

    @property
    def trained_part(self) -> float:
        """The part of the active parameters that has gradients of its own."""
        return 1.0

    @property
    def loads_LE(self) -> Tensor:
        """Load of every expert in the last step; 1 is even."""
        return self._loads_LE

    @property
    def agreement(self) -> float | None:
        """The part of the choices on the probe batch that are still those of the start; None where the present step is
        none after which it is measured."""
        return self._probe.agreement if self._probes else None

    @property
    def _probes(self) -> bool:
        return self.steps_done % self.config.run.save_every == 0 or self.steps_done == self.config.run.steps


def versions() -> dict[str, str]:
    """The software that decides what a step computes, to the bit."""
    return {"torch": str(torch.__version__), "mixtral": __version__}


def warn_of_versions(folder: Path, saved: Mapping[str, Any]) -> None:
    """Warn if other software saved the state. One written before a version was saved in it says nothing about it."""
    others = [f"{name} {saved[name]} (now {now})" for name, now in versions().items() if saved.get(name, now) != now]
    if others:
        warnings.warn(
            f"{folder}: the state was saved by {' and '.join(others)}; going on may not give bitwise the same result",
            stacklevel=5,
        )


def open_state(folder: Path, config: Settings, kind: str, mesh: Mesh | None = None) -> Saved | None:
    """The newest state in a folder, if it is one of the same recipe and configuration; None where there is none.

    On a ``mesh`` the tensors are this rank's parts, whatever ranks saved them.

    Raises:
        TrainingError: it is of another run, or all states are damaged.
    """
    saved = checkpoint.load_latest(folder, mesh=mesh)
    if saved is None:
        return None
    found = saved[2].get("kind", "pretrain")
    if found != kind:
        raise TrainingError(f"{folder}: holds a run of {found}, not of {kind}; choose another folder")
    _check_settings(_until(config.to_dict(), saved[0]), _until(saved[2]["config"], saved[0]), config)
    return saved


def check_same(folder: Path, what: str, before: str, now: str) -> None:
    """Files that a run goes on with are those that it was started with, by their sha256.

    Raises:
        TrainingError: they are not.
    """
    if before != now:
        raise TrainingError(
            f"{folder}: the run was started with other {what} (sha256 {before[:12]}, now {now[:12]}); bring the old "
            "files back, or start in a new folder"
        )


def _until(values: dict[str, Any], step: int) -> dict[str, Any]:
    """A configuration without the mixtures that hold from a later step on: they may still be changed."""
    if not (values.get("data") or {}).get("later"):
        return values
    later = {first: mixture for first, mixture in values["data"]["later"].items() if int(first) < step}
    return {**values, "data": {**values["data"], "later": later}}


def _check_settings(now: Mapping[str, Any], saved: Mapping[str, Any], config: Settings) -> None:
    for table, values in now.items():
        if table == "record":
            continue
        before = saved.get(table)
        if (values is None) != (before is None):
            raise TrainingError(
                f"the run was started {'with' if before else 'without'} the table {table}; "
                "resume with the old configuration or start in a new folder",
                param=table,
            )
        for name, value in (values or {}).items():
            # What a state does not name came later than it; until then everything was as its default is now, or as
            # ``_BEFORE`` says.
            old = (before or {}).get(name, _BEFORE.get(name, _default(config, table, name)))
            if name not in _MAY_CHANGE | _PLACES and old != value:
                raise TrainingError(
                    f"{table}.{name} is {value!r}, but the run was started with {old!r}; "
                    "resume with the old value or start in a new folder",
                    param=name,
                )


def _default(config: Settings, table: str, name: str) -> Any:
    own = getattr(config, table)
    found = [field.default for field in dataclasses.fields(own) if field.name == name]
    if not found or found[0] is dataclasses.MISSING:
        return {} if name == "later" else None
    return found[0]
