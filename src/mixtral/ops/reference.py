"""Every operation of Mixtral in plain torch, on any device and dtype, with autograd: this file is the specification.

Shape letters: B sequences, T tokens of all sequences flattened, S cached tokens of one sequence, D width, H query
heads, G key-value heads, K head size, F expert hidden size, E experts, A experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Pair",
    "Route",
    "attention",
    "choose",
    "experts",
    "head_cross_entropy",
    "linear",
    "rms_norm",
    "rope",
    "rope_angles",
    "route",
    "swiglu",
]


class Route(NamedTuple):
    """One layer's routing: raw ``logits_TE`` (float32), chosen ones ``picks_TA`` (int64), ``weights_TA`` (float32)."""

    logits_TE: Tensor
    picks_TA: Tensor
    weights_TA: Tensor


class Pair(NamedTuple):
    """Low-rank additions to all experts' matrices [E, O, I]: expert e also adds ``scale * b[e] (a[e] x)``, rank R."""

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float


def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """``x @ weight.T`` without bias: [T, O]."""
    return F.linear(x_TD, weight_OD)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm: normalise in float32, cast back, then scale. Shape and dtype of ``x_TD``."""
    x32_TD = x_TD.float()
    scale_T1 = torch.rsqrt(x32_TD.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * (x32_TD * scale_T1).to(x_TD.dtype)


def rope_angles(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, float32 [T, K/2] each (RoFormer, arXiv 2104.09864, section 3.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles_TK = positions_T.float()[:, None] * (1.0 / theta**exponents)[None, :]
    return angles_TK.cos(), angles_TK.sin()


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate the halves of every head (half-split: element i pairs with i + K/2). Shape and dtype of ``x_THK``."""
    first, second = x_THK.float().chunk(2, dim=-1)
    cos, sin = cos_TK[:, None, :], sin_TK[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THK.dtype)


def attention(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> Tensor:
    """Causal grouped-query attention of the last T of S tokens of one sequence over all S: [T, H, K].

    Query t sits at position S - T + t and sees the positions up to its own.
    """
    new, seen = q_THK.shape[0], k_SGK.shape[0]
    mask = None
    if 1 < new < seen:
        places = torch.arange(seen, device=q_THK.device)
        mask = places[None, :] <= places[seen - new :, None]
    out = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        k_SGK.transpose(0, 1)[None],
        v_SGK.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=new == seen and new > 1,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def route(x_TD: Tensor, gate_ED: Tensor, per_token: int) -> Route:
    """Choose experts: float32 logits, top A of the raw logits, float32 softmax over those (arXiv 2401.04088, 2.1).

    Ties go to the lower expert id. Choosing on logits, not on probabilities, keeps the order where softmax underflows.
    """
    return choose(F.linear(x_TD.float(), gate_ED.float()), per_token)


def choose(logits_TE: Tensor, per_token: int) -> Route:
    """The part of ``route`` that follows the logits."""
    # A stable sort, because topk does not promise which of two equal values comes first.
    order_TE = torch.sort(logits_TE.detach(), dim=-1, descending=True, stable=True).indices
    picks_TA = order_TE[:, :per_token].contiguous()
    return Route(logits_TE, picks_TA, logits_TE.gather(-1, picks_TA).softmax(-1))


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def experts(
    x_TD: Tensor,
    picks_TA: Tensor,
    weights_TA: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    pairs: tuple[Pair | None, Pair | None] = (None, None),
) -> Tensor:
    """Weighted sum of the chosen experts, ``sum_a weight[t,a] * down[e] swiglu(gate_up[e] x[t])``: [T, D], dropless.

    ``pairs`` add to ``gate_up`` and to ``down``. Products are summed in float32 in order of choice, so the order in
    which experts are computed cannot show.
    """
    out_TAD = x_TD.new_zeros((*picks_TA.shape, x_TD.shape[-1]))
    for expert in range(gate_up_E2FD.shape[0]):
        tokens, places = torch.nonzero(picks_TA == expert, as_tuple=True)
        if tokens.numel():
            hidden = swiglu(_with_pair(x_TD[tokens], gate_up_E2FD, pairs[0], expert))
            out_TAD = out_TAD.index_put((tokens, places), _with_pair(hidden, down_EDF, pairs[1], expert))
    return (out_TAD.float() * weights_TA[..., None].float()).sum(1).to(x_TD.dtype)


def _with_pair(x_NI: Tensor, weight_EOI: Tensor, pair: Pair | None, expert: int) -> Tensor:
    out_NO = F.linear(x_NI, weight_EOI[expert])
    if pair is None:
        return out_NO
    return out_NO + pair.scale * F.linear(F.linear(x_NI, pair.a_ERI[expert]), pair.b_EOR[expert])


def head_cross_entropy(
    hidden_TD: Tensor, head_RD: Tensor, labels_T: Tensor, weights_T: Tensor, *, copies_of_last: int = 1
) -> tuple[Tensor, Tensor]:
    """Weighted sum of ``-log p(label)`` and the log-probabilities [T], float32; the last head row counts n times."""
    scores_TR = F.linear(hidden_TD, head_RD).float()
    counts_R = torch.zeros_like(head_RD[:, 0], dtype=torch.float32)
    counts_R[-1] = math.log(copies_of_last)
    logprobs_T = (scores_TR + counts_R).log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
    return -(logprobs_T * weights_T).sum(), logprobs_T
