"""How far one model's predictions are from another's on the same text: perplexity and Kullback-Leibler divergence.

T tokens, V vocabulary. Logits after token t predict token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "compare"]

Floats = NDArray[np.floating[Any]]
_ROWS = 256  # compared at a time, in float64


@dataclass(frozen=True, slots=True)
class Comparison:
    """Perplexities of both models; ``kl_mean`` and ``kl_99`` in nats (mean, and 99th percentile over tokens), of the
    second from the first; ``same_top`` is the share of tokens after which both expect the same one most."""

    perplexity: tuple[float, float]
    kl_mean: float
    kl_99: float
    same_top: float


def compare(first_TV: Floats, second_TV: Floats, ids: Sequence[int]) -> Comparison:
    """Compare the logits of two models after each of T ids.

    The divergence of a token is ``sum_v p(v) (log p(v) - log q(v))`` with p of the first model; a perplexity is ``exp``
    of the mean negative log-probability of the ids after the first one.

    Raises:
        ValueError: fewer than two ids, or other shapes than [T, V].
    """
    if len(ids) < 2 or first_TV.shape != second_TV.shape or len(first_TV) != len(ids):
        raise ValueError(f"{len(ids)} ids, logits {first_TV.shape} and {second_TV.shape}; expected [T, V] with T >= 2")
    kl, same, lost = [], [], np.zeros(2)
    for start in range(0, len(ids), _ROWS):
        p, q = (_log_softmax(logits[start : start + _ROWS]) for logits in (first_TV, second_TV))
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        wanted = np.asarray(ids[start + 1 : start + 1 + _ROWS], dtype=np.int64)
        lost -= [values[np.arange(len(wanted)), wanted].sum() for values in (p, q)]
    kl_T = np.concatenate(kl)
    before, after = np.exp(lost / (len(ids) - 1)).tolist()
    return Comparison(
        (before, after), float(kl_T.mean()), float(np.percentile(kl_T, 99)), float(np.concatenate(same).mean())
    )


def _log_softmax(logits_TV: Floats) -> NDArray[np.float64]:
    shifted = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
