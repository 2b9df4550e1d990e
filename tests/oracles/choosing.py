"""Choosing a token by the plainest way: every step over the whole vocabulary, in float64, in the documented order."""

from __future__ import annotations

import numpy as np

from mixtral.engine.sampling import uniform
from mixtral.wire import SamplingParams


def kept(
    row: np.ndarray, params: SamplingParams, seen: list[int], output: list[int], allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be drawn, in increasing order, and their probabilities. ``seen`` is the prompt."""
    row = row.astype(np.float64)
    seen_V, counts_V = np.zeros(len(row), dtype=bool), np.zeros(len(row), dtype=np.int64)
    seen_V[[*seen, *output]] = True
    np.add.at(counts_V, np.array(output, dtype=np.int64), 1)
    if params.repetition_penalty != 1.0:
        factor = params.repetition_penalty
        row = np.where(seen_V, np.where(row < 0, row * factor, row / factor), row)
    row = row - params.presence_penalty * (counts_V > 0) - params.frequency_penalty * counts_V
    for id, bias in params.logit_bias.items():
        row[id] += bias
    ids = np.arange(len(row)) if allowed is None else np.flatnonzero(allowed)
    if params.temperature < 1e-3:
        return ids[[row[ids].argmax()]], np.ones(1)
    row = row / params.temperature
    if 0 < params.top_k < len(ids):
        ids = np.sort(ids[np.argsort(-row[ids], kind="stable")][: params.top_k])
    if params.top_p < 1.0:
        probs = softmax(row[ids])
        order = np.argsort(-probs, kind="stable")
        count = int(np.searchsorted(np.cumsum(probs[order]), params.top_p, side="left")) + 1
        ids = np.sort(ids[order[:count]])
    if params.min_p > 0.0:
        probs = softmax(row[ids])
        ids = ids[probs >= params.min_p * probs.max()]
    return ids, softmax(row[ids])


def choose(
    row: np.ndarray,
    params: SamplingParams,
    seen: list[int],
    output: list[int],
    *,
    seed: int,
    sequence: int,
    position: int,
    allowed: np.ndarray | None = None,
) -> int:
    """The id: the inverse of the cumulative distribution at the number of this draw."""
    ids, probs = kept(row, params, seen, output, allowed)
    if len(ids) == 1:
        return int(ids[0])
    reached = np.cumsum(probs)
    place = int(np.searchsorted(reached, uniform(seed, sequence, position) * reached[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])


def log_softmax(row: np.ndarray) -> np.ndarray:
    """Log-probabilities, rounded to float32."""
    shifted = row.astype(np.float64) - row.astype(np.float64).max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def softmax(row: np.ndarray) -> np.ndarray:
    """Probabilities."""
    weights = np.exp(row - row.max())
    return weights / weights.sum()
