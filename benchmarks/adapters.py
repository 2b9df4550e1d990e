"""Milliseconds of a step of a model with named adapters, by which of its requests have one; without drafts.

The adapters are new ones of random values: "attention" has pairs for q, k, v and o, "all" for the experts too. Turns
go through all rows, so that a machine that is busy for a while counts for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import mixtral
from mixtral.adapters import Factors, LoraConfig
from mixtral.adapters.factors import ATTENTION, EXPERTS, new_factors
from mixtral.adapters.peft import write_adapter
from mixtral.config import MixtralConfig
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.ops.native import level
from mixtral.wire import SamplingParams, Submit

TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, *EXPERTS), "other": (*ATTENTION, *EXPERTS)}
BASE, STEPS = "", 50


def rows(requests: int) -> dict[str, list[str]]:
    """Name of a row -> the adapter of each request."""
    half = requests // 2
    return {
        "no adapter": [BASE] * requests,
        "attention": ["attention"] * requests,
        "all": ["all"] * requests,
        **({"half without, half all": [BASE] * half + ["all"] * half} if half else {}),
        **({"half all, half other": ["all"] * half + ["other"] * half} if half else {}),
    }


def measure(llm: mixtral.LLM, adapters: Sequence[str]) -> float:
    """Milliseconds of a step."""
    engine = Engine(llm.generator.model, EngineConfig(speculation=False), adapters=llm.generator.engine.adapters)
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 16, ignore_eos=True)
    for number, adapter in enumerate(adapters):
        prompt = [1, *(500 + (7 * number + 13 * place) % 3000 for place in range(40))]
        engine.submit(Submit(request=f"{number}", prompts=[prompt], params=params, adapter=adapter or None))
    for _ in range(8):
        engine.step()
    begun = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    return (time.perf_counter() - begun) / STEPS * 1000


def factors(config: MixtralConfig, targets: tuple[str, ...], rank: int) -> dict[str, Factors]:
    """An adapter that changes something."""
    new = new_factors(config, LoraConfig(rank=rank, targets=targets), torch.float32)
    return {name: Factors(a, torch.randn(b.shape) * 0.05, scale) for name, (a, b, scale) in new.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    plain = mixtral.load(given.model)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in TARGETS}
        for name, path in paths.items():
            write_adapter(path, plain.config, factors(plain.config, TARGETS[name], given.rank))
        adapted = mixtral.load(given.model, adapters=paths)
    print(f"kernels {level()}, {torch.get_num_threads()} threads; rank {given.rank}; median of {given.turns} turns, ms")
    print("| requests | adapters | a step |\n|---|---|---|")
    for count in given.requests:
        ways = [("model without adapters", plain, [BASE] * count)]
        ways += [(name, adapted, some) for name, some in rows(count).items()]
        found: dict[str, list[float]] = {name: [] for name, _, _ in ways}
        for _ in range(given.turns):
            for name, llm, some in ways:
                found[name].append(measure(llm, some))
        for name, times in found.items():
            print(f"| {count} | {name} | {statistics.median(times):.1f} |", flush=True)


if __name__ == "__main__":
    main()
