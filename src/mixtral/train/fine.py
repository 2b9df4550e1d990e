"""What SFT and DPO share: a model from a folder, trained as a whole or by an adapter, and files of the user."""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from mixtral.adapters import Adapter, Selection, attach, attach_experts
from mixtral.desk.source import Source
from mixtral.errors import ConfigError, TrainingError
from mixtral.parallel.mesh import Mesh
from mixtral.train.data import TokenBatch
from mixtral.train.lines import Doc, Lines
from mixtral.train.loop import StepReport, drive
from mixtral.train.optim import Optimizer
from mixtral.train.order import at_least
from mixtral.train.start import Start, fingerprint, load_start
from mixtral.train.training import Part, Saved, Training, check_same, open_state
from mixtral.train.tune import TuneConfig

__all__ = ["FineTuning", "token_batch"]

_PROBE_TOKENS = 512

K = TypeVar("K", bound=TuneConfig)
P = TypeVar("P", bound=Part)
T = TypeVar("T")
V = TypeVar("V")


def token_batch(start: Start, docs: Sequence[Doc]) -> TokenBatch:
    """Documents laid end to end; tokens that are not learnt have weight 0."""
    inputs_T = torch.cat([start.rows(doc.ids[:-1].tolist()) for doc in docs])
    labels_T = torch.cat([start.rows(doc.ids[1:].tolist()) for doc in docs])
    own_T = torch.cat([torch.from_numpy(doc.trained[1:].copy()) for doc in docs])
    weights_T = torch.cat([torch.full((len(doc.ids) - 1,), doc.weight) for doc in docs])
    return TokenBatch(inputs_T, labels_T, weights_T * own_T, own_T, tuple(len(doc.ids) - 1 for doc in docs))


class FineTuning(Training[K, P], Generic[K, P, T]):
    """A run on lines of a file. ``base`` is the folder or GGUF file that ``config.model`` names."""

    def __init__(self, config: K, folder: Path, base: Path, mesh: Mesh | None = None) -> None:
        super().__init__(config, folder, mesh)
        _check_ranks(config, self.mesh)
        saved = open_state(folder, config, self.kind)
        _check_same_state(folder, saved, self.mesh)
        self.base, self.base_sha256 = base, fingerprint(base)
        full = config.adapter is None
        self.start: Start = load_start(base, dtype=config.run.dtype, full=full)
        limit = self.start.model.config.max_position_embeddings
        if config.data.max_tokens > limit:
            raise ConfigError(
                f"max_tokens is {config.data.max_tokens}; the model has {limit} positions", param="max_tokens"
            )
        self.lines, self.held_out, self.data_sha256 = self._read_files()
        if config.data.documents_per_step > len(self.lines.kept):
            raise ConfigError(
                f"documents_per_step is {config.data.documents_per_step}, but there are {len(self.lines.kept)} in all",
                param="documents_per_step",
            )
        self.config = config.with_steps(len(self.lines.kept))
        self._check_same_files(saved)
        self.model = self.start.model.to(self.mesh.device)
        self.adapter: Adapter | None = None
        self.selection: Selection | None = None
        if config.adapter is not None:
            self.adapter = attach(self.model, config.adapter.lora())
            optimizer = Optimizer(dict(self.adapter.named_parameters()), self.config.optim)
        elif config.experts is not None:
            self.selection = _selection(Path(config.experts.file), saved)
            chosen = dict(attach_experts(self.model, self.selection).named_parameters())
            masters = {name: self._of_expert(name) for name in chosen}
            optimizer = Optimizer(chosen, self.config.optim, masters)
        else:
            optimizer = Optimizer(self.model, self.config.optim, self.start.masters)
        self.start.masters.clear()  # what the optimizer did not take
        self.prepare()
        self.begin(self.model, optimizer, self._probe_batch(), saved)

    @classmethod
    def train(
        cls,
        config: K,
        folder: Path,
        base: Path,
        *,
        on_ready: Callable[[Self], None] = lambda run: None,
        on_step: Callable[[StepReport], None],
        on_validation: Callable[[int, float], None] = lambda step, loss: None,
        max_seconds: float | None = None,
        stopping: Callable[[], bool] = lambda: False,
        mesh: Mesh | None = None,
    ) -> Self:
        """Fine-tune the model at ``base`` to the end of the configuration; see ``drive`` for logging and stopping.

        Every line of the data is checked first. ``on_ready`` gets the run before its first step. Called again with the
        same folder it goes on where it stopped, with bitwise the same result as one run without a stop. All ranks of a
        ``mesh`` call this together; each has the whole model, and its share of every step's documents.

        Raises:
            BadLinesError: lines of the data cannot be trained; nothing was.
            TrainingError: the run cannot start or go on, or the last state could not be saved.
            ConfigError, CheckpointError: the model cannot be loaded or trained in this way.
        """
        return drive(
            folder,
            lambda: cls(config, folder, base, mesh),
            on_ready=on_ready,
            on_step=on_step,
            on_validation=on_validation,
            max_seconds=max_seconds,
            stopping=stopping,
            mesh=mesh,
        )

    @abstractmethod
    def read(self, path: Path, held_out_percent: int) -> Lines[T]:
        """Read a file of the recipe's kind."""

    @abstractmethod
    def documents(self, item: T) -> list[Doc]:
        """The documents of an item."""

    def prepare(self) -> None:
        """What has to be done while the model is still the one that the run starts from."""

    def step(self) -> StepReport:
        """Train the next step; what dropout leaves out depends on the seed and the step alone."""
        if self.config.adapter is None or not self.config.adapter.dropout:
            return super().step()
        device = self.mesh.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            rank = () if self.mesh.is_alone else (self.mesh.rank,)
            torch.manual_seed(Source("dropout", self.config.run.seed, self.steps_done, *rank).below(1 << 32))
            return super().step()

    def own_values(self) -> dict[str, Any]:
        """What identifies data and base, and what an export needs beside the trained tensors."""
        rows = self.start.row_of_id
        return {
            "data_sha256": self.data_sha256,
            "base": str(self.base.resolve()),
            "base_sha256": self.base_sha256,
            "respelled": bool(self.start.respell),
            "experts": None if self.selection is None else [list(layer) for layer in self.selection.experts],
            "model": self.model.config.to_dict(),
            "tokenizer": self.start.tokenizer.version,
            "vocab_size": self.start.tokenizer.vocab_size,
            "trained_ids": None if rows is None else torch.nonzero(rows != rows.max()).flatten().tolist(),
        }

    def facts(self) -> dict[str, Any]:
        """Of data, what their files tell; of the model, where it comes from."""
        config, lines = self.config, self.lines
        numbers = [] if self.adapter is None else self.adapter.table()
        return {
            "seeds": {"run": config.run.seed, "order": config.data.seed},
            "base": {"path": config.model.path, "fingerprint": self.base_sha256},
            "trained": {
                "what": self.what,
                "adapter": "none" if config.adapter is None else dataclasses.asdict(config.adapter),
                "experts": "none chosen" if self.selection is None else [list(one) for one in self.selection.experts],
                "parameters": sum(master.numel() for master in self.optimizer.masters.values()),
                "tensors": len(numbers) or len(self.optimizer.masters),
            },
            "data": {
                "files": [name for name in (config.data.train, config.data.validation) if name],
                "sha256": self.data_sha256,
                "lines": lines.lines,
                "examples": len(lines.kept),
                "held_out": len(self.held_out),
                "tokens": lines.tokens,
                "tokens_learnt": lines.trained,
                "cut": lines.cut,
                "dropped_as_too_long": lines.dropped,
                "repeated_lines": lines.repeated,
                "deduplication": "none by the run; repeated_lines counts what is equal",
                "mixture": "that of the file",
                "epochs": self.steps_done * config.data.documents_per_step / len(lines.kept),
            },
            "training": {
                "examples_per_step": config.data.documents_per_step,
                "tokens_per_part": config.data.tokens_per_part,
                "longest_document": config.data.max_tokens,
                "packing": "whole documents end to end; attention and positions stay in a document",
            },
        }

    @property
    def trained_part(self) -> float:
        """The part of all weights that is trained; with an adapter 0: its own products are not counted."""
        if self.adapter is not None:
            return 0.0
        trained = sum(master.numel() for master in self.optimizer.masters.values())
        return 1.0 if self.selection is None else trained / sum(p.numel() for p in self.model.parameters())

    @property
    def what(self) -> str:
        """What is trained, in words."""
        if self.adapter is not None:
            return "a low-rank adapter"
        return "all weights" if self.selection is None else "chosen experts"

    def _read_files(self) -> tuple[Lines[T], list[T], str]:
        data = self.config.data
        lines = self.read(Path(data.train), data.held_out_percent)
        if not data.validation:
            return lines, lines.held_out, lines.sha256
        others = self.read(Path(data.validation), 0)
        return lines, others.kept, f"{lines.sha256} {others.sha256}"

    def _check_same_files(self, saved: Saved | None) -> None:
        for name, now, what in (("data", self.data_sha256, "data"), ("base", self.base_sha256, "model")):
            if saved is not None:
                check_same(self.folder, what, saved[2][f"{name}_sha256"], now)

    def _of_expert(self, name: str) -> Tensor:
        """The exact values of ``...experts.gate_up_3``: expert 3 of ``gate_up_proj``."""
        owner, _, leaf = name.rpartition(".")
        stack, _, expert = leaf.rpartition("_")
        return self.start.masters[f"{owner}.{stack}_proj"][int(expert)]

    def _probe_batch(self) -> TokenBatch:
        docs: list[Doc] = []
        for item in [*self.held_out[:100], *self.lines.kept[:100]]:
            docs += self.documents(item)
            if sum(len(doc.ids) for doc in docs) >= _PROBE_TOKENS:
                break
        return token_batch(self.start, docs)

    def own(self, items: Sequence[V]) -> Sequence[V]:
        """Those of this rank."""
        return items[self.mesh.place.data :: self.mesh.axes.dp]

    def evenly(self, parts: Iterable[list[V]]) -> list[list[V]]:
        """As many parts on every rank: they meet in each of them."""
        cut = list(parts)
        return at_least(cut, self.mesh.most(len(cut)))

    def answers(self, hidden_TD: Tensor, part: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, labels and weights of the tokens that are learnt: the head need not see the others."""
        index, device = torch.nonzero(part.own_T).flatten(), hidden_TD.device
        labels_A, weights_A = part.labels_T[index].to(device), part.weights_T[index].to(device)
        return hidden_TD.index_select(0, index.to(device)), labels_A, weights_A


def _check_ranks(config: TuneConfig, mesh: Mesh) -> None:
    axes, count = mesh.axes, config.data.documents_per_step
    if axes.tp > 1 or axes.ep > 1:
        raise ConfigError(
            f"parallel is dp={axes.dp}, ep={axes.ep}, tp={axes.tp}; fine-tuning has the whole model in every process: "
            "expected dp alone",
            param="parallel",
        )
    if count % axes.dp:
        raise ConfigError(
            f"documents_per_step is {count}; expected a multiple of dp, {axes.dp}", param="documents_per_step"
        )


def _check_same_state(folder: Path, saved: Saved | None, mesh: Mesh) -> None:
    step = -1 if saved is None else saved[0]
    if mesh.any(mesh.most(step) != step):
        raise TrainingError(f"{folder}: the ranks see different run states; it must be one folder on a shared disk")


def _selection(file: Path, saved: Saved | None) -> Selection:
    """The experts that a file names; those of the saved state, if the file names the same."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); expected the JSON of mixtral adapter experts") from None
    if not isinstance(value, dict) or "experts" not in value:
        raise ConfigError(f"{file}: has no member experts; expected the JSON of `mixtral adapter experts --json`")
    found = Selection.from_lists(value["experts"])
    if saved is not None and saved[2]["experts"] != [list(layer) for layer in found.experts]:
        raise TrainingError(f"{file}: names other experts than the run was started with; start in a new folder")
    return found
