"""The sparse mixture-of-experts layer in float64 NumPy, token by token, from arXiv 2401.04088, section 2.1."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["moe"]

Array = npt.NDArray[np.float64]


def expert(x_D: Array, gate_up_2FD: Array, down_DF: Array) -> Array:
    """``w2 (silu(w1 x) * (w3 x))``; w1 is the first half of the rows of ``gate_up``, w3 the second."""
    hidden = len(gate_up_2FD) // 2
    w1, w3 = gate_up_2FD[:hidden], gate_up_2FD[hidden:]
    gate = w1 @ x_D
    result: Array = down_DF @ (gate / (1 + np.exp(-gate)) * (w3 @ x_D))
    return result


def moe(x_TD: Array, gate_ED: Array, gate_up_E2FD: Array, down_EDF: Array, per_token: int) -> Array:
    """[T, D]: softmax over the highest ``per_token`` router logits (ties: the lower expert) times those experts."""
    out_TD = np.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        logits_E = gate_ED @ x_D
        chosen = sorted(range(len(gate_ED)), key=lambda e: (-logits_E[e], e))[:per_token]
        odds = np.exp(logits_E[chosen] - logits_E[chosen].max())
        for weight, e in zip(odds / odds.sum(), chosen, strict=True):
            out_TD[t] += weight * expert(x_D, gate_up_E2FD[e], down_EDF[e])
    return out_TD
