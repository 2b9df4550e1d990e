"""Cross entropy fused with the head: the [T, V] logits never exist as a whole, gradients are made going forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.ops import compiled

__all__ = ["head_cross_entropy"]

# As many scores stay in a CPU's cache, in float32, while five passes go over them.
_CACHED_SCORES = 1 << 21
# The gradient of the head is added up in as few parts as memory allows: each is a pass over the whole head.
_FEWEST_ROWS = 512


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
        block = max(_FEWEST_ROWS, _CACHED_SCORES // head_RD.shape[0])
        for start in range(0, labels_T.shape[0], block):
            part = slice(start, start + block)
            hidden = hidden_TD[part]
            scores_BR = hidden @ head_RD.t()
            logprobs_T[part] = _logprobs(
                scores_BR, labels_T[part], weights_T[part], math.log(copies_of_last), train=needs_hidden or needs_head
            )
            if grad_hidden is not None:
                torch.mm(scores_BR, head_RD, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += scores_BR.t() @ hidden
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


def _logprobs(scores_BR: Tensor, labels_B: Tensor, weights_B: Tensor, log_copies: float, *, train: bool) -> Tensor:
    """Log-probabilities [B] of the labels. With ``train`` the scores become their gradients: shares less one at the
    label, weighted."""
    logprobs_B = torch.empty(labels_B.shape, dtype=torch.float32, device=scores_BR.device)
    if compiled.is_compiled(scores_BR):
        labels_B, weights_B = labels_B.contiguous(), weights_B.float().contiguous()
        compiled.call("train_loss", scores_BR, labels_B, weights_B, log_copies, logprobs_B, train)
        return logprobs_B
    cached = max(1, _CACHED_SCORES // scores_BR.shape[1])
    for start in range(0, len(scores_BR), cached):
        some = slice(start, start + cached)
        wide_BR = scores_BR[some].float()
        wide_BR[:, -1] += log_copies
        wide_BR = wide_BR.log_softmax(-1)
        labels_B1 = labels_B[some, None]
        logprobs_B[some] = wide_BR.gather(1, labels_B1)[:, 0]
        if not train:
            continue
        grad_BR = wide_BR.exp_().scatter_add_(1, labels_B1, torch.full_like(wide_BR[:, :1], -1.0))
        scores_BR[some] = grad_BR.mul_(weights_B[some, None]).to(scores_BR.dtype)
    return logprobs_B


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
