"""Our side of a comparison: a process that loads the model by ``mixtral.load`` and generates, as a program would.

What is timed contains sampling and text: the time to the first token of a prompt, or between the tokens after it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from mixtral.api import LLM, Delta, load
from mixtral.bench.peers import serve
from mixtral.engine.config import EngineConfig

__all__ = ["Ours", "main"]


class Ours:
    """``mixtral`` with its defaults, but without prefix cache and drafts. Answers also say which tokens were read in
    each step (``fed``), and how many experts of each layer a step, or the whole prompt, was sent to (``experts``)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        loaded = load(settings["model"], threads=settings["threads"], packed_cache=settings.get("packed_cache"))
        # Neither shortcut has a counterpart on the other side: every token is computed, and one in each step.
        config = EngineConfig(prefix_cache=False, speculation=False)
        tokenizer = loaded.tokenizer if loaded.has_tokenizer else None
        self.llm = LLM(loaded.generator.model, tokenizer, name=loaded.name, engine=config)
        self._work: dict[str, Any] = {}
        self._deltas: Iterator[Delta] | None = None
        self._come: list[deque[int]] = []  # tokens of each sequence that came before the others had theirs
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
        """Read prompts up to the first token of each answer, which may then have ``tokens`` in all.

        A sequence whose prompt is read begins its answer while the others are read. So it gets as many tokens more: to
        the end all sequences are in every step.
        """
        self._deltas = None  # which ends what was generated before
        sizes = self.llm.generator.engine.config
        ahead = sum(map(len, prompts)) // max(1, sizes.max_num_batched_tokens - len(prompts)) if len(prompts) > 1 else 0
        most = min(tokens + ahead, self.llm.context - max(map(len, prompts)))
        self._deltas = self.llm.generate(prompts, stream=True, max_tokens=most, temperature=0, stop_ids=())
        self._come = [deque() for _ in prompts]
        self._row = self._next()

    def _next(self) -> list[int]:
        """The next token of every sequence, in order."""
        if self._deltas is None:
            raise RuntimeError("nothing was prepared")
        while not all(self._come):
            delta = next(self._deltas)
            self._come[delta.sequence].extend(delta.ids)
        return [come.popleft() for come in self._come]


def _distinct(picks: Tensor) -> int:
    return len(set(picks.flatten().tolist()))


def main() -> None:
    """Serve until the input ends."""
    serve(Ours)


if __name__ == "__main__":
    main()
