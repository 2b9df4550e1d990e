"""Choosing the next token: a pure function of one row of logits, the history, the parameters and a counter.

Steps, in this order: penalties, temperature, top_k, top_p, min_p, draw. All arithmetic is in float64 on the host, so a
row gives the same token whatever is next to it in the batch. The draw is the inverse of the cumulative distribution in
order of token id, at a number that depends on (seed, sequence, position) alone.

V vocabulary; N tokens still possible.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixtral.errors import NumericalError
from mixtral.wire import Candidate, SamplingParams

__all__ = ["GREEDY_BELOW", "Choice", "History", "choose", "distribution", "log_softmax", "uniform"]

GREEDY_BELOW = 1e-3  # temperatures below this take the most likely token

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class History:
    """What the penalties of one sequence need to know: ids seen anywhere, and how often each was put out."""

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self.seen_V = np.zeros(vocab_size, dtype=np.bool_)
        self.seen_V[np.asarray(prompt, dtype=np.int64)] = True
        self.counts_V = np.zeros(vocab_size, dtype=np.int64)

    def add(self, id: int) -> None:
        """Count one token of the output."""
        self.seen_V[id] = True
        self.counts_V[id] += 1


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen id; with ``logprobs`` also its raw log-probability and those of the most likely ids."""

    id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


def choose(
    logits_V: npt.NDArray[np.floating],
    params: SamplingParams,
    history: History,
    *,
    seed: int,
    sequence: int,
    position: int,
) -> Choice:
    """Choose the token at ``position`` of ``sequence``. ``logits_V`` are the raw logits of the position before it.

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    row_V = np.asarray(logits_V, dtype=np.float64)
    if not np.isfinite(row_V).all():
        bad = int(np.flatnonzero(~np.isfinite(row_V))[0])
        raise NumericalError(
            f"the logit of token {bad} at position {position} is {row_V[bad]}; expected a finite number. "
            "The weights are damaged or their dtype overflows"
        )
    ids_N, probs_N = distribution(row_V, params, history)
    id = int(ids_N[0]) if len(ids_N) == 1 else _draw(ids_N, probs_N, uniform(seed, sequence, position))
    if params.logprobs is None:
        return Choice(id)
    logprobs_V = log_softmax(row_V)
    top = tuple(Candidate(int(i), float(logprobs_V[i])) for i in _largest(row_V, params.logprobs))
    return Choice(id, float(logprobs_V[id]), top)


def distribution(row_V: Floats, params: SamplingParams, history: History) -> tuple[Ids, Floats]:
    """The ids that may be drawn, in increasing order, and their probabilities. Greedy leaves one id."""
    row_V = _penalise(row_V, params, history)
    if params.temperature < GREEDY_BELOW:
        return np.array([np.argmax(row_V)], dtype=np.int64), np.ones(1)
    row_V = row_V / params.temperature
    ids_N = np.arange(len(row_V), dtype=np.int64)
    if 0 < params.top_k < len(row_V):
        ids_N = np.sort(_largest(row_V, params.top_k))
    if params.top_p < 1.0:
        ids_N = _nucleus(row_V, ids_N, params.top_p)
    if params.min_p > 0.0:
        probs_N = _softmax(row_V[ids_N])
        ids_N = ids_N[probs_N >= params.min_p * probs_N.max()]
    return ids_N, _softmax(row_V[ids_N])


def log_softmax(row_V: Floats) -> npt.NDArray[np.float32]:
    """Log-probabilities of a row of logits, rounded to float32."""
    shifted_V = row_V - row_V.max()
    logprobs_V: npt.NDArray[np.float32] = (shifted_V - np.log(np.exp(shifted_V).sum())).astype(np.float32)
    return logprobs_V


def uniform(seed: int, sequence: int, position: int) -> float:
    """The random number in [0, 1) of one draw: a hash of its three arguments, and of nothing else."""
    key = struct.pack("<qqq", seed, sequence, position)
    digest = hashlib.blake2b(key, digest_size=8, person=b"mixtral-draw").digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _penalise(row_V: Floats, params: SamplingParams, history: History) -> Floats:
    if params.repetition_penalty != 1.0:
        factor = params.repetition_penalty
        row_V = np.where(history.seen_V, np.where(row_V < 0, row_V * factor, row_V / factor), row_V)
    if params.presence_penalty != 0.0:
        row_V = row_V - params.presence_penalty * (history.counts_V > 0)
    if params.frequency_penalty != 0.0:
        row_V = row_V - params.frequency_penalty * history.counts_V
    return row_V


def _nucleus(row_V: Floats, ids_N: Ids, top_p: float) -> Ids:
    """The fewest of the most likely ids that together reach ``top_p``; at least one."""
    probs_N = _softmax(row_V[ids_N])
    # All ids below this probability have less than 1 - top_p together: the nucleus is among the others; sort those.
    likely_N = np.flatnonzero(probs_N >= (1.0 - top_p) / len(probs_N))
    order_N = likely_N[np.argsort(-probs_N[likely_N], kind="stable")]
    reached_N = np.cumsum(probs_N[order_N])
    keep = int(np.searchsorted(reached_N, top_p, side="left")) + 1  # up to and including the one that reaches top_p
    return np.sort(ids_N[order_N[:keep]])


def _largest(row_V: Floats, count: int) -> Ids:
    """The ids of the ``count`` largest values, largest first; equal values: lowest id first."""
    count = min(count, len(row_V))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(row_V, len(row_V) - count)[len(row_V) - count]
    ids_N = np.flatnonzero(row_V >= threshold)
    return ids_N[np.argsort(-row_V[ids_N], kind="stable")][:count]


def _softmax(row_N: Floats) -> Floats:
    weights_N = np.exp(row_N - row_N.max())
    probs_N: Floats = weights_N / weights_N.sum()
    return probs_N


def _draw(ids_N: Ids, probs_N: Floats, number: float) -> int:
    cumulative_N = np.cumsum(probs_N)
    index = int(np.searchsorted(cumulative_N, number * cumulative_N[-1], side="right"))
    return int(ids_N[min(index, len(ids_N) - 1)])
