"""``--json-schema`` and ``--regex`` of ``generate`` and ``chat``."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from sampling import validate

from mixtral.cli import main
from mixtral.cli.generate import read_form
from mixtral.config import MixtralConfig
from mixtral.errors import RequestError
from mixtral.model.mixtral import Mixtral
from mixtral.weights import save_model

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32768,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)
SCHEMA = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(3)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("models") / "town"
    save_model(model, folder)
    return folder


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def test_generate_keeps_to_a_schema_and_to_an_expression(folder: Path, schema: Path, capsys: Capture) -> None:
    base = ["generate", "--model", str(folder), "--prompt", "x", "--json", "--max-tokens", "100", "--seed", "1"]
    assert main([*base, "--json-schema", str(schema)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish_reason"] == "stop"
    validate(SCHEMA, found["text"])
    assert main([*base, "--regex", "[a-c]{4}"]) == 0
    assert re.fullmatch("[a-c]{4}", json.loads(capsys.readouterr().out)["text"])


def test_each_answer_of_a_conversation_keeps_to_it(
    folder: Path, schema: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    command = ["chat", "--model", str(folder), "--json-schema", str(schema), "--temperature", "1", "--seed", "2"]
    assert main([*command, "--max-tokens", "100"]) == 0
    found = json.JSONDecoder()
    text = capsys.readouterr().out
    for _ in range(2):
        value, end = found.raw_decode(text.lstrip())
        validate(SCHEMA, json.dumps(value))
        text = text.lstrip()[end:]
    assert not text.strip()


def test_what_is_wrong_is_told_before_anything_is_loaded(tmp_path: Path, schema: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for options, told in (
        (["--json-schema", str(schema), "--regex", "a"], "both given"),
        (["--json-schema", str(tmp_path / "none.json")], "No such file"),
        (["--json-schema", str(tmp_path)], "directory"),
        (["--json-schema", str(broken)], "is no JSON"),
    ):
        for command in (["generate", "--prompt", "x"], ["chat"]):
            assert main([*command, "--model", str(tmp_path / "no-model"), *options]) != 0
            assert told in capsys.readouterr().err


def test_a_deep_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(RequestError, match="is no JSON"):
        read_form(deep, None)


def test_a_schema_that_cannot_be_kept_is_named(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"uniqueItems": true}')
    assert main(["generate", "--model", str(folder), "--prompt", "x", "--json-schema", str(path)]) != 0
    assert "'uniqueItems'" in capsys.readouterr().err
