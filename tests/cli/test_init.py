"""``mixtral init``: what it writes, what it says, and that llama.cpp loads the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mixtral
from mixtral.cli import main
from mixtral.files.gguf import read_gguf

Capture = pytest.CaptureFixture[str]
TINY = ("--preset", "tiny", "--layers", "1")


def test_a_file_with_tokenizer_that_generates_text(tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "model.gguf"
    assert main(["init", str(target), *TINY, "--experts", "4", "--format", "q4_k_m"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{target}: q4_k_m, 13 tensors, 0.01 GB in ")
    assert said.endswith(" GB/s)\n")
    metadata = read_gguf(target).metadata
    assert metadata["llama.block_count"] == 1
    assert metadata["llama.expert_count"] == 4
    assert metadata["general.file_type"] == 15
    llm = mixtral.load(target)
    assert llm.tokenizer.version == "v3"
    assert llm.generate("Hello", max_tokens=3, temperature=0).ids
    assert main(["verify", str(target)]) == 0


def test_a_folder_in_the_names_of_hugging_face(tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "model"
    assert main(["init", str(target), *TINY]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: bf16, 34 tensors, 0.04 GB in ")
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert mixtral.load(target).generate("Hello", max_tokens=3, temperature=0).ids


def test_a_mix_in_a_folder_is_named_after_what_it_is(tmp_path: Path, capsys: Capture) -> None:
    assert main(["init", str(tmp_path / "a" / "b"), *TINY, "--format", "q8_0"]) == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["random-tiny-1-layers.q8_0.gguf"]
    assert "random-tiny-1-layers.q8_0.gguf: q8_0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--preset", "7b"], "unknown preset '7b'; known presets: 8x7b, 8x22b, tiny"),
        (["--format", "q4"], "format is 'q4'; a GGUF file can be f32, f16, bf16, q8_0"),
        (["--layers", "0"], "Invalid value for '--layers'"),
        (["--layers", "2000"], "num_hidden_layers is 2000; expected at most 1024"),
        (["--experts", "1"], "Invalid value for '--experts'"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    arguments: list[str], told: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["init", str(tmp_path / "model"), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peers
@pytest.mark.parametrize("form", ["q4_k_m", "q8_0", "q2_k", "q3_k_m", "q5_0", "q5_1", "q4_1", "q4_0", "q6_k", "bf16"])
def test_llama_cpp_loads_the_file_and_computes_the_same(form: str, tmp_path: Path) -> None:
    import llama_cpp

    target = tmp_path / "model.gguf"
    assert main(["init", str(target), *TINY, "--format", form]) == 0
    llm = mixtral.load(target, dtype="float32", reference=True)
    peer: Any = llama_cpp.Llama(str(target), n_ctx=64, n_threads=2, logits_all=True, verbose=False)
    ids = [1, 2000, 3000, 4000]
    peer.eval(ids)
    ours, theirs = llm.logits(ids)[-1].numpy(), peer.scores[len(ids) - 1]
    assert abs(ours - theirs).max() < 0.1 * ours.std()
