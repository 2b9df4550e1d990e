"""Direct preference optimization (arXiv 2305.18290): of two answers to a prompt, the chosen one becomes likelier.

N pairs, A answer tokens of all documents, T tokens. Documents stand in pairs: chosen, rejected, chosen, rejected, ...
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.errors import ConfigError, TrainingError
from mixtral.model.batch import Output
from mixtral.ops import head_cross_entropy
from mixtral.train.data import TokenBatch
from mixtral.train.fine import FineTuning, token_batch
from mixtral.train.lines import Doc, Lines, Pair, read_pairs
from mixtral.train.loop import StepReport
from mixtral.train.losses import dpo_loss, router_losses
from mixtral.train.order import in_parts, of_step
from mixtral.train.reference import Cache, Said
from mixtral.train.training import Step, forward
from mixtral.train.tune import DpoConfig

__all__ = ["Dpo", "PairBatch", "PreferenceReport", "dpo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceReport(StepReport):
    """As ``StepReport``, and means over the pairs of the step.

    ``margin`` is that of the rewards (beta times the gained log-probability), ``accuracy`` the part of pairs where it
    is above 0 (half of those where it is 0), ``chosen_logprob`` and ``rejected_logprob`` are per token of the answers.
    ``kl`` estimates the distance from the reference per token: half the mean square of the log-ratio of both, on the
    answers of the data, which are not the policy's own. ``routing_agreement`` is the part of the experts that are those
    of the reference.
    """

    margin: float
    accuracy: float
    kl: float
    chosen_logprob: float
    rejected_logprob: float
    routing_agreement: float

    def highlights(self) -> str:
        """Margin and accuracy."""
        return f"margin {self.margin:.3f}  accuracy {self.accuracy:.2f}  "


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs laid end to end; ``numbers`` are theirs in the run, held-out ones after the others."""

    tokens: TokenBatch
    numbers: tuple[int, ...]

    @property
    def inputs_T(self) -> Tensor:
        """Rows of the embedding."""
        return self.tokens.inputs_T

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return self.tokens.lengths

    @property
    def documents(self) -> list[int]:
        """The numbers of the documents in the run."""
        return [2 * number + side for number in self.numbers for side in (0, 1)]

    def document_A(self) -> Tensor:
        """The document in this batch of every answer token."""
        lengths = torch.tensor(self.lengths)
        return torch.arange(len(lengths)).repeat_interleave(lengths)[self.tokens.own_T]


class Dpo(FineTuning[DpoConfig, PairBatch, Pair]):
    """A run on pairs. The reference is the model that the run started from."""

    kind = "dpo"
    report = PreferenceReport
    sums = (
        *("loss", "balance", "z", "margin", "accuracy", "kl", "chosen_logprob", "rejected_logprob"),
        "routing_agreement",
    )

    def read(self, path: Path, held_out_percent: int) -> Lines[Pair]:
        """Read a file of pairs."""
        limit = self.config.data.max_tokens
        return read_pairs(path, self.start, max_tokens=limit, held_out_percent=held_out_percent)

    def documents(self, item: Pair) -> list[Doc]:
        """Both documents of a pair."""
        return [item.chosen, item.rejected]

    def prepare(self) -> None:
        """Ask the model for what it says of all answers, once, unless an adapter can be switched off instead."""
        wanted, has_adapter = self.config.dpo.reference, self.adapter is not None
        if wanted == "adapter-off" and not has_adapter:
            raise ConfigError(
                'reference is "adapter-off", but there is no adapter to switch off; expected "cached" or "auto"',
                param="reference",
            )
        self._cache: Cache | None = None
        if wanted == "adapter-off" or (wanted == "auto" and has_adapter and self.config.run.epochs == 1):
            return
        sizes, pairs = self.model.config, [*self.lines.kept, *self.held_out]
        lengths = [int(doc.trained[1:].sum()) for pair in pairs for doc in self.documents(pair)]
        cache = Cache(
            self.folder / "reference", self._key(), lengths, sizes.num_hidden_layers, sizes.num_experts_per_tok
        )
        if self.mesh.is_first:
            try:
                if not cache.open():
                    self._fill(cache, len(pairs))
            finally:
                self.mesh.any(False)
        else:
            while self.mesh.any(False):  # the first rank is at work
                pass
        if not cache.open():
            raise TrainingError(
                f"{self.folder}: the first rank did not write what the others can read; it says why, or the folder is "
                "not on a shared disk"
            )
        self._cache = cache

    def _fill(self, cache: Cache, pairs: int) -> None:
        """Ask for all pairs. The other ranks hear after every part that it goes on: they do not wait for ever."""
        parts = [self._part(numbers) for numbers in self._cut(range(pairs))]
        by_numbers = {part.numbers: part for part in parts}

        def say(numbers: Sequence[int]) -> Said:
            said = self._say(by_numbers[tuple(numbers)])
            self.mesh.any(True)
            return said

        cache.fill([part.numbers for part in parts], say)

    def parts(self, step: int) -> list[PairBatch]:
        """The parts of a step's batch; both documents of a pair are in one."""
        data = self.config.data
        numbers = self.own(of_step(data.seed, step, len(self.lines.kept), data.documents_per_step))
        return [self._part(part) for part in self.evenly(self._cut(numbers))]

    def weight_of(self, part: PairBatch) -> float:
        """The number of pairs."""
        return float(len(part.numbers))

    def backward(self, part: PairBatch, step: Step) -> None:
        """The gradient of the loss of every pair, as weights of the cross entropy of its tokens.

        The loss depends on the parameters through the answers' log-probabilities alone. So its gradient is that of a
        weighted sum of them, and the weights, its derivatives, are known before the backward pass.
        """
        out = forward(self.model, part)
        hidden_AD, labels_A, _ = self.answers(out.hidden_TD, part.tokens)
        head, copies = self.model.lm_head.weight, self.start.copies_of_last
        said = self._said(hidden_AD.detach(), labels_A, part, out)
        weights_A, terms = self._weigh(part, said, self._reference(part), step.labelled)
        objective, _ = head_cross_entropy(
            hidden_AD, head, labels_A, weights_A.to(hidden_AD.device), copies_of_last=copies
        )
        optim = self.config.optim
        step.count(out)
        balance, z = router_losses(out.routes, **step.balanced_over(optim, part))
        share = step.share(part)
        aux = share * (optim.balance_coef * balance + optim.z_coef * z)
        (objective + aux).backward()  # type: ignore[no-untyped-call]
        step.add(**terms, balance=share * balance, z=share * z)

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        """Mean loss of the held-out pairs."""
        count = len(self.held_out)
        total = 0.0
        numbers = self.own(range(len(self.lines.kept), len(self.lines.kept) + count))
        for part in map(self._part, self._cut(numbers)):
            _, terms = self._weigh(part, self._say(part, as_reference=False), self._reference(part), count)
            total += float(terms["loss"])
        total = float(self.mesh.sum(torch.tensor([total], dtype=torch.float64)))
        return total if count else None

    def facts(self) -> dict[str, Any]:
        """As in SFT, and the loss."""
        table = self.config.dpo
        return super().facts() | {
            "preference": {
                "beta": table.beta,
                "label_smoothing": table.label_smoothing,
                "nll_coef": table.nll_coef,
                "length_normalised": table.length_normalised,
                "reference": "adapter switched off" if self._cache is None else "log-probabilities kept in a file",
            }
        }

    def _cut(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        def size(number: int) -> int:
            return sum(len(doc.ids) - 1 for doc in self._documents(number))

        return in_parts(numbers, size, self.config.data.tokens_per_part)

    def _part(self, numbers: Sequence[int]) -> PairBatch:
        docs = [doc for number in numbers for doc in self._documents(number)]
        return PairBatch(token_batch(self.start, docs), tuple(numbers))

    def _documents(self, number: int) -> list[Doc]:
        """Those of a pair of the run; held-out ones have the numbers after the others."""
        count = len(self.lines.kept)
        return self.documents(self.lines.kept[number] if number < count else self.held_out[number - count])

    def _weigh(
        self, part: PairBatch, policy: Said, reference: Said, pairs: float
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weight of every answer token in the cross entropy, float32 [A]; and the terms of the report."""
        table, document_A = self.config.dpo, part.document_A()
        count = len(part.lengths)
        sizes_B = torch.bincount(document_A, minlength=count).double()

        def by_document(values_A: Tensor) -> Tensor:
            return torch.zeros(count, dtype=torch.float64).index_add(0, document_A, values_A.double())

        divisor_B = sizes_B if table.length_normalised else torch.ones_like(sizes_B)
        policy_N2 = (by_document(policy.logprobs_A) / divisor_B).view(-1, 2)
        reference_N2 = (by_document(reference.logprobs_A) / divisor_B).view(-1, 2)
        with torch.enable_grad():
            leaf_N2 = policy_N2.clone().requires_grad_()
            losses_N, margin_N = dpo_loss(leaf_N2, reference_N2, table.beta, label_smoothing=table.label_smoothing)
            (grad_N2,) = torch.autograd.grad(losses_N.sum(), leaf_N2)
        chosen_B = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(count // 2)
        factor_B = -grad_N2.flatten() / divisor_B + table.nll_coef * chosen_B / sizes_B
        means_N2 = (by_document(policy.logprobs_A) / sizes_B).view(-1, 2)
        loss_N = losses_N.detach() - table.nll_coef * means_N2[:, 0]
        margin_N = margin_N.detach()
        kl_B = by_document((policy.logprobs_A - reference.logprobs_A).double().square() / 2) / sizes_B
        same_A = (policy.picks_ALK[..., :, None] == reference.picks_ALK[..., None, :]).any(-1).double().mean((1, 2))
        terms: dict[str, Tensor | float] = {
            "loss": loss_N.sum() / pairs,
            "margin": table.beta * margin_N.sum() / pairs,
            "accuracy": ((margin_N > 0).double() + 0.5 * (margin_N == 0)).sum() / pairs,
            "kl": kl_B.sum() / (2 * pairs),
            "chosen_logprob": means_N2[:, 0].sum() / pairs,
            "rejected_logprob": means_N2[:, 1].sum() / pairs,
            "routing_agreement": (by_document(same_A) / sizes_B).sum() / (2 * pairs),
        }
        return (factor_B / pairs)[document_A].float(), terms

    def _reference(self, part: PairBatch) -> Said:
        return self._say(part) if self._cache is None else self._cache.of(part.documents)

    @torch.no_grad()
    def _say(self, part: PairBatch, *, as_reference: bool = True) -> Said:
        """What the model says of the answers; as the reference, with its adapter switched off."""
        off = self.adapter.disabled() if self.adapter is not None and as_reference else nullcontext()
        with off:
            out = forward(self.model, part)
            hidden_AD, labels_A, _ = self.answers(out.hidden_TD, part.tokens)
            return self._said(hidden_AD, labels_A, part, out)

    @torch.no_grad()
    def _said(self, hidden_AD: Tensor, labels_A: Tensor, part: PairBatch, out: Output) -> Said:
        ones_A = torch.ones(len(labels_A), device=labels_A.device)
        head, copies = self.model.lm_head.weight, self.start.copies_of_last
        _, logprobs_A = head_cross_entropy(hidden_AD, head, labels_A, ones_A, copies_of_last=copies)
        picks = [route.picks_TA.cpu()[part.tokens.own_T].to(torch.int16) for route in out.routes]
        return Said(logprobs_A.cpu(), torch.stack(picks, 1))

    def _key(self) -> str:
        """What decides the reference's numbers."""
        data, run = self.config.data, self.config.run
        parts = (self.data_sha256, self.base_sha256, data.max_tokens, data.held_out_percent, data.tokens_per_part)
        return hashlib.sha256(repr((*parts, run.dtype, run.threads)).encode()).hexdigest()


dpo = Dpo.train
