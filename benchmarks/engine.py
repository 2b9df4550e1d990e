"""Tokens per second of the embedded model through the whole engine, by number of streams and way of choosing.

Each stream has a prompt of its own; drafts and the prefix cache are off. The share that is not the model is measured by
timing the model's calls inside the same steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import mixtral
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.model import Batch, Mixtral, Output
from mixtral.ops.native import level
from mixtral.wire import SamplingParams, Submit

WAYS = {
    "greedy": SamplingParams(temperature=0.0, seed=1, stop_ids=(), max_tokens=2048),
    "temperature 1": SamplingParams(temperature=1.0, seed=1, stop_ids=(), max_tokens=2048),
    "temperature 0.7, top_p 0.9": SamplingParams(temperature=0.7, top_p=0.9, seed=1, stop_ids=(), max_tokens=2048),
    "top_k 40, top_p 0.95, repetition": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=1, stop_ids=(), max_tokens=2048
    ),
}


class Timed:
    """A model's calls, with the time that they take."""

    def __init__(self, model: Mixtral) -> None:
        self.seconds = 0.0
        self._forward, self._logits = model.forward, model.logits
        model.forward, model.logits = self.forward, self.logits  # type: ignore[method-assign]

    def forward(self, batch: Batch) -> Output:
        """As in the model."""
        begun = time.perf_counter()
        found = self._forward(batch)
        self.seconds += time.perf_counter() - begun
        return found

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """As in the model."""
        begun = time.perf_counter()
        found = self._logits(hidden_TD)
        self.seconds += time.perf_counter() - begun
        return found


def measure(model: Mixtral, timed: Timed, streams: int, params: SamplingParams, seconds: float) -> tuple[float, float]:
    """Tokens per second, and the share of the time that is not the model's."""
    engine = Engine(model, EngineConfig(prefix_cache=False, speculation=False))
    for number in range(streams):
        prompt = [1, *(500 + (7 * number + 13 * place) % 3000 for place in range(60))]
        engine.submit(Submit(request=f"{number}", prompts=[prompt], params=params))
    for _ in range(streams + 10):
        engine.step()
    before, timed.seconds = engine.stats().output_tokens, 0.0
    begun = time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        engine.step()
    return (engine.stats().output_tokens - before) / spent, 1.0 - timed.seconds / spent


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--decode", action="store_true", help="the weights decoded to float32")
    parser.add_argument("--model", default="embedded")
    given = parser.parse_args()
    model = mixtral.load(given.model, decode=given.decode).generator.model
    timed = Timed(model)
    print(f"kernels {level()}, {torch.get_num_threads()} threads; median of {given.turns} turns of {given.seconds} s")
    print("| streams | choice | tokens/s | not the model |\n|---|---|---|---|")
    for streams in given.streams:
        for name, params in WAYS.items():
            found = [measure(model, timed, streams, params, given.seconds) for _ in range(given.turns)]
            speed, share = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"| {streams} | {name} | {speed:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
