"""Cross entropy with the head's rows split over ranks: what travels is two numbers per token, never scores.

T tokens, D width, R rows of the head, of which every rank of the group has a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.parallel.tensor import enter

__all__ = ["HeadPart", "split_cross_entropy"]

_CHUNK_ELEMENTS = 1 << 21  # scores that are computed together, of at least so many tokens, as in ops.losses
_FEWEST_TOKENS = 512


@dataclass(frozen=True, slots=True)
class HeadPart:
    """Which of the head's ``rows`` this rank has: ``count`` from ``first``. A rank may have none."""

    group: dist.ProcessGroup
    rows: int
    first: int
    count: int

    @property
    def has_last(self) -> bool:
        """Whether the whole head's last row, which may stand for several, is here."""
        return self.count > 0 and self.first + self.count == self.rows

    def tokens_together(self) -> int:
        """The same on every rank: all of them take the same turns."""
        return max(_FEWEST_TOKENS, _CHUNK_ELEMENTS // -(-self.rows // self.group.size()))

    def scores(self, hidden_TD: Tensor, head_RD: Tensor, copies_of_last: int) -> Tensor:
        """Float32 scores of this rank's rows."""
        scores = (hidden_TD @ head_RD.t()).float()
        if self.has_last:
            scores[:, -1] += math.log(copies_of_last)
        return scores

    def find(self, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens whose label is a row of this rank, and those rows' places here."""
        places_T = labels_T - self.first
        mine = torch.nonzero((places_T >= 0) & (places_T < self.count))[:, 0]
        return mine, places_T[mine]

    def normaliser_and_label(self, scores: Tensor, mine: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of every token: the log of the sum of exponentials over the rows of all ranks, and the label's score."""
        own = scores.new_zeros((2, scores.shape[0]))
        own[0] = scores.logsumexp(-1) if self.count else -math.inf
        own[1, mine] = scores[mine, places]
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(parts, own, group=self.group)
        every = torch.stack(parts)
        return every[:, 0].logsumexp(0), every[:, 1].sum(0)


class _SplitCrossEntropy(torch.autograd.Function):
    """As ``ops.losses`` does it: gradients chunk by chunk in the forward pass, so that no scores are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_RD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        part: HeadPart,
        copies_of_last: int,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden_TD) if train else None
        grad_head = torch.zeros(head_RD.shape, dtype=torch.float32, device=head_RD.device) if train else None
        logprobs_T = torch.empty(labels_T.shape, dtype=torch.float32, device=hidden_TD.device)
        for start in range(0, labels_T.shape[0], part.tokens_together()):
            chunk = slice(start, start + part.tokens_together())
            hidden = hidden_TD[chunk]
            scores = part.scores(hidden, head_RD, copies_of_last)
            mine, places = part.find(labels_T[chunk])
            normaliser, label = part.normaliser_and_label(scores, mine, places)
            logprobs_T[chunk] = label - normaliser
            if grad_hidden is None or grad_head is None:
                continue
            grad = scores.sub_(normaliser[:, None]).exp_()
            grad[mine, places] -= 1
            grad = grad.mul_(weights_T[chunk, None]).to(head_RD.dtype)
            torch.mm(grad, head_RD, out=grad_hidden[chunk])
            grad_head += grad.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(logprobs_T)
        return -(logprobs_T * weights_T).sum(), logprobs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (grad_hidden * grads[0]).to(grad_hidden.dtype), grad_head * grads[0], None, None, None, None, None


def split_cross_entropy(
    hidden_TD: Tensor,
    head_RD: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    *,
    part: HeadPart,
    copies_of_last: int = 1,
) -> tuple[Tensor, Tensor]:
    """As ``ops.head_cross_entropy``; ``head_RD`` are the rows of this rank, labels are rows of the whole head.

    Every rank of the group gets the whole loss and the log-probabilities [T], and the gradient of its own rows.
    """
    train = torch.is_grad_enabled()
    if train:
        (hidden_TD,) = enter(part.group, hidden_TD)
    loss, logprobs_T = _SplitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head_RD, labels_T, weights_T, part, copies_of_last, train
    )
    return loss, logprobs_T
