"""What fine-tuning starts from: exact masters, shared rows kept, quantised weights only for adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.errors import ConfigError, TokenizerError
from mixtral.quant.modules import PackedLinear
from mixtral.tokenizer import gguf_vocabulary
from mixtral.train.start import fingerprint, load_start
from mixtral.weights import load_compact, load_model
from mixtral.weights.convert import convert, convert_to_gguf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masters_are_the_files_values_and_the_model_their_rounding(plain: Path, dtype: str) -> None:
    start = load_start(plain, dtype=dtype, full=True)
    exact = dict(load_model(plain, device="cpu").named_parameters())
    assert start.masters.keys() == exact.keys()
    for name, parameter in start.model.named_parameters():
        assert torch.equal(start.masters[name], exact[name].detach())
        wanted = torch.float32 if name.endswith("mlp.gate.weight") else getattr(torch, dtype)
        assert parameter.dtype == wanted
        assert torch.equal(parameter.detach(), exact[name].detach().to(wanted))
    assert (start.copies_of_last, start.row_of_id, start.tokenizer.version) == (1, None, "v3")


def test_a_model_with_shared_rows_keeps_them(compact: Path, trained_ids: list[int]) -> None:
    start = load_start(compact, dtype="float32", full=True)
    whole = load_compact(compact, device="cpu").model
    rows = len(trained_ids) + 1
    assert start.model.config.vocab_size == rows
    assert start.copies_of_last == 32768 - len(trained_ids)
    ids = [*trained_ids[:50], 31_999, 32_000]
    table = start.model.get_parameter("lm_head.weight").detach()
    assert torch.equal(table[start.rows(ids)], whole.get_parameter("lm_head.weight").detach()[ids])
    assert start.without_row(ids) == [i for i in ids if i not in set(trained_ids)]
    assert start.tokenizer.respell


def test_quantised_weights_stay_for_an_adapter_and_are_refused_otherwise(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "int4", layout="per-expert", form="int4_g32")
    start = load_start(tmp_path / "int4", dtype="float32", full=False)
    assert any(isinstance(module, PackedLinear) for module in start.model.modules())
    assert not start.masters
    with pytest.raises(ConfigError, match=r"modules are quantised; all of a model can be trained from float weights"):
        load_start(tmp_path / "int4", dtype="float32", full=True)


def test_a_fingerprint_tells_models_apart(plain: Path, compact: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    assert fingerprint(plain) == fingerprint(tmp_path / "copy") != fingerprint(compact)
    (tmp_path / "copy" / "README.md").write_text("notes")
    assert fingerprint(plain) == fingerprint(tmp_path / "copy")
    (weights,) = (tmp_path / "copy").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(plain) != fingerprint(tmp_path / "copy")
    assert fingerprint(weights) != fingerprint(next(plain.glob("*.safetensors")))


def test_the_fingerprint_of_a_split_file_is_that_of_all_parts(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    before = fingerprint(first)
    for name in ("other-00002-of-00002.gguf", "m-00002-of-00003.gguf", "m.gguf"):
        (tmp_path / name).write_bytes(b"of another model")
    assert fingerprint(first) == fingerprint(second) == before
    second.write_bytes(b"third")
    assert fingerprint(first) == fingerprint(second) != before


def test_a_file_with_another_vocabulary_is_refused_as_when_it_is_loaded(plain: Path, tmp_path: Path) -> None:
    def swapped(size: int) -> dict[str, Any]:
        values = gguf_vocabulary(size)
        pieces = values["tokenizer.ggml.tokens"]
        pieces[900], pieces[901] = pieces[901], pieces[900]
        return values

    convert_to_gguf(plain, tmp_path / "good.gguf", vocabulary=gguf_vocabulary)
    convert_to_gguf(plain, tmp_path / "other.gguf", vocabulary=swapped)
    assert load_start(tmp_path / "good.gguf", dtype="float32", full=False).tokenizer.version == "v3"
    with pytest.raises(TokenizerError, match=r"token 900 is .* trained with another tokenizer"):
        load_start(tmp_path / "other.gguf", dtype="float32", full=False)
