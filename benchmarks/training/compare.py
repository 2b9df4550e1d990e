"""Training beside transformers, PEFT and TRL: the same data and starting weights, in turns, each in its own process.

    python benchmarks/training/compare.py pretrain                     # tiny, vocabulary 4,096, rows of 512
    python benchmarks/training/compare.py pretrain --workload documents   # the town desk's, which the peer must pad
    python benchmarks/training/compare.py pretrain --model mid         # 215 M parameters, vocabulary 32,768
    python benchmarks/training/compare.py sft                          # the embedded model's sizes, conversations
    python benchmarks/training/compare.py lora                         # a layer of 8x7B, attention and experts
    python benchmarks/training/compare.py qlora                        # the same, over int4 and over bf16
    python benchmarks/training/compare.py dpo

Prints tokens/s (padding not counted; medians of turns), the loss at step 20, which must agree, and the peak memory of
the process. TRL, PEFT, transformers and datasets must be installed (``pip install trl peft``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from contest import compete, matmul_gflops, table

from mixtral.bench.machine import machine

CONTENDERS = {
    "pretrain": ["ours", "transformers"],
    "sft": ["ours", "transformers", "trl", "trl-tuned"],
    "lora": ["ours", "peft"],
    "qlora": ["ours-int4", "ours-bf16"],
    "dpo": ["ours", "trl", "trl-tuned"],
}


def main() -> int:
    """Prepare, let them compete, print."""
    given = _arguments()
    names = given.contenders.split(",") if given.contenders else CONTENDERS[given.contest]
    with tempfile.TemporaryDirectory() as name:
        settings = _settings(given, Path(name))
        limits = [matmul_gflops(given.threads)]
        found = compete(names, settings, turns=given.turns, steps=given.steps)
        limits.append(matmul_gflops(given.threads))
    print(table(found, names[0]))
    print(f"a bfloat16 product of 2048 x 2048 x 2048 before and after: {limits[0]:,.0f} and {limits[1]:,.0f} GFLOP/s")
    if given.json:
        kept = {"settings": {k: v for k, v in settings.items() if k not in ("base", "data", "adapter", "quantised")}}
        given.json.write_text(
            json.dumps({**kept, "machine": machine(), "matmul_gflops": limits, "found": found}, indent=1) + "\n"
        )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", choices=list(CONTENDERS))
    parser.add_argument("--contenders", help="names with commas, ours first; default: those of the contest")
    parser.add_argument("--model", choices=["tiny", "mid"], default="tiny", help="of pretrain")
    parser.add_argument("--workload", choices=["rows", "documents"], default="rows", help="of pretrain")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _settings(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all contenders of a contest are told; files are made where they need some."""
    shared = {
        "contest": given.contest,
        "threads": given.threads,
        "all_steps": (given.turns + 1) * given.steps,
        "seed": 1,
        "rank": 0,
        "rate": 1e-3,
    }
    if given.contest == "pretrain":
        large = given.model == "mid"
        count = 8 if large else 28 if given.workload == "rows" else 128
        sizes = {"vocabulary": 32768 if large else 4096, "documents": count, "length": 512}
        return {**shared, "model": given.model, "workload": given.workload, **sizes}
    from workloads import write_pairs, write_talks, write_texts

    data = folder / "data.jsonl"
    if given.contest in ("lora", "qlora"):
        write_texts(data, 64, 512)
        more = {"documents": 1, "length": 512, "rank": 16, "rate": 1e-4}
        return {**shared, "data": str(data), **more, **_layer(folder, quantised=given.contest == "qlora")}
    if given.contest == "dpo":
        write_pairs(data, 256)
    else:
        write_talks(data, 512)
    return {**shared, "data": str(data), "documents": 8 if given.contest == "dpo" else 16, "length": 1024} | {
        "rate": 1e-4 if given.contest == "dpo" else 3e-4,
        "base": str(_embedded(folder)),
    }


def _embedded(folder: Path) -> Path:
    """The embedded model as an ordinary bfloat16 checkpoint."""
    from mixtral import load

    load("embedded", dtype="bfloat16", decode=True).save(folder / "base")
    return folder / "base"


def _layer(folder: Path, *, quantised: bool) -> dict[str, str]:
    """A layer of 8x7B, an adapter with its starting values, and the layer in int4."""
    import torch

    from mixtral import load
    from mixtral.adapters import LoraConfig, attach
    from mixtral.adapters.peft import write_adapter
    from mixtral.cli import main as mixtral

    base, adapter, packed = folder / "base", folder / "adapter", folder / "int4"
    _must(mixtral(["init", str(base), "--preset", "8x7b", "--layers", "1", "--format", "bf16"]))
    if quantised:
        _must(mixtral(["quantize", str(base), str(packed), "--format", "int4_g128"]))
        return {"base": str(base), "quantised": str(packed)}
    model = load(base, reference=True, dtype="bfloat16").generator.model
    torch.manual_seed(0)
    made = attach(model, LoraConfig(rank=16, alpha=32.0, targets=("q", "k", "v", "o", "gate_up", "down")))
    write_adapter(adapter, model.config, made.factors(), base="base")
    return {"base": str(base), "adapter": str(adapter)}


def _must(code: int) -> None:
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
