"""What each number format costs on the embedded model; GGUF formats by us and by llama.cpp from one float16 file.

    python benchmarks/quality.py --peer PYTHON [--tokens 3000] [--kernels [--format q4_0]...]

PYTHON is an interpreter that has llama-cpp-python. Both files are run by our reference path in float32, on held-out
documents of the town desk; folders of integers are only ours. Prints a table: file size, perplexity, Kullback-Leibler
divergence from the float16 file. With ``--kernels`` it is our file that both programs run instead, we on compiled
kernels with keys and values in float32 and in int8, llama.cpp with its defaults (keys and values in float16); the
divergence is that from the same weights on our reference path, and from the float16 file. Folders of integers are ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

import mixtral
from mixtral.api import folder_of
from mixtral.desk.write import document
from mixtral.evaluate.divergence import Comparison, compare
from mixtral.tokenizer import gguf_vocabulary
from mixtral.train.data import encode_document
from mixtral.weights.convert import convert, convert_to_gguf
from quantize import PEER

FORMS = ("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q3_k_s", "q2_k")
INTEGERS = ("int8", "int8_g32", "int4_g32", "int4_g64", "int4_g128", "int3_g32", "int3_g64", "int3_g128")
KERNEL_FORMS = ("bf16", "f16", *FORMS, *INTEGERS)


def write(source: Path, target: Path, form: str) -> None:
    """Quantise with our encoders."""
    convert_to_gguf(
        source,
        target,
        form=form,
        vocabulary=gguf_vocabulary,
        overwrite=True,
    )


def documents(tokens: int) -> list[list[int]]:
    """Held-out documents with about as many tokens together, spelled as the embedded model wants it."""
    tokenizer = mixtral.load("embedded").tokenizer
    found: list[list[int]] = []
    while sum(map(len, found)) < tokens:
        found.append(encode_document(tokenizer, document(3, "test", len(found)))[0])
    return found


Logits = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def logits(path: Path, texts: list[list[int]]) -> Logits:
    """Logits after each token of each document, one after the other."""
    llm = mixtral.load(path, dtype="float32", decode=True, reference=True)
    return torch.cat([llm.logits(ids) for ids in texts]).numpy()


PEER_LOGITS = """
import json, os, sys
import numpy as np
import llama_cpp as L
path, texts, target = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
llm = L.Llama(path, n_ctx=max(map(len, texts)) + 8, logits_all=True, verbose=False, n_threads=2, n_batch=512)
found = []
for ids in texts:
    llm.reset()
    llm.eval(ids)
    found.append(np.array(llm.scores[: len(ids)], np.float32))
np.save(target, np.concatenate(found))
"""


def both(form: str, before: Logits, source: Path, folder: Path, texts: list[list[int]], peer: str) -> str:
    """A line of the table of ``--kernels``: divergences of one file; the peer runs GGUF alone."""
    path, ids = folder / ("ours.gguf" if form not in INTEGERS else form), [i for text in texts for i in text]
    if form in INTEGERS:
        convert(source, path, layout="per-expert", form=form)
    else:
        write(source, path, form)
    exact = logits(path, texts)
    found = []
    for kind in ("float32", "int8"):
        llm = mixtral.load(path, dtype="float32", kv_dtype=kind)
        found.append(torch.cat([llm.logits(text) for text in texts]).numpy())
    if form not in INTEGERS:
        (folder / "texts.json").write_text(json.dumps(texts))
        command = [peer, "-c", PEER_LOGITS, str(path), str(folder / "texts.json"), str(folder / "theirs.npy")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append(np.load(folder / "theirs.npy"))
    cells = []
    for reference in (exact, before):
        cells += [f"{compare(reference, one, ids).kl_mean:.6f}" for one in found] + [""] * (3 - len(found))
    return f"| {form} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--format", action="append", choices=KERNEL_FORMS, help="with --kernels; repeatable")
    options = parser.parse_args()
    texts = documents(options.tokens)
    ids = [i for text in texts for i in text]
    if options.kernels:
        run_kernels(texts, options.peer, options.format or list(KERNEL_FORMS))
        return
    print(f"{len(texts)} documents, {len(ids):,} tokens; ours | llama.cpp")
    print("| format | MB | perplexity | KL, mean | KL, 99 % | same top token |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.gguf"
        write(folder_of("embedded"), source, "f16")
        before = logits(source, texts)
        for form in FORMS:
            ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
            write(source, ours, form)
            command = [options.peer, "-c", PEER, str(source), str(theirs), form, "2"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found = [(path.stat().st_size, compare(before, logits(path, texts), ids)) for path in (ours, theirs)]
            print(f"| {form} | " + " | ".join(" / ".join(cell) for cell in zip(*map(cells, found), strict=True)) + " |")
        for form in INTEGERS:
            convert(source, folder / form, layout="per-expert", form=form)
            size = (folder / form / "model.safetensors").stat().st_size
            found = [(size, compare(before, logits(folder / form, texts), ids))]
            print(f"| {form} | " + " | ".join(cells(found[0])) + " |", flush=True)


def run_kernels(texts: list[list[int]], peer: str, forms: list[str]) -> None:
    """The table of ``--kernels``."""
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} tokens: mean KL from the same weights, and from float16")
    print("| format | kernels | int8 cache | llama.cpp | kernels | int8 cache | llama.cpp |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source.gguf"
        write(folder_of("embedded"), source, "f16")
        before = logits(source, texts)
        for form in forms:
            print(both(form, before, source, Path(name), texts, peer), flush=True)


def cells(measured: tuple[int, Comparison]) -> list[str]:
    """The columns of one file."""
    size, found = measured
    return [
        f"{size / 1e6:.2f}",
        f"{found.perplexity[1]:.4f}",
        f"{found.kl_mean:.6f}",
        f"{found.kl_99:.5f}",
        f"{100 * found.same_top:.2f} %",
    ]


if __name__ == "__main__":
    main()
