"""Time and memory of quantising full-width layers, beside llama.cpp's quantiser on the same file and threads.

    python benchmarks/quantize.py --folder DIR                  # 4 layers of 8x7B: 12.1 GB in float16, made once in DIR
    python benchmarks/quantize.py --folder DIR --layers 1 --peer PYTHON
    python benchmarks/quantize.py --folder DIR --preset 8x22b --layers 1 --format q4_k_m int4_g128
    python benchmarks/quantize.py --encoders         # the encoders alone, in memory, on one core

PYTHON is an interpreter that has llama-cpp-python. Every measurement is a process of its own: seconds from start to the
file on the disk, imports included, and the highest resident memory. Mapped files count as memory in the peer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mixtral.bench.random_model import create_model
from mixtral.config import preset
from mixtral.quant import native
from mixtral.quant.rtn import INT_FORMS
from mixtral.tokenizer import gguf_vocabulary

PEER = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = int(sys.argv[4]), getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3].upper())
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def make(path: Path, name: str, layers: int) -> None:
    """A float16 file of the width of a preset with random weights."""
    config = preset(name).replace(num_hidden_layers=layers)
    create_model(config, path, form="f16", name=path.stem, vocabulary=gguf_vocabulary)


def measure(name: str, command: list[str], target: Path, gigabytes: float) -> None:
    """Run a command; print its seconds, the speed by the size of its input, and its highest resident memory."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, peak = time.perf_counter() - started, usage.ru_maxrss * 1024
    if status:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    size = target.stat().st_size / 1e9 if target.is_file() else sum(f.stat().st_size for f in target.iterdir()) / 1e9
    print(
        f"{name:24} {seconds:8.1f} s {gigabytes / seconds:6.3f} GB/s read, {size:6.2f} GB written, "
        f"peak {peak / 1e6:7.0f} MB",
        flush=True,
    )


def measure_encoders() -> None:
    """Millions of values per second on one thread, by format and instruction set: medians of 7."""
    values = np.random.default_rng(0).standard_normal((1024, 4096)).astype(np.float32)
    encoders: dict[str, Callable[..., object]] = {
        name: partial(native.encode, values, name, threads=1) for name in native.ENCODERS
    }
    for name, form in INT_FORMS.items():
        if form.bits != 8:
            encoders[name] = partial(native.encode_groups, values, form.bits, form.group, threads=1)
    print(f"{'':10}" + "".join(f"{level:>10}" for level in native.levels()))
    for name, encode in encoders.items():
        speeds = []
        for level in native.levels():
            seconds = []
            for _ in range(7):
                started = time.perf_counter()
                encode(level=level)
                seconds.append(time.perf_counter() - started)
            speeds.append(values.size / statistics.median(seconds) / 1e6)
        print(f"{name:10}" + "".join(f"{speed:10.0f}" for speed in speeds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--encoders", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--preset", default="8x7b")
    parser.add_argument("--format", nargs="+", default=["q4_k_m"])
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--peer", help="an interpreter with llama-cpp-python")
    options = parser.parse_args()
    if options.encoders:
        measure_encoders()
        return
    if options.folder is None:
        parser.error("--folder or --encoders is needed")
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / f"random-{options.preset}-{options.layers}.f16.gguf"
    if not source.exists():
        make(source, options.preset, options.layers)
    gigabytes, threads = source.stat().st_size / 1e9, len(os.sched_getaffinity(0))
    print(f"{source.name}: {gigabytes:.2f} GB, {threads} threads", flush=True)
    mixtral = [sys.executable, "-m", "mixtral"]
    for form in options.format:
        ours, theirs = (options.folder / f"{name}.{form}" for name in ("ours", "theirs"))
        ours = ours if form in INT_FORMS else ours.with_name(f"{ours.name}.gguf")
        for _ in range(options.turns):
            command = [*mixtral, "quantize", str(source), str(ours), "--format", form]
            measure(f"mixtral, {form}", command, ours, gigabytes)
            if options.peer and form not in INT_FORMS:
                command = [options.peer, "-c", PEER, str(source), str(theirs), form, str(threads)]
                measure(f"llama.cpp, {form}", command, theirs, gigabytes)
        back = options.folder / "back"
        command = [*mixtral, "convert", str(ours), str(back), "--to", "hf-per-expert", "--dtype", "bfloat16"]
        written = ours.stat().st_size if ours.is_file() else sum(file.stat().st_size for file in ours.iterdir())
        measure(f"mixtral, {form} to hf", command, back, written / 1e9)
        shutil.rmtree(back)


if __name__ == "__main__":
    main()
