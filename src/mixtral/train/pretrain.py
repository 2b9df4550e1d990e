"""Pretraining on the town desk: choose the vocabulary rows, train from nothing on generated text, resume exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.desk.source import Split
from mixtral.desk.write import MIXTURE, generator_id
from mixtral.errors import TrainingError
from mixtral.model import Mixtral, Output, initial_values
from mixtral.ops import head_cross_entropy
from mixtral.parallel.head import split_cross_entropy
from mixtral.parallel.mesh import Mesh
from mixtral.parallel.shards import build
from mixtral.tokenizer import Tokenizer
from mixtral.train.config import PretrainConfig
from mixtral.train.data import DeskData, TokenBatch, check_controls, choose_trained_ids
from mixtral.train.loop import StepReport, drive
from mixtral.train.losses import router_losses
from mixtral.train.optim import Optimizer
from mixtral.train.start import fingerprint, load_start
from mixtral.train.training import Saved, Step, Training, check_same, forward, open_state
from mixtral.weights import is_compact
from mixtral.weights.vocab import trained_ids

__all__ = ["Pretraining", "StepReport", "pretrain"]

_PROBE_TOKENS = 512
_NOT_SIZES = {"max_position_embeddings", "router_aux_loss_coef"}  # may be other ones than those of the start


class Pretraining(Training[PretrainConfig, TokenBatch]):
    """A run on the documents of the desk, in the order of their numbers."""

    kind = "pretrain"

    def __init__(
        self, config: PretrainConfig, folder: Path, mesh: Mesh | None = None, base: Path | None = None
    ) -> None:
        super().__init__(config, folder, mesh)
        _check_documents(config, self.mesh)
        tokenizer = Tokenizer.from_version("v3")
        if config.model.vocab_size != tokenizer.vocab_size:
            raise TrainingError(
                f"vocab_size is {config.model.vocab_size}; the tokenizer has {tokenizer.vocab_size} ids",
                param="vocab_size",
            )
        saved = open_state(folder, config, self.kind, self.mesh)
        base = None if config.start is None else base or Path(config.start.path)
        self.base_sha256 = None if base is None else _fingerprint(base, folder, saved)
        first: dict[str, Tensor] = {}
        if saved is not None:
            self.trained_ids: list[int] = saved[2]["trained_ids"]
        elif base is not None:
            self.trained_ids, first = _weights_of(base, config, tokenizer)
        else:
            self.trained_ids = choose_trained_ids(tokenizer, config.data)
        self.data = DeskData(config.data, self.trained_ids)
        self.generators = _generators(folder, saved)
        dtype = torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32
        sizes = config.model.replace(vocab_size=self.data.rows)
        self.head_loss: Callable[..., tuple[Tensor, Tensor]] = head_cross_entropy
        shards, masters = None, {}
        values = first.items() or initial_values(Mixtral(sizes, device="meta"), seed=config.run.seed)
        if self.mesh.is_alone:
            model = Mixtral(sizes, dtype=dtype).to(self.mesh.device)
            if saved is None:  # in float32, as the ranks of a mesh have them: a model in bfloat16 holds them rounded
                masters = dict(values)
        else:
            shards = build(sizes, self.mesh, dtype=dtype)
            model = shards.model
            if saved is None:
                shards.fill(values)
            if shards.head is not None:
                self.head_loss = partial(split_cross_entropy, part=shards.head)
        self.begin(model, Optimizer(model, config.optim, masters, shards), self._probe_batch(), saved)

    def parts(self, step: int, split: Split = "train") -> list[TokenBatch]:
        """The parts of a step's batch.

        Raises:
            TrainingError: a document has more tokens than the model has positions.
        """
        turn = (self.mesh.place.data, self.mesh.axes.dp)
        parts = list(self.data.micro_batches(step, split=split, turn=turn))
        lengths = [length for part in parts for length in part.lengths]
        limit, longest = self.config.model.max_position_embeddings, max(lengths)
        if longest > limit:
            numbers = [number for part in self.data.numbers(step, turn) for number in part]
            number = numbers[lengths.index(longest)]
            raise TrainingError(
                f"document {number} of the {split} split has {longest} tokens to train; expected at most "
                f"max_position_embeddings, {limit}. Raise it; a run can go on with a larger one",
                param="max_position_embeddings",
            )
        return parts

    def weight_of(self, part: TokenBatch) -> float:
        """The sum of the loss weights."""
        return float(part.weights_T.double().sum())

    def backward(self, part: TokenBatch, step: Step) -> None:
        """Cross entropy of all tokens by their weights, and the two losses of the router."""
        out = forward(self.model, part)
        loss = self._cross_entropy(out, part.labels_T, part.weights_T / step.labelled)
        optim = self.config.optim
        step.count(out)
        balance, z = router_losses(out.routes, **step.balanced_over(optim, part))
        share = step.share(part)
        (loss + share * (optim.balance_coef * balance + optim.z_coef * z)).backward()  # type: ignore[no-untyped-call]
        step.add(loss=loss, balance=share * balance, z=share * z)

    def _cross_entropy(self, out: Output, labels_T: Tensor, weights_T: Tensor) -> Tensor:
        device = out.hidden_TD.device
        loss, _ = self.head_loss(
            out.hidden_TD,
            self.model.lm_head.weight,
            labels_T.to(device),
            weights_T.to(device),
            copies_of_last=self.data.copies_of_last,
        )
        return loss

    def own_values(self) -> dict[str, Any]:
        """The ids that have rows of their own, which generators wrote the documents, each from a step on, and what
        model the run began with."""
        base = {} if self.base_sha256 is None else {"base_sha256": self.base_sha256}
        return {"trained_ids": self.trained_ids, "generators": self.generators, **base}

    def facts(self) -> dict[str, Any]:
        """All about the data is known: the project writes them."""
        data, start = self.config.data, self.config.start
        return {
            "base": "none" if start is None else {"path": start.path, "fingerprint": self.base_sha256},
            "seeds": ({"weights": self.config.run.seed} if start is None else {}) | {"data": data.seed},
            "data": {
                "generators": self.generators,
                "sources": "generated by mixtral.desk: talks, calls, records, sums, notes and stories of one town",
                "mixture_percent": dict(data.mixture or MIXTURE),
                "mixture_later": {step: dict(mixture or MIXTURE) for step, mixture in data.later.items()},
                "languages": "English, French, German, Spanish, Italian",
                "filters": "none: every document is as the generator wrote it",
                "deduplication": "no document number comes twice in the run; equal texts of different numbers are kept",
                "licence": "that of the project",
                "epochs": 1,
                "documents": self.steps_done * data.documents_per_step,
                "prompt_weight": data.prompt_weight,
                "unknown_per_mille": data.unknown_per_mille,
                "vocabulary_rows_trained": len(self.trained_ids),
            },
            "training": {
                "documents_per_step": data.documents_per_step,
                "micro_batches": data.micro_batches,
                "longest_document": self.config.model.max_position_embeddings,
                "packing": "whole documents end to end; attention and positions stay in a document",
            },
        }

    def _probe_batch(self) -> TokenBatch:
        """The first whole documents of the validation split, some hundred tokens."""
        part = next(iter(self.data.micro_batches(0, split="validation")))
        count, tokens = 0, 0
        while count < len(part.lengths) and (count == 0 or tokens + part.lengths[count] <= _PROBE_TOKENS):
            tokens, count = tokens + part.lengths[count], count + 1
        cut = slice(0, tokens)
        return TokenBatch(
            part.inputs_T[cut], part.labels_T[cut], part.weights_T[cut], part.own_T[cut], part.lengths[:count]
        )

    @torch.no_grad()
    def validation_loss(self, batches: int = 4) -> float:
        """Mean cross entropy, in nats, of the assistant's tokens (and plain text) in the first validation documents.

        It draws nothing at random and changes nothing, so a run is the same however often it is evaluated.
        """
        total, count = 0.0, 0
        for step in range(batches):
            for part in self.parts(step, split="validation"):
                loss = self._cross_entropy(forward(self.model, part), part.labels_T, part.own_T.float())
                total, count = total + float(loss), count + int(part.own_T.sum())
        every = self.mesh.sum(torch.tensor([total, count], dtype=torch.float64), "dp")
        return float(every[0] / every[1])


def _fingerprint(base: Path, folder: Path, saved: Saved | None) -> str:
    """That of the model a run begins with, or began with: then it may be gone, as the state has all that is needed."""
    before: str | None = None if saved is None else saved[2]["base_sha256"]
    if before is not None and not base.exists():
        return before
    now = fingerprint(base)
    if before is not None:
        check_same(folder, "model", before, now)
    return now


def _weights_of(base: Path, config: PretrainConfig, tokenizer: Tokenizer) -> tuple[list[int], dict[str, Tensor]]:
    """The ids with rows of their own of a model, and its weights, float32.

    Raises:
        TrainingError: it has no shared vocabulary rows, another number of them, none for a control token of the
            documents, or other sizes than the configuration.

    Warns:
        UserWarning: it was trained on the same documents.
    """
    begun = load_start(base, dtype="float32", full=True) if base.is_dir() and is_compact(base) else None
    if begun is None or begun.row_of_id is None:
        raise TrainingError(
            f"{base}: has no shared vocabulary rows; expected what `mixtral train export` makes of a pretraining run "
            "without --dtype. Other models are fine-tuned: `mixtral train sft`",
            param="path",
        )
    ids = trained_ids(begun.row_of_id)
    if len(ids) != config.data.trained_rows:
        raise TrainingError(
            f"trained_rows is {config.data.trained_rows}, but {base} has {len(ids)}; they must be equal",
            param="trained_rows",
        )
    check_controls(tokenizer, config.data.seed, [config.data.mixture], ids, "mixture")
    wanted = config.model.replace(vocab_size=len(ids) + 1).to_dict()
    for name, value in begun.model.config.to_dict().items():
        if name not in _NOT_SIZES and wanted[name] != value:
            raise TrainingError(
                f"model.{name} is {wanted[name]!r}, but {base} has {value!r}; they must be equal", param=name
            )
    if begun.notes.get("data_seed") == str(config.data.seed):
        warnings.warn(
            f"{base}: was trained on the documents of data.seed {config.data.seed} from the first on, and this run "
            "trains the same ones again; choose another seed for new ones",
            stacklevel=4,
        )
    return ids, begun.masters


def _generators(folder: Path, saved: Saved | None) -> list[list[Any]]:
    """[first step, id] of every generator that a run had; the id is None where a state was saved without it."""
    if saved is None:
        return [[0, generator_id()]]
    found: list[list[Any]] = saved[2].get("generators", [[0, None]])
    if found[-1][1] == generator_id():
        return found
    if found[-1][1] is not None:
        warnings.warn(
            f"{folder}: its documents were written by another version of the generator; from step {saved[0]} on they "
            "are those of this one. The record keeps both, and `mixtral overlap` knows the last one alone",
            stacklevel=4,
        )
    return [*found, [saved[0], generator_id()]]


def _check_documents(config: PretrainConfig, mesh: Mesh) -> None:
    together = config.data.documents_per_step // config.data.micro_batches
    if together < mesh.axes.dp:
        raise TrainingError(
            f"a micro-batch has {together} documents; expected at least one for each of {mesh.axes.dp} data ranks. "
            "Raise documents_per_step or lower micro_batches",
            param="documents_per_step",
        )


def pretrain(
    config: PretrainConfig,
    folder: Path,
    *,
    on_step: Callable[[StepReport], None],
    on_validation: Callable[[int, float], None] = lambda step, loss: None,
    max_seconds: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
    base: Path | None = None,
) -> Pretraining:
    """Train to the end of the configuration, or until ``max_seconds`` or ``stopping()``; the state is saved at the end.

    Every step is appended to ``log.jsonl`` in ``folder``; so is, after every save, the validation loss, which
    ``on_validation`` gets with the number of the step. Called again with the same folder it goes on where it stopped,
    with bitwise the same result as one run without a stop (same machine, same number of threads, same versions, same
    axes of a ``mesh``). All ranks of a mesh call this together, with the same folder. ``base`` is where the model lies
    that ``config.start`` names, if not at its path.

    Warns:
        UserWarning: the log could not be written, or a state before the last; the training goes on.

    Raises:
        TrainingError: the run cannot start or go on, another process trains in ``folder``, or the last state could not
            be saved.
    """
    return drive(
        folder,
        lambda: Pretraining(config, folder, mesh, base),
        on_step=on_step,
        on_validation=on_validation,
        max_seconds=max_seconds,
        stopping=stopping,
        mesh=mesh,
    )
