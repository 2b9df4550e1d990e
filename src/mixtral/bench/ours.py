"""Our side of a comparison: a process that loads the model by ``mixtral.load`` and generates, as a program would.

What is timed contains sampling and text: the time to the first token of a prompt, or between the tokens after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from mixtral.api import LLM, Delta, load
from mixtral.bench.peers import serve

__all__ = ["Ours", "main"]


class Ours:
    """``mixtral`` with its defaults. Answers also say which tokens were read in each step (``fed``), and how many
    experts of each layer a step, or the whole prompt, was sent to (``experts``)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.llm: LLM = load(settings["model"], threads=settings["threads"], packed_cache=settings.get("packed_cache"))
        self._work: dict[str, Any] = {}
        self._deltas: Iterator[Delta] | None = None
        self._row: list[int] = []  # the tokens to be read next
        self._picks: list[list[Tensor]] = []  # of each forward pass and layer
        # Only kept in passing: counted when nothing is timed.
        self.llm.generator.model.register_forward_hook(
            lambda module, given, found: self._picks.append([route.picks_TA for route in found.routes])
        )

    def versions(self) -> dict[str, str]:
        """Of this package and torch."""
        from mixtral import __version__
        from mixtral.ops.native import level

        return {"mixtral": __version__, "torch": version("torch"), "kernels": level()}

    def prepare(self, work: dict[str, Any], prompts: list[list[int]]) -> None:
        """Read the prompt of a "context" and stay there."""
        self._work = work
        if work["kind"] == "context":
            self._begin(prompts, work["cells"] - work["prompt"])

    def run(self, prompts: list[list[int]], fed: list[list[int]]) -> dict[str, Any]:
        """As in ``peers.Side``; ``fed`` is not used: what it tells the others is decided here."""
        steps = self._work["steps"]
        if not steps:
            self._picks.clear()
            started = time.perf_counter()
            self._begin(prompts, 1)
            seconds = time.perf_counter() - started
            layers = zip(*self._picks, strict=True)
            experts = [float(_distinct(torch.cat([ids.flatten() for ids in passes]))) for passes in layers]
            return {"seconds": [seconds], "fed": [], "experts": experts}
        if self._work["kind"] != "context":
            self._begin(prompts, steps + 1)
        self._picks.clear()
        times, rows = [], []
        for _ in range(steps):
            rows.append(self._row)
            started = time.perf_counter()
            self._row = self._next()
            times.append(time.perf_counter() - started)
        counts = [[_distinct(picks) for picks in passes] for passes in self._picks]
        experts = [sum(layer) / steps for layer in zip(*counts, strict=True)]
        return {"seconds": times, "fed": rows, "experts": experts}

    def _begin(self, prompts: list[list[int]], tokens: int) -> None:
        """Read prompts up to the first token of each answer, which may then have ``tokens`` in all."""
        self._deltas = self.llm.generate(prompts, stream=True, max_tokens=tokens, temperature=0, stop_ids=())
        self._row = self._next()

    def _next(self) -> list[int]:
        """The next token of every sequence, in order."""
        if self._deltas is None:
            raise RuntimeError("nothing was prepared")
        found = [next(self._deltas) for _ in range(self._work["sequences"])]
        return [delta.ids[0] for delta in sorted(found, key=lambda delta: delta.sequence)]


def _distinct(picks: Tensor) -> int:
    return len(set(picks.flatten().tolist()))


def main() -> None:
    """Serve until the input ends."""
    serve(Ours)


if __name__ == "__main__":
    main()
