"""Contenders in turns: each is a process of its own, so that memory is its own too; one trains at a time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

__all__ = ["Contender", "compete", "matmul_gflops", "table"]

PARITY_STEP = 20


class Contender:
    """A process that runs ``worker.py`` with these arguments. A context manager."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        self.name = name
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps({"who": name, **arguments})]
        threads = str(arguments["threads"])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def train(self, steps: int) -> dict[str, Any]:
        """Train some steps; what the gate says of them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: exit code {self._process.wait()}; its output is above")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass
class _Found:
    speeds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0


def compete(names: Sequence[str], arguments: Mapping[str, Any], *, turns: int, steps: int) -> dict[str, dict[str, Any]]:
    """Let contenders train in turns, ``steps`` each, the same of the same data; the first turn warms up.

    Of each: tokens/s of the turns and their median, the losses of all steps, the loss at step 20, peak memory.
    """
    found = {name: _Found() for name in names}
    with ExitStack() as stack:
        open_ones = [stack.enter_context(Contender(name, arguments)) for name in names]
        for turn in range(turns + 1):
            for each in open_ones:
                told = each.train(steps)
                one = found[each.name]
                if turn:
                    one.speeds.append(told["tokens"] / told["seconds"])
                one.losses += told["losses"]
                one.peak = told["peak"]
                speed = told["tokens"] / told["seconds"]
                sys.stderr.write(f"turn {turn} {each.name:14s} {speed:8.0f} tok/s  loss {told['losses'][-1]:.4f}\n")
    return {
        name: {
            "tokens_per_second": statistics.median(one.speeds),
            "turns": one.speeds,
            "losses": one.losses,
            "loss_at_20": one.losses[PARITY_STEP - 1] if len(one.losses) >= PARITY_STEP else None,
            "peak_bytes": one.peak,
        }
        for name, one in found.items()
    }


def matmul_gflops(threads: int, size: int = 2048, times: int = 5) -> float:
    """What a product of two square bfloat16 matrices reaches here, in GFLOP/s: the best of some."""
    torch.set_num_threads(threads)
    a, b = (torch.randn((size, size), dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9


def table(found: Mapping[str, Mapping[str, Any]], ours: str) -> str:
    """The results as a Markdown table; ratios are ours to theirs."""
    mine = found[ours]
    lines = [
        "| | tokens/s | ours to this | loss at step 20 | peak memory, GB | ours to this |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, one in found.items():
        loss = "" if one["loss_at_20"] is None else f"{one['loss_at_20']:.4f}"
        faster = mine["tokens_per_second"] / one["tokens_per_second"]
        larger = mine["peak_bytes"] / one["peak_bytes"]
        ratios = ("", "") if name == ours else (f"{faster:.2f}x", f"{larger:.2f}x")
        cells = (f"{one['tokens_per_second']:,.0f}", ratios[0], loss, f"{one['peak_bytes'] / 1e9:.2f}", ratios[1])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
