"""Loading time and peak memory of a random model, beside safetensors reading the same bytes.

Run: python benchmarks/load.py [--gigabytes 1.0] [--layout per-expert|fused] [--rounds 5] [--folder DIR]
     python benchmarks/load.py --quantised FILE.gguf [--rounds 5] [--untouched]

Every measurement is a child process of its own: seconds from the folder to parameters in memory (imports excluded), and
the highest resident memory of the process (imports included). The rows are measured in turn; the table shows medians.

    mixtral                load_model: headers checked, experts stacked, every byte copied into parameters
    safetensors, copied    load_file of every shard, then clone of every tensor: the same bytes read into memory
    safetensors, pread     load_file with the backend that reads instead of mapping
    safetensors, mapped    load_file, then one pass over all values; nothing is copied, the file stays mapped

The files are in the page cache (they were just written), so this is the cost of copying, not of a disk.

With ``--quantised FILE.gguf``, such as ``mixtral init FILE.gguf --preset 8x7b --layers 4 --format q4_k_m`` makes:

    read only              the file into one buffer of 8 MB
    read into memory       the file into new memory in large pages, on one thread
    mixtral                load_model: packed into panels
    mixtral, packed cache  load_model: panels mapped from a cache file, which is written before, unmeasured

each from the page cache and, where ``/proc/sys/vm/drop_caches`` may be written to, from the disk. On a virtual machine
memory that nobody uses may belong to the host; to get it back takes longer than anything here. So as much memory as a
load needs is used and given back right before each measurement, unless ``--untouched``.
"""

from __future__ import annotations

import argparse
import mmap
import os
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
from mixtral.ops.memory import empty
from mixtral.ops.native import module
from mixtral.weights import load_model, save_model

__all__ = ["main"]

READERS = ("mixtral", "safetensors, copied", "safetensors, pread", "safetensors, mapped")
QUANTISED = ("read only", "read into memory", "mixtral", "mixtral, packed cache")
CACHES = Path("/proc/sys/vm/drop_caches")
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


def measure_quantised(reader: str, path: Path, cache: Path | None, *, untouched: bool) -> tuple[float, int]:
    """The same, of one GGUF file; ``cache`` is the folder of packed weights, for the last of the readers."""
    module()  # what is measured is not the import
    if not untouched:
        touch(path.stat().st_size * 5 // 2)
    start = time.monotonic()
    if reader.startswith("mixtral"):
        kept: object = load_model(path, device="cpu", packed_cache=cache)
    else:
        memory = empty((path.stat().st_size if reader == "read into memory" else 8 << 20,), torch.uint8)
        view, done = memory.numpy().data, 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(view[done:]):
                done += count if reader == "read into memory" else 0
        kept = memory
    seconds = time.monotonic() - start
    del kept
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_child(reader: str, path: Path, *more: str) -> tuple[float, int]:
    """One measurement in a child process."""
    option = "--folder" if path.is_dir() else "--quantised"
    command = [sys.executable, __file__, option, str(path), "--child", reader, *more]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(peak)


def report_quantised(path: Path, rounds: int, *, untouched: bool) -> None:
    """Measure every reader in turn, cold and warm, and print medians and the budgets."""
    size = path.stat().st_size
    results: dict[tuple[str, bool], list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        first, _ = in_child("mixtral, packed cache", path, "--cache", name)
        print(f"{size / 1e9:.3f} GB, median (lowest to highest) of {rounds}, {torch.get_num_threads()} threads")
        print(f"writing the packed cache, load included: {first:.1f} s")
        for _ in range(rounds):
            for cold in (True, False):
                if not cold:
                    in_child("read only", path)
                for reader in QUANTISED:
                    if cold and not dropped():
                        continue
                    more: tuple[str, ...] = ("--cache", name) if reader == QUANTISED[-1] else ()
                    more += ("--untouched",) if untouched else ()
                    results.setdefault((reader, cold), []).append(in_child(reader, path, *more))
    print(f"{'':24}{'from':8}{'seconds':>24}{'of reading':>12}{'peak MB':>9}")
    for (reader, cold), rows in results.items():
        times = [seconds for seconds, _ in rows]
        baseline = results["read only" if cold else "read into memory", cold]
        median, ratio = statistics.median(times), statistics.median(times) / statistics.median(s for s, _ in baseline)
        told = f"{median:.2f} ({min(times):.2f} to {max(times):.2f})"
        peak = statistics.median(peak for _, peak in rows)
        print(f"{reader:24}{'disk' if cold else 'memory':8}{told:>24}{ratio:12.2f}{peak / 1e6:9.0f}")
    print(
        f"budgets: 1.5 x reading (from the disk: only; from memory: into memory), {(1.05 * size + 500e6) / 1e6:.0f} MB"
    )


def dropped() -> bool:
    """Whether the system could be told to forget what files hold."""
    os.sync()
    try:
        CACHES.write_text("3")
    except OSError:
        return False
    return True


def touch(size: int) -> None:
    """Use so much memory for a moment, or most of what is free, in a process of its own."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    child = os.fork()
    if child == 0:
        memory = mmap.mmap(-1, min(size, free * 9 // 10))
        memory.madvise(mmap.MADV_HUGEPAGE)
        for place in range(0, len(memory), mmap.PAGESIZE):
            memory[place] = 1
        os._exit(0)
    os.waitpid(child, 0)


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
    parser.add_argument("--quantised", type=Path, help="measure this GGUF file instead")
    parser.add_argument("--untouched", action="store_true", help="do not use memory before a measurement")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices={*READERS, *QUANTISED}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child and options.quantised:
        print(*measure_quantised(options.child, options.quantised, options.cache, untouched=options.untouched))
    elif options.quantised:
        report_quantised(options.quantised, options.rounds, untouched=options.untouched)
    elif options.child:
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
