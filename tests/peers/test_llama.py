"""llama.cpp runs what we write, and we run what its quantiser writes, with the same greedy text: T5."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import mixtral
from mixtral.api import folder_of
from mixtral.files.gguf import read_gguf
from mixtral.tokenizer import gguf_vocabulary
from mixtral.weights.convert import convert_to_gguf

pytestmark = pytest.mark.peers
PROMPTS = ("The Maritime Museum opens at", "Das Uhrenmuseum", "Where is the Castle?")
TOKENS = 40


def write(path: Path, form: str) -> Path:
    convert_to_gguf(
        folder_of("embedded"),
        path,
        form=form,
        vocabulary=gguf_vocabulary,
    )
    return path


def same_greedy_text(path: Path, *, near: float) -> None:
    import llama_cpp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that blocks are decoded
        llm = mixtral.load(path, dtype="float32")
    peer: Any = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)
    spelled = mixtral.load("embedded").tokenizer
    for prompt in PROMPTS:
        ids = spelled.encode(prompt, bos=True)
        theirs: list[int] = []
        for token in peer.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if len(theirs) == TOKENS or token == spelled.eos_id:
                break
            theirs.append(token)
        ours = [i for i in llm.generate(ids, max_tokens=TOKENS, temperature=0.0).ids if i != spelled.eos_id]
        assert min(len(ours), len(theirs)) > 5
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if first is None:
            assert len(ours) == len(theirs)
            continue
        # It rounds activations to int8 where weights are blocks, so it may choose another token of nearly equal logit.
        logits = llm.logits([*ids, *ours[:first]])[-1]
        assert float(logits[ours[first]] - logits[theirs[first]]) < near


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0", "q4_k_m"])
def test_it_runs_what_we_write(form: str, tmp_path: Path) -> None:
    same_greedy_text(write(tmp_path / "ours.gguf", form), near=0.0 if form in ("f32", "f16", "bf16") else 0.2)


@pytest.mark.parametrize("form", ["q8_0", "q4_0", "q6_k", "q4_k_m"])
def test_we_run_what_it_writes(form: str, tmp_path: Path) -> None:
    """Its mix is ours too: every tensor has the format that we would have chosen."""
    import llama_cpp

    source, target = write(tmp_path / "f16.gguf", "f16"), tmp_path / "theirs.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 2, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form.upper()}")
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    same_greedy_text(target, near=0.2)
    ours = read_gguf(write(tmp_path / "ours.gguf", form))
    theirs = read_gguf(target)
    assert {n: (e.dtype, e.shape) for n, e in ours.tensors.items()} == {
        n: (e.dtype, e.shape) for n, e in theirs.tensors.items()
    }
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
