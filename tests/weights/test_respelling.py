"""The respelling of ids without rows of their own goes along when a compact model becomes an ordinary folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mixtral
from mixtral.api import folder_of
from mixtral.cli import main
from mixtral.errors import CheckpointError
from mixtral.train.start import load_start
from mixtral.weights import respelling_of
from mixtral.weights.respelling import NAME

TEXT = "Der Schornsteinfeger kauft Zwetschgen."


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in integers of four bits."""
    folder = tmp_path_factory.mktemp("respelling") / "int4"
    assert main(["quantize", "embedded", str(folder), "--format", "int4_g32"]) == 0
    return folder


def test_it_is_written_beside_the_weights_and_used(quantised: Path) -> None:
    known = respelling_of(folder_of("embedded"))
    assert len(known) > 20_000
    assert respelling_of(quantised) == known
    ids = mixtral.load("embedded").tokenizer.encode(TEXT)
    tokenizer = mixtral.load(quantised).tokenizer
    assert tokenizer.encode(TEXT) == ids
    assert tokenizer.decode(ids) == TEXT
    assert not known.keys() & set(ids)


def test_training_spells_like_the_model_it_starts_from(quantised: Path) -> None:
    expected = load_start(folder_of("embedded"), dtype="float32", full=False).tokenizer.encode(TEXT)
    assert load_start(quantised, dtype="float32", full=False).tokenizer.encode(TEXT) == expected


def test_a_saved_and_a_converted_folder_have_it_too(tmp_path: Path) -> None:
    known = respelling_of(folder_of("embedded"))
    mixtral.load("embedded").save(tmp_path / "saved")
    assert respelling_of(tmp_path / "saved") == known
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "fused"), "--to", "hf"]) == 0
    assert respelling_of(tmp_path / "fused") == known
    assert main(["convert", "embedded", str(tmp_path / "converted"), "--to", "hf"]) == 0
    assert respelling_of(tmp_path / "converted") == known


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": [1]}', '{"5": 1}', '{"5": []}', '{"5": [999999]}', '{"-1": [3]}']
)
def test_a_damaged_one_is_refused(quantised: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes((quantised / "config.json").read_bytes())
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match=NAME):
        respelling_of(tmp_path)


def test_ordinary_folders_and_files_have_none(quantised: Path, tmp_path: Path) -> None:
    assert respelling_of(tmp_path) == {}
    assert respelling_of(quantised / "config.json") == {}


def test_that_of_a_model_that_was_there_before_goes(tmp_path: Path) -> None:
    ordinary, target = tmp_path / "ordinary", tmp_path / "target"
    assert main(["init", str(ordinary), "--preset", "tiny", "--format", "bf16"]) == 0
    assert main(["convert", "embedded", str(target), "--to", "hf"]) == 0
    assert respelling_of(target)
    assert main(["convert", str(ordinary), str(target), "--to", "hf", "--overwrite"]) == 0
    assert respelling_of(target) == {}


def test_it_is_an_object_of_lists(quantised: Path) -> None:
    found = json.loads((quantised / NAME).read_text())
    assert all(isinstance(ids, list) and ids for ids in found.values())
