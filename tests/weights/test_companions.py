"""The tokenizer and its company go along with a conversion, and nothing else of the folder does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from mixtral.cli import main
from mixtral.config import MixtralConfig
from mixtral.model.mixtral import Mixtral
from mixtral.weights import companions as module
from mixtral.weights.companions import companions, copy_companions
from mixtral.weights.convert import convert_to_gguf
from mixtral.weights.save import save_model

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32000,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
WORDS = ["<unk>", "<s>", "</s>", "hello", "world"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with a tokenizer as transformers wants it, and with files that do not belong to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "source"
    model = Mixtral(CONFIG, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_model(model, folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "tokenizer.model.v3").write_bytes(b"\0pieces")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} world")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    for name in (
        "README.md",
        "LICENSE",
        "modeling_mixtral.py",
        "tokenizer.py",
        "pytorch_model.bin",
        "tokenizer.modelx",
    ):
        (folder / name).write_text("not to be copied")
    return folder


COPIED = [
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model.v3",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("to", ["hf", "hf-per-expert", "consolidated"])
def test_transformers_loads_what_was_copied(to: str, source: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "--to", to]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"copied beside it: {', '.join(COPIED)}"]
    weights = (
        {"config.json", "model.safetensors"} if to != "consolidated" else {"params.json", "consolidated.safetensors"}
    )
    assert {path.name for path in target.iterdir()} == weights | set(COPIED)
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in COPIED)
    if to == "consolidated":  # transformers asks for a config.json first
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("hello world")["input_ids"] == [3, 4]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "hello world"
    assert AutoModelForCausalLM.from_pretrained(target).generation_config.eos_token_id == 2


def test_another_vocabulary_needs_another_tokenizer(source: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["convert", str(source), str(tmp_path / "new"), "--to", "hf", "--vocab", "v3"]) == 0
    said = f"not copied, as they belong to the old vocabulary: {', '.join(COPIED)}"
    assert capsys.readouterr().out.splitlines()[2:] == [said]
    assert companions(tmp_path / "new") == []
    assert main(["convert", str(source), str(tmp_path / "same"), "--to", "hf", "--vocab", "v1"]) == 0
    assert companions(tmp_path / "same") == COPIED


def test_a_single_file_and_the_embedded_model_have_none(source: Path, tmp_path: Path, capsys: Capture) -> None:
    convert_to_gguf(source, tmp_path / "m.gguf", vocabulary=lambda size: {})
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert companions(tmp_path / "out") == companions(tmp_path / "m.gguf") == []
    assert main(["convert", str(source), str(tmp_path / "n.gguf"), "--to", "gguf"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "n.gguf", "out", "source"]


def test_overwriting_replaces_the_tokenizer_and_nothing_else(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "tokenizer.json").write_text("old")
    outside = tmp_path / "outside.json"
    outside.write_text("mine too")
    (target / "tokenizer_config.json").symlink_to(outside)
    command = ["convert", str(source), str(target), "--to", "hf"]
    assert main(command) == 2
    assert (target / "tokenizer.json").read_text() == "old"
    assert main([*command, "--overwrite"]) == 0
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in COPIED)
    assert (target / "notes.txt").read_text() == "mine"
    assert outside.read_text() == "mine too"
    assert not (target / "tokenizer_config.json").is_symlink()
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


def test_what_is_skipped(source: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is not a small regular file of the folder; the weights are written all the same."""
    monkeypatch.setattr(module, "MAX_BYTES", 40)
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (source / name).unlink()
    (source / "tokenizer_config.json").symlink_to(secret)
    (source / "added_tokens.json").symlink_to(tmp_path / "nowhere")
    (source / "special_tokens_map.json").mkdir()
    os.mkfifo(source / "generation_config.json")
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "hf"]) == 0
    first, *others = capsys.readouterr().out.splitlines()[2:]
    assert first == "copied beside it: chat_template.jinja, tokenizer.model.v3"
    reasons = dict(line.removeprefix("not copied: ").split(": ", 1) for line in others)
    assert reasons["added_tokens.json"].endswith("no such file")
    assert reasons["generation_config.json"].endswith("not a regular file")
    assert reasons["special_tokens_map.json"].endswith("not a regular file")
    assert "a link that leads out of the folder" in reasons["tokenizer_config.json"]
    assert reasons["tokenizer.json"] == "larger than 40 bytes"
    assert companions(tmp_path / "target") == ["chat_template.jinja", "tokenizer.model.v3"]


def test_a_link_inside_the_folder_becomes_a_file(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").symlink_to("tokenizer.model.v3")
    (tmp_path / "target").mkdir()
    done = copy_companions(["tokenizer.model"], source, tmp_path / "target", overwrite=False)
    assert (done.names, done.skipped) == (["tokenizer.model"], {})
    assert not (tmp_path / "target" / "tokenizer.model").is_symlink()
    again = copy_companions(["tokenizer.model"], source, tmp_path / "target", overwrite=False)
    assert (again.names, again.skipped) == ([], {"tokenizer.model": "is there already"})
