"""``mixtral convert`` and what ``inspect`` says of the result; the vocabulary upgrade (C15)."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

import mixtral
from mixtral.cli import main
from mixtral.config import MixtralConfig
from mixtral.model.mixtral import Mixtral
from mixtral.weights import save_model
from mixtral.weights.load import load_model

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32000,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(5)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.3).to(torch.bfloat16))
    folder = tmp_path_factory.mktemp("models") / "source"
    save_model(model, folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_there_and_back(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(folder), str(there), "--to", "consolidated"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{folder}: per-expert, 16 tensors"
    assert re.fullmatch(rf"{re.escape(str(there))}: consolidated, 0\.00 GB in [\d.]+ s \([\d.]+ GB/s\)", second)
    assert sorted(path.name for path in there.iterdir()) == ["consolidated.safetensors", "params.json"]
    assert main(["inspect", str(there), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["files"]["layout"], said["files"]["tensors"]) == ("consolidated", 16)
    assert said["config"]["max_position_embeddings"] == 128
    assert main(["convert", str(there), str(back), "--to", "hf-per-expert"]) == 0
    # The coefficient of the balance loss is no part of Mistral's files.
    assert digests(back)["model.safetensors"] == digests(folder)["model.safetensors"]
    prompt = [1, 99, 7]
    expected = mixtral.load(folder).logits(prompt)
    assert torch.equal(mixtral.load(there).logits(prompt), expected)


def test_archives_need_permission(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file

    there = tmp_path / "there"
    assert main(["convert", str(folder), str(there), "--to", "consolidated"]) == 0
    torch.save(load_file(there / "consolidated.safetensors"), there / "consolidated.00.pth")
    (there / "consolidated.safetensors").unlink()
    capsys.readouterr()
    for command in (["convert", str(there), str(tmp_path / "x"), "--to", "hf"], ["inspect", str(there)]):
        assert main(command) == 2
        assert "consolidated.00.pth: a pickled archive" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["convert", str(there), str(tmp_path / "x"), "--to", "hf", "--unpickle"]) == 0
    assert main(["inspect", str(there), "--unpickle"]) == 0
    assert torch.equal(mixtral.load(there, unpickle=True).logits([5]), mixtral.load(tmp_path / "x").logits([5]))


def test_vocabulary_up_and_down_again(folder: Path, tmp_path: Path) -> None:
    """C15: logits of the old ids do not change, and the way back restores the file bit for bit."""
    up, down = tmp_path / "up", tmp_path / "down"
    assert main(["convert", str(folder), str(up), "--to", "hf-per-expert", "--vocab", "v3"]) == 0
    assert main(["convert", str(up), str(down), "--to", "hf-per-expert", "--vocab", "v1"]) == 0
    assert digests(down) == digests(folder)
    old, new = mixtral.load(folder), mixtral.load(up)
    assert (old.config.vocab_size, new.config.vocab_size) == (32000, 32768)
    ids = [1, 2, 3, 500, 31999]
    moved = [i if i < 3 else i + 768 for i in ids]
    before, after = old.logits(ids), new.logits(moved)
    assert torch.equal(after[:, :3], before[:, :3])
    assert torch.equal(after[:, 771:], before[:, 3:])
    assert old.tokenizer.encode("Hi", bos=False) == [15359]
    assert new.tokenizer.encode("Hi", bos=False) == [16127]
    table = load_model(up, device="cpu").get_parameter("model.embed_tokens.weight")[3:771].float()
    assert table.std().item() == pytest.approx(0.25, rel=0.05)
    head = load_model(up, device="cpu").get_parameter("lm_head.weight")[3:771].float()
    assert not torch.equal(head, table)


def test_dtype_and_overwriting(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "x"
    command = ["convert", str(folder), str(target), "--to", "hf", "--dtype", "float32"]
    assert main(command) == 0
    assert load_model(target, device="cpu").get_parameter("lm_head.weight").dtype == torch.float32
    before = digests(target)
    capsys.readouterr()
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert digests(target) == before
    assert main(["convert", str(folder), str(target), "--to", "consolidated", "--overwrite"]) == 0
    assert not (target / "model.safetensors").exists()
    assert load_model(target, device="cpu").get_parameter("lm_head.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--to", "onnx"], "--to is 'onnx'; expected one of hf, hf-per-expert, consolidated, gguf"),
        (["--to", "hf", "--vocab", "v2"], "--vocab is 'v2'; expected one of v1, v3"),
        (["--to", "hf", "--dtype", "int8"], "dtype is 'int8'"),
        ([], "Missing option '--to'"),
    ],
)
def test_bad_options(options: list[str], told: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["convert", str(folder), str(tmp_path / "x"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_bad_folders(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    for source, target, told in [
        (tmp_path / "none", tmp_path / "x", "no such folder"),
        (folder, folder, "is what would be read"),
    ]:
        assert main(["convert", str(source), str(target), "--to", "hf", "--overwrite"]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["inspect", str(folder)]) == 0


def test_gguf_holds_the_vocabulary(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """D2, D5: the tokens are compared with those of Mixtral; other words for the ids are refused."""
    from mixtral.errors import TokenizerError
    from mixtral.files.gguf import read_gguf
    from mixtral.files.gguf_write import GgufRecord, write_gguf

    path = tmp_path / "town.gguf"
    assert main(["convert", str(folder), str(path), "--to", "gguf"]) == 0
    assert "gguf, 0.00 GB" in capsys.readouterr().out
    found = read_gguf(path)
    tokens = found.metadata["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[:4], tokens[15359]) == (32000, ["<unk>", "<s>", "</s>", "<0x00>"], "▁Hi")
    assert found.metadata["tokenizer.ggml.token_type"].tolist().count(3) == 2
    assert main(["inspect", str(path), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "blk.0.ffn_down_exps.weight  BF16" in said
    assert re.search(r"layout +gguf *\n", said)
    assert re.search(r"version +v1 *\n", said)
    ids = [1, 2, 31999]
    loaded = mixtral.load(path)
    assert loaded.name == "town"
    assert torch.equal(loaded.logits(ids), mixtral.load(folder).logits(ids))

    data = path.read_bytes()
    records = [
        GgufRecord(
            e.name,
            e.dtype,
            e.shape,
            lambda e=e: [torch.frombuffer(bytearray(data[e.start : e.stop]), dtype=torch.uint8)],
        )
        for e in found.tensors.values()
    ]
    tokens[15359] = "▁Ho"
    write_gguf(tmp_path / "other.gguf", found.metadata, records)
    with pytest.raises(TokenizerError, match="token 15359 is '▁Ho', but '▁Hi' in the vocabulary v1"):
        mixtral.load(tmp_path / "other.gguf")


@pytest.mark.slow
def test_quantize_says_what_it_costs(tmp_path: Path, capsys: Capture) -> None:
    generator = torch.Generator().manual_seed(8)
    config = CONFIG.replace(hidden_size=256, intermediate_size=256, head_dim=128, vocab_size=32768)
    model = Mixtral(config, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).to(torch.bfloat16))
    save_model(model, tmp_path / "source")
    (tmp_path / "text.txt").write_text("When does the Maritime Museum open? " * 9, encoding="utf-8")
    check = ["--check", str(tmp_path / "text.txt"), "--tokens", "40"]
    losses = []
    for form in ("bf16", "q8_0", "q4_k_m", "q2_k"):
        command = ["quantize", str(tmp_path / "source"), str(tmp_path / f"{form}.gguf"), "--format", form, *check]
        assert main(command) == 0
        said = capsys.readouterr().out
        assert f"{form}, 0.0" in said
        assert "on 40 tokens" in said
        before, after = (float(re.findall(rf"perplexity {when} +([\d.]+)", said)[0]) for when in ("before", "after"))
        losses.append(float(re.findall(r"divergence, mean +([\d.]+)", said)[0]))
        assert (before == after) == (form == "bf16")
    assert losses[0] == 0
    assert losses == sorted(losses)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    assert main([*command[:2], str(tmp_path / "x.gguf"), "--format", "q8_0", *check]) == 2
    assert "not UTF-8 (byte 0)" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
