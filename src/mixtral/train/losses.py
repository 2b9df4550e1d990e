"""The router's losses: pure functions of raw logits. T tokens, E experts, A experts per token.

Both are for one layer; callers average over layers and weight parts of a step by their share of its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.ops import Route

__all__ = ["balance_loss", "expert_load", "router_losses", "z_loss"]


def expert_load(picks_TA: Tensor, experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Share of each expert, scaled so that perfect balance is 1 everywhere: float32 [E]. Masked tokens do not count."""
    tokens, per_token = picks_TA.shape
    weights = torch.ones(tokens, device=picks_TA.device) if mask_T is None else mask_T.float()
    counts_E = torch.zeros(experts, device=picks_TA.device)
    counts_E.index_add_(0, picks_TA.reshape(-1), weights.repeat_interleave(per_token))
    return counts_E * (experts / (per_token * weights.sum()))


def balance_loss(logits_TE: Tensor, picks_TA: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Load balance of one layer: 1 when balanced, E/A when all tokens pick the same (Switch, arXiv 2101.03961, eq. 4).

    transformers' value for the same layer is A times this one.
    """
    load_E = expert_load(picks_TA, logits_TE.shape[-1], mask_T)
    probabilities_TE = logits_TE.float().softmax(-1)
    if mask_T is None:
        return (load_E * probabilities_TE.mean(0)).sum()
    return (load_E * (probabilities_TE * mask_T[:, None]).sum(0)).sum() / mask_T.sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    squares_T = logits_TE.float().logsumexp(-1).square()
    return squares_T.mean() if mask_T is None else (squares_T * mask_T).sum() / mask_T.sum()


def router_losses(routes: tuple[Route, ...]) -> tuple[Tensor, Tensor]:
    """Balance and z loss, each the mean over layers."""
    balance = torch.stack([balance_loss(route.logits_TE, route.picks_TA) for route in routes]).mean()
    return balance, torch.stack([z_loss(route.logits_TE) for route in routes]).mean()
