"""Choosing the next token: a pure function of one row of logits, the history, the parameters and a counter.

Steps, in this order: penalties, bias, mask, temperature, top_k, top_p, min_p, draw. All arithmetic is in float64 on the
host, so a row gives the same token whatever is next to it in the batch. The draw is the inverse of the cumulative
distribution in order of token id, at a number that depends on (seed, sequence, position) alone.

A vocabulary is long and few of its tokens matter: what is largest is found through the largest values of interleaved
groups, and sums are only refined where the drawn number falls.

V vocabulary; N tokens still possible.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixtral.errors import NumericalError
from mixtral.wire import Candidate, SamplingParams

__all__ = [
    "GREEDY_BELOW",
    "Choice",
    "History",
    "NoTokenError",
    "choose",
    "distribution",
    "is_greedy",
    "log_softmax",
    "needs_history",
    "score",
    "uniform",
]

GREEDY_BELOW = 1e-3  # temperatures below this take the most likely token
_GROUPS = 256
_BLOCK = 128

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.uint32]


class NoTokenError(Exception):
    """Mask and banned ids leave no token."""


class History:
    """What the penalties of one sequence need to know: ids seen anywhere, and how often each was put out."""

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self._place_V = np.full(vocab_size, -1, dtype=np.int64)
        self._ids = np.unique(np.asarray(prompt, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._length = len(self._ids)
        self._place_V[self._ids] = np.arange(self._length)

    @property
    def ids(self) -> Ids:
        """All ids seen, each once."""
        return self._ids[: self._length]

    @property
    def counts(self) -> Ids:
        """How often each of ``ids`` was put out."""
        return self._counts[: self._length]

    def add(self, id: int) -> None:
        """Count one token of the output."""
        place = self._place_V[id]
        if place < 0:
            place = self._place_V[id] = self._length
            if place == len(self._ids):
                self._ids, self._counts = (np.append(old, np.zeros(place + 64, np.int64)) for old in self._both())
            self._ids[place] = id
            self._length += 1
        self._counts[place] += 1

    def _both(self) -> tuple[Ids, Ids]:
        return self._ids, self._counts


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen id; with ``logprobs`` also its raw log-probability and those of the most likely ids."""

    id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


def is_greedy(params: SamplingParams) -> bool:
    """Whether the choice is the largest raw logit, as long as nothing is masked or banned."""
    return params.temperature < GREEDY_BELOW and not (needs_history(params) or params.logit_bias)


def needs_history(params: SamplingParams) -> bool:
    """Whether there is a penalty."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def choose(
    logits_V: npt.NDArray[np.floating],
    params: SamplingParams,
    history: History | None,
    *,
    seed: int,
    sequence: int,
    position: int,
    mask: Mask | None = None,
    banned: Iterable[int] = (),
) -> Choice:
    """Choose the token at ``position`` of ``sequence``. ``logits_V`` are the raw logits of the position before it.

    Only ids whose bit is set in ``mask`` (uint32, 32 ids each, the lowest bit first) and that are not ``banned`` can be
    chosen. Without penalties there may be no ``history``.

    Raises:
        NumericalError: a logit is NaN or infinite.
        NoTokenError: there is no such id.
    """
    low, high = logits_V.min(), logits_V.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.flatnonzero(~np.isfinite(logits_V))[0])
        raise NumericalError(
            f"the logit of token {bad} at position {position} is {logits_V[bad]}; expected a finite number. "
            "The weights are damaged or their dtype overflows"
        )
    allowed_N = _allowed(len(logits_V), mask, banned)
    if allowed_N is None and is_greedy(params):
        id = int(logits_V.argmax())
    else:
        values_V = _changed(logits_V, params, history)
        if allowed_N is not None:
            values_V = values_V[allowed_N]
        place = _pick(values_V, params, seed, sequence, position)
        id = place if allowed_N is None else int(allowed_N[place])
    if params.logprobs is None:
        return Choice(id)
    logprob, top = score(logits_V, id, params.logprobs)
    return Choice(id, logprob, top)


def score(logits_V: npt.NDArray[np.floating], id: int, count: int) -> tuple[float, tuple[Candidate, ...]]:
    """The log-probability of an id, and the ``count`` most likely ids with theirs, under the raw logits."""
    row_V = np.asarray(logits_V, dtype=np.float64)
    likely = _largest(row_V, count)
    logprobs = _log_softmax_at(row_V, np.append(likely, id)).tolist()
    return logprobs[-1], tuple(map(Candidate, likely.tolist(), logprobs[:-1]))


def distribution(row_V: Floats, params: SamplingParams, history: History | None) -> tuple[Ids, Floats]:
    """The ids that may be drawn, in increasing order, and their probabilities. Greedy leaves one id."""
    row_V = _changed(row_V, params, history)
    if params.temperature < GREEDY_BELOW:
        return np.array([np.argmax(row_V)], dtype=np.int64), np.ones(1)
    ids_N, weights_N = _weights(row_V, params)
    if ids_N is None:
        ids_N = np.arange(len(row_V), dtype=np.int64)
    return ids_N, weights_N / weights_N.sum()


def log_softmax(row_V: Floats) -> npt.NDArray[np.float32]:
    """Log-probabilities of a row of logits, rounded to float32."""
    return _log_softmax_at(row_V, slice(None))


def uniform(seed: int, sequence: int, position: int) -> float:
    """The random number in [0, 1) of one draw: a hash of its three arguments, and of nothing else."""
    key = struct.pack("<qqq", seed, sequence, position)
    digest = hashlib.blake2b(key, digest_size=8, person=b"mixtral-draw").digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _log_softmax_at(row_V: Floats, ids: Ids | slice) -> npt.NDArray[np.float32]:
    shifted_V = row_V - row_V.max()
    logprobs: npt.NDArray[np.float32] = (shifted_V[ids] - np.log(np.exp(shifted_V).sum())).astype(np.float32)
    return logprobs


def _allowed(size: int, mask: Mask | None, banned: Iterable[int]) -> Ids | None:
    """The ids that may be chosen, in increasing order; None for all."""
    out = [id for id in banned if 0 <= id < size]
    if mask is None and not out:
        return None
    if mask is None:
        bits_V = np.ones(size, dtype=np.uint8)
    else:
        bits_V = np.unpackbits(mask.view(np.uint8), bitorder="little")[:size]
    bits_V[out] = 0
    allowed_N = np.flatnonzero(bits_V)
    if not len(allowed_N):
        raise NoTokenError("mask and banned ids leave no token")
    return allowed_N


def _changed(logits_V: npt.NDArray[np.floating], params: SamplingParams, history: History | None) -> Floats:
    """A copy of the row after penalties and bias."""
    row_V: Floats = logits_V.astype(np.float64)
    if needs_history(params):
        if history is None:
            raise ValueError("penalties need a history")
        ids, counts = history.ids, history.counts
        values = row_V[ids]
        if (factor := params.repetition_penalty) != 1.0:
            values = np.where(values < 0, values * factor, values / factor)
        if params.presence_penalty != 0.0:
            values = values - params.presence_penalty * (counts > 0)
        if params.frequency_penalty != 0.0:
            values = values - params.frequency_penalty * counts
        row_V[ids] = values
    for id, bias in params.logit_bias.items():
        row_V[id] += bias
    return row_V


def _pick(row_V: Floats, params: SamplingParams, seed: int, sequence: int, position: int) -> int:
    if params.temperature < GREEDY_BELOW:
        return int(row_V.argmax())
    ids_N, weights_N = _weights(row_V, params)
    place = 0 if len(weights_N) == 1 else _draw(weights_N, uniform(seed, sequence, position))
    return place if ids_N is None else int(ids_N[place])


def _weights(row_V: Floats, params: SamplingParams) -> tuple[Ids | None, Floats]:
    """The ids that may be drawn (None: all), in increasing order, and numbers that are as their probabilities."""
    row_V = row_V / params.temperature
    ids_N: Ids | None = None
    if 0 < params.top_k < len(row_V):
        ids_N = np.sort(_largest(row_V, params.top_k))
        row_V = row_V[ids_N]
    weights_N: Floats = np.exp(row_V - row_V.max())
    if params.top_p < 1.0:
        kept = _nucleus(weights_N, params.top_p)
        ids_N, weights_N = kept if ids_N is None else ids_N[kept], weights_N[kept]
    if params.min_p > 0.0:
        probs_N = weights_N / weights_N.sum()
        kept = np.flatnonzero(probs_N >= params.min_p * probs_N.max())
        ids_N, weights_N = kept if ids_N is None else ids_N[kept], weights_N[kept]
    return ids_N, weights_N


def _nucleus(weights_N: Floats, top_p: float) -> Ids:
    """The fewest of the most likely places that together reach ``top_p``, in increasing order; at least one."""
    total, count = weights_N.sum(), 64
    while True:
        likely = _candidates(weights_N, count)
        probs = weights_N[likely] / total
        order = np.argsort(-probs, kind="stable")
        reached = np.cumsum(probs[order])
        if reached[-1] >= top_p or len(likely) == len(weights_N):
            keep = int(np.searchsorted(reached, top_p, side="left")) + 1  # up to the one that reaches top_p
            return np.sort(likely[order[:keep]])
        count *= 16


def _largest(row_V: Floats, count: int) -> Ids:
    """The ids of the ``count`` largest values, largest first; equal values: lowest id first."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    ids_N = _candidates(row_V, count)
    return ids_N[np.argsort(-row_V[ids_N], kind="stable")][:count]


def _candidates(row_V: Floats, count: int) -> Ids:
    """All places, in increasing order, whose values reach a bound that at least ``count`` values reach."""
    size = len(row_V)
    if count >= size:
        return np.arange(size, dtype=np.int64)
    if count <= _GROUPS <= size // 8:
        # As many groups have their largest value at or above the bound as we need values.
        row = row_V[: size // _GROUPS * _GROUPS].reshape(-1, _GROUPS).max(0)
    else:
        row = row_V
    bound = np.partition(row, len(row) - count)[len(row) - count]
    return np.flatnonzero(row_V >= bound)


def _draw(weights_N: Floats, number: float) -> int:
    """The place at which the running sum passes ``number`` times the whole; never one that weighs nothing."""
    whole = len(weights_N) // _BLOCK * _BLOCK
    sums = np.append(weights_N[:whole].reshape(-1, _BLOCK).sum(1), weights_N[whole:].sum())
    reached = np.cumsum(sums)
    target = number * reached[-1]
    block = int(np.searchsorted(reached, target, side="right"))
    if block < len(sums):
        start = block * _BLOCK
        before = float(reached[block - 1]) if block else 0.0
        inside = np.cumsum(weights_N[start : start + _BLOCK])
        place = int(np.searchsorted(inside, target - before, side="right"))
        if place < len(inside):
            return start + place
        # Rounding put the number behind the block: its last place that weighs something.
        return start + int(np.flatnonzero(weights_N[start : start + _BLOCK])[-1])
    return int(np.flatnonzero(weights_N)[-1])
