"""Cross entropy fused with the head: the [T, V] logits never exist as a whole, gradients are made going forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["head_cross_entropy"]

# Scores of this many tokens stay in a CPU's cache (8 MB for a vocabulary of 4,096) while five passes go over them.
_CHUNK_ELEMENTS = 1 << 21


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_RD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        copies_of_last: int,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = (train and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_head = torch.zeros(head_RD.shape, dtype=torch.float32, device=head_RD.device) if needs_head else None
        logprobs_T = torch.empty(labels_T.shape, dtype=torch.float32, device=hidden_TD.device)
        chunk = max(64, _CHUNK_ELEMENTS // head_RD.shape[0])
        for start in range(0, labels_T.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden, labels = hidden_TD[part], labels_T[part, None]
            scores = (hidden @ head_RD.t()).float()
            scores[:, -1] += math.log(copies_of_last)
            scores = scores.log_softmax(-1)
            logprobs_T[part] = scores.gather(1, labels)[:, 0]
            if grad_hidden is None and grad_head is None:
                continue
            grad = scores.exp_().scatter_add_(1, labels, torch.full_like(scores[:, :1], -1.0))
            grad = grad.mul_(weights_T[part, None]).to(head_RD.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head_RD, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += grad.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(logprobs_T)
        return -(logprobs_T * weights_T).sum(), logprobs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(grad_hidden.dtype),
            None if grad_head is None else grad_head * scale,
            None,
            None,
            None,
            None,
        )


def head_cross_entropy(
    hidden_TD: Tensor, head_RD: Tensor, labels_T: Tensor, weights_T: Tensor, *, copies_of_last: int = 1
) -> tuple[Tensor, Tensor]:
    """Weighted sum of ``-log p(label)`` and the log-probabilities [T] themselves (float32; no gradient through these).

    Args:
        hidden_TD: hidden states after the final norm.
        head_RD: output rows. The last row stands for ``copies_of_last`` equal rows of the vocabulary (shared rows).
        labels_T: int64 row of the right answer; never the shared row when ``copies_of_last`` > 1.
        weights_T: float32 weight of every token, already divided by the step's total; 0 leaves a token out.
    """
    loss, logprobs_T = _HeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head_RD, labels_T, weights_T, copies_of_last, torch.is_grad_enabled()
    )
    return loss, logprobs_T
