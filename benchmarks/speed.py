"""Prefill and decode of a GGUF file beside llama.cpp: same file, same threads, in turns.

    python benchmarks/quantize.py --folder DIR                      # makes DIR/ours.q4_k_m.gguf, four 8x7B layers
    python benchmarks/speed.py DIR/ours.q4_k_m.gguf [--peer PYTHON] [--turns 5] [--work prefill-512 decode-1 decode-8]

PYTHON is an interpreter that has llama-cpp-python. Work is prefill-N (a prompt of N tokens) or decode-N (N sequences of
8 tokens, one token each per step). Each side runs in a process of its own that has loaded the model before; the sides
take turns, and medians of tokens per second are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 24

OURS = """
import json, sys, time
import mixtral
path, threads, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
llm = mixtral.load(path, threads=threads, **options)
ids = [(7 * i) % 30000 + 300 for i in range(1 << 16)]

def run(prompts, tokens):
    start = time.perf_counter()
    llm.generate(prompts, max_tokens=tokens, temperature=0, stop_ids=())
    return time.perf_counter() - start

for line in sys.stdin:
    kind, count, steps = json.loads(line)
    if kind == "prefill":
        seconds = run([ids[:count]], 1)
    else:
        prompts = [ids[100 * i : 100 * i + 8] for i in range(count)]
        seconds = run(prompts, steps + 1) - run(prompts, 1)
    print(json.dumps(seconds), flush=True)
"""

PEER = """
import json, os, sys, time
import llama_cpp as L
path, threads = sys.argv[1].encode(), int(sys.argv[2])
out = os.dup(1); os.dup2(2, 1)
L.llama_backend_init()
model = L.llama_model_load_from_file(path, L.llama_model_default_params())
params = L.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.kv_unified = 16384, 4096, 512, 64, True
params.n_threads = params.n_threads_batch = threads
context = L.llama_init_from_model(model, params)
memory = L.llama_get_memory(context)
ids = [(7 * i) % 30000 + 300 for i in range(1 << 16)]

def feed(tokens):  # (id, position, sequence, wants logits)
    batch = L.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence, wanted) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
    assert L.llama_decode(context, batch) == 0
    L.llama_synchronize(context)
    L.llama_batch_free(batch)

for line in sys.stdin:
    kind, count, steps = json.loads(line)
    L.llama_memory_clear(memory, True)
    if kind == "prefill":
        start = time.perf_counter()
        feed([(ids[i], i, 0, i == count - 1) for i in range(count)])
    else:
        feed([(ids[100 * s + i], i, s, i == 7) for s in range(count) for i in range(8)])
        start = time.perf_counter()
        for step in range(steps):
            feed([(ids[step], 8 + step, s, True) for s in range(count)])
    os.write(out, (json.dumps(time.perf_counter() - start) + "\\n").encode())
"""


class Side:
    """A process that has the model and answers with seconds."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def seconds(self, kind: str, count: int) -> float:
        """Do the work once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([kind, count, STEPS]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended: {self.process.args!r:.200}")
        return float(json.loads(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", help="an interpreter with llama-cpp-python")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--work", nargs="+", default=["prefill-512", "decode-1", "decode-8", "decode-32"])
    parser.add_argument("--options", default="{}", help="JSON: more arguments of mixtral.load")
    options = parser.parse_args()
    threads = str(len(os.sched_getaffinity(0)))
    sides = {"mixtral": Side([sys.executable, "-c", OURS, str(options.model), threads, options.options])}
    if options.peer:
        sides["llama.cpp"] = Side([options.peer, "-c", PEER, str(options.model), threads])
    print(f"{options.model.name}, {threads} threads, medians of {options.turns}, tokens/s", flush=True)
    for work in options.work:
        kind, _, count = work.partition("-")
        tokens = int(count) * (1 if kind == "prefill" else STEPS)
        found: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.turns + 1):
            for name, side in sides.items():
                seconds = side.seconds(kind, int(count))
                if turn:  # the first one warms up
                    found[name].append(tokens / seconds)
        print(told(work, {name: statistics.median(speeds) for name, speeds in found.items()}), flush=True)


def told(work: str, speeds: dict[str, Any]) -> str:
    """One line of the table."""
    line = f"{work:14}" + "".join(f"{name} {speed:8.2f}   " for name, speed in speeds.items())
    return line + (f"ratio {speeds['mixtral'] / speeds['llama.cpp']:.2f}" if len(speeds) > 1 else "")


if __name__ == "__main__":
    main()
