"""Loading time and peak memory of a random model, beside safetensors reading the same bytes.

Run: python benchmarks/load.py [--gigabytes 1.0] [--layout per-expert|fused] [--rounds 5] [--folder DIR]

Every measurement is a child process of its own: seconds from the folder to parameters in memory (imports excluded), and
the highest resident memory of the process (imports included). The rows are measured in turn; the table shows medians.

    mixtral                load_model: headers checked, experts stacked, every byte copied into parameters
    safetensors, copied    load_file of every shard, then clone of every tensor: the same bytes read into memory
    safetensors, pread     load_file with the backend that reads instead of mapping
    safetensors, mapped    load_file, then one pass over all values; nothing is copied, the file stays mapped

The files are in the page cache (they were just written), so this is the cost of copying, not of a disk.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from mixtral.config import MixtralConfig
from mixtral.model.mixtral import Mixtral
from mixtral.weights import load_model, save_model

__all__ = ["main"]

READERS = ("mixtral", "safetensors, copied", "safetensors, pread", "safetensors, mapped")
ALLOWED_TIME = 1.3
ALLOWED_MEMORY = 1.1
ALLOWED_EXTRA_BYTES = 300e6


def make(folder: Path, gigabytes: float, layout: str) -> None:
    """Write a random bf16 model of about this size; layers of 0.1 GB, shards of 0.5 GB."""
    config = MixtralConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=max(1, round(gigabytes * 1e9 / 107e6)),
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
    model = Mixtral(config, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for value in model.parameters():
            value.uniform_(-0.1, 0.1)
    save_model(model, folder, layout="fused" if layout == "fused" else "per-expert", shard_size_bytes=500_000_000)


def measure(reader: str, folder: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of one load in this process."""
    shards = sorted(folder.glob("*.safetensors"))
    start = time.monotonic()
    if reader == "mixtral":
        kept: object = load_model(folder, device="cpu")
    elif reader == "safetensors, copied":
        kept = [value.clone() for shard in shards for value in load_file(shard).values()]
    elif reader == "safetensors, pread":
        kept = [value for shard in shards for value in load_file(shard, backend="pread").values()]
    else:
        kept = [value for shard in shards for value in load_file(shard).values()]
        sum(int(value.view(torch.int16).sum()) for value in kept if value.dtype == torch.bfloat16)
    seconds = time.monotonic() - start
    del kept
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_child(reader: str, folder: Path) -> tuple[float, int]:
    """The same, in a child process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--child", reader]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(peak)


def report(folder: Path, rounds: int) -> None:
    """Measure every reader in turn, and print medians and the two budgets."""
    results: dict[str, list[tuple[float, int]]] = {reader: [] for reader in READERS}
    for _ in range(rounds):
        for reader in READERS:
            results[reader].append(in_child(reader, folder))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{size / 1e9:.3f} GB, median of {rounds}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'reader':24}{'seconds':>9}{'GB/s':>8}{'peak MB':>9}{'peak / model':>14}")
    seconds = {reader: statistics.median(time for time, _ in rows) for reader, rows in results.items()}
    peaks = {reader: statistics.median(peak for _, peak in rows) for reader, rows in results.items()}
    for reader in READERS:
        speed = size / seconds[reader] / 1e9
        print(f"{reader:24}{seconds[reader]:9.3f}{speed:8.2f}{peaks[reader] / 1e6:9.0f}{peaks[reader] / size:14.2f}")
    ratio = seconds["mixtral"] / seconds["safetensors, copied"]
    allowed = ALLOWED_MEMORY * size + ALLOWED_EXTRA_BYTES
    print(f"time: {ratio:.2f} x safetensors, copied (budget {ALLOWED_TIME})")
    print(f"memory: {peaks['mixtral'] / 1e6:.0f} MB of {allowed / 1e6:.0f} MB (1.1 x model + 300 MB, imports included)")


def main() -> None:
    """Parse the options, make a model unless one is given, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--layout", choices=("per-expert", "fused"), default="per-expert")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="measure this checkpoint instead of a random one")
    parser.add_argument("--child", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(*measure(options.child, options.folder))
    elif options.folder:
        report(options.folder, options.rounds)
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            make(folder, options.gigabytes, options.layout)
            report(folder, options.rounds)


if __name__ == "__main__":
    main()
