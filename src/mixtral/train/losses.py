"""The router's losses and that of preferences: pure functions. T tokens, E experts, A experts per token, N pairs.

Those of the router take raw logits and are for one layer; callers average over layers and weight parts of a step by
their share of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.ops import Route

__all__ = ["balance_by_document", "balance_loss", "dpo_loss", "expert_load", "router_losses", "z_loss"]


def expert_load(picks_TA: Tensor, experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Share of each expert, scaled so that perfect balance is 1 everywhere: float32 [E]. Masked tokens do not count."""
    tokens, per_token = picks_TA.shape
    weights = torch.ones(tokens, device=picks_TA.device) if mask_T is None else mask_T.float()
    counts_E = torch.zeros(experts, device=picks_TA.device)
    counts_E.index_add_(0, picks_TA.reshape(-1), weights.repeat_interleave(per_token))
    return counts_E * (experts / (per_token * weights.sum()))


def balance_loss(
    logits_TE: Tensor, picks_TA: Tensor, mask_T: Tensor | None = None, *, load_E: Tensor | None = None
) -> Tensor:
    """Load balance of one layer: 1 when balanced, E/A when all tokens pick the same (Switch, arXiv 2101.03961, eq. 4).

    transformers' value for the same layer is A times this one. ``load_E`` is the load to balance, if it is that of more
    tokens than these.
    """
    if load_E is None:
        load_E = expert_load(picks_TA, logits_TE.shape[-1], mask_T)
    probabilities_TE = logits_TE.float().softmax(-1)
    if mask_T is None:
        return (load_E * probabilities_TE.mean(0)).sum()
    return (load_E * (probabilities_TE * mask_T[:, None]).sum(0)).sum() / mask_T.sum()


def balance_by_document(logits_TE: Tensor, picks_TA: Tensor, lengths: Sequence[int]) -> Tensor:
    """The balance loss of every document on its own, weighted by its tokens: the same in any packing, in any parts."""
    tokens, experts = logits_TE.shape
    per_token = picks_TA.shape[1]
    sizes_B = torch.tensor(lengths, device=logits_TE.device)
    document_T = torch.arange(len(lengths), device=logits_TE.device).repeat_interleave(sizes_B)
    flat = document_T.repeat_interleave(per_token) * experts + picks_TA.reshape(-1)
    counts_BE = torch.bincount(flat, minlength=len(lengths) * experts).view(len(lengths), experts)
    probabilities_TE = logits_TE.float().softmax(-1)
    mass_BE = torch.zeros_like(counts_BE, dtype=probabilities_TE.dtype).index_add(0, document_T, probabilities_TE)
    each_B = (counts_BE * mass_BE).sum(-1) * experts / (per_token * sizes_B.square())
    return (each_B * sizes_B).sum() / tokens


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    squares_T = logits_TE.float().logsumexp(-1).square()
    return squares_T.mean() if mask_T is None else (squares_T * mask_T).sum() / mask_T.sum()


def router_losses(
    routes: tuple[Route, ...], *, lengths: Sequence[int] | None = None, loads_LE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Balance and z loss, each the mean over layers.

    The balance is over all tokens given; over each document on its own with their ``lengths``; or, with ``loads_LE``,
    of those loads, which may be of more tokens.
    """
    if lengths is not None:
        each = [balance_by_document(route.logits_TE, route.picks_TA, lengths) for route in routes]
    else:
        loads: Sequence[Tensor | None] = [None] * len(routes) if loads_LE is None else list(loads_LE)
        each = [
            balance_loss(route.logits_TE, route.picks_TA, load_E=load_E)
            for route, load_E in zip(routes, loads, strict=True)
        ]
    return torch.stack(each).mean(), torch.stack([z_loss(route.logits_TE) for route in routes]).mean()


def dpo_loss(
    policy_N2: Tensor, reference_N2: Tensor, beta: float, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of every pair and its margin, [N] each: ``-log sigmoid(beta * margin)`` (DPO, arXiv 2305.18290, eq. 7).

    The columns are the log-probabilities of the chosen and of the rejected answer. The margin is by how much more the
    policy prefers the chosen one than the reference does. ``label_smoothing`` is the part of the pairs that is taken to
    be the wrong way round (conservative DPO).
    """
    gained_N2 = policy_N2 - reference_N2
    margin_N = gained_N2[:, 0] - gained_N2[:, 1]
    right_N, wrong_N = F.logsigmoid(beta * margin_N), F.logsigmoid(-beta * margin_N)
    return -(1 - label_smoothing) * right_N - label_smoothing * wrong_N, margin_N
