"""Supervised fine-tuning on the user's conversations and texts: all of the weights, or an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mixtral.ops import head_cross_entropy
from mixtral.train.data import TokenBatch
from mixtral.train.fine import FineTuning, token_batch
from mixtral.train.lines import Doc, Lines, read_texts
from mixtral.train.losses import router_losses
from mixtral.train.order import in_parts, of_step
from mixtral.train.training import Step, forward
from mixtral.train.tune import SftConfig

__all__ = ["Sft", "sft"]


class Sft(FineTuning[SftConfig, TokenBatch, Doc]):
    """A run on documents: the assistant's turns with their ends, and plain text, are learnt."""

    kind = "sft"

    def read(self, path: Path, held_out_percent: int) -> Lines[Doc]:
        """Read a file of conversations and texts."""
        limit = self.config.data.max_tokens
        return read_texts(path, self.start, max_tokens=limit, held_out_percent=held_out_percent)

    def documents(self, item: Doc) -> list[Doc]:
        """The document itself."""
        return [item]

    def parts(self, step: int) -> list[TokenBatch]:
        """The parts of a step's batch: the same documents whatever the size of parts."""
        data = self.config.data
        numbers = of_step(data.seed, step, len(self.lines.kept), data.documents_per_step)
        cut = self._cut([self.lines.kept[number] for number in self.own(numbers)])
        return [token_batch(self.start, part) for part in self.evenly(cut)]

    def _cut(self, docs: Sequence[Doc]) -> Iterator[list[Doc]]:
        return in_parts(docs, lambda doc: len(doc.ids) - 1, self.config.data.tokens_per_part)

    def weight_of(self, part: TokenBatch) -> float:
        """The sum of the loss weights."""
        return float(part.weights_T.double().sum())

    def backward(self, part: TokenBatch, step: Step) -> None:
        """Cross entropy of the tokens that are learnt, over those of the whole step."""
        out = forward(self.model, part)
        hidden_TD, labels_T, weights_T = self.answers(out.hidden_TD, part)
        head = self.model.lm_head.weight
        copies = self.start.copies_of_last
        loss, _ = head_cross_entropy(hidden_TD, head, labels_T, weights_T / step.labelled, copies_of_last=copies)
        optim = self.config.optim
        step.count(out)
        balance, z = router_losses(out.routes, **step.balanced_over(optim, part))
        share = step.share(part)
        (loss + share * (optim.balance_coef * balance + optim.z_coef * z)).backward()  # type: ignore[no-untyped-call]
        step.add(loss=loss, balance=share * balance, z=share * z)

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        """Mean cross entropy, in nats, of the learnt tokens of the held-out documents."""
        total = weight = 0.0
        for docs in self._cut(self.own(self.held_out)):
            part = token_batch(self.start, docs)
            hidden_TD, labels_T, weights_T = self.answers(forward(self.model, part).hidden_TD, part)
            head = self.model.lm_head.weight
            loss, _ = head_cross_entropy(hidden_TD, head, labels_T, weights_T, copies_of_last=self.start.copies_of_last)
            total, weight = total + float(loss), weight + self.weight_of(part)
        total, weight = self.mesh.sum(torch.tensor([total, weight], dtype=torch.float64)).tolist()
        return total / weight if weight else None


sft = Sft.train
