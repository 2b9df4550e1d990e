"""``train pretrain`` on an exported run, and ``overlap`` of a run and of its configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nano import toml

from mixtral.cli import main

Capture = pytest.CaptureFixture[str]
STEPS = 2


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, its run and the exported model."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "first.toml").write_text(toml(run={"steps": STEPS}))
    assert main(["train", "pretrain", str(folder / "first.toml"), "--out", str(folder / "run")]) == 0
    assert main(["train", "export", str(folder / "run"), str(folder / "model")]) == 0
    return folder


def begun(first: Path, path: object, **data: int) -> Path:
    file = first / "begun.toml"
    file.write_text(toml(run={"steps": 1}, data={"seed": 2, **data}) + f"[start]\npath = {json.dumps(str(path))}\n")
    return file


def test_a_run_begins_with_an_exported_model(first: Path, tmp_path: Path, capsys: Capture) -> None:
    config = begun(first, first / "model")
    assert main(["train", "pretrain", str(config), "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert "int8 groups with shared vocabulary rows" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["base"]["path"] == str(first / "model")
    assert json.loads((first / "run" / "record.json").read_text())["base"] == "none"
    capsys.readouterr()
    assert main(["overlap", str(tmp_path / "run"), "--suite", "sums/1-op", "--count", "5"]) == 0
    assert f"the run begins with {first / 'model'}: what that was trained on is not compared" in capsys.readouterr().err


def test_a_run_goes_on_though_its_model_is_gone(first: Path, tmp_path: Path, capsys: Capture) -> None:
    base = Path(shutil.copytree(first / "model", tmp_path / "base"))
    config = begun(first, base)
    command = ["train", "pretrain", str(config), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    shutil.rmtree(base)
    config.write_text(config.read_text().replace("\nsteps = 1", "\nsteps = 2"))
    assert main(command) == 0
    assert "step 2/2 " in capsys.readouterr().out


def test_what_cannot_be_begun_with_is_told(first: Path, tmp_path: Path, capsys: Capture) -> None:
    missing = begun(first, first / "nowhere")
    assert main(["train", "pretrain", str(missing), "--out", str(tmp_path / "run")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    fewer = begun(first, first / "model", trained_rows=1299)
    assert main(["train", "pretrain", str(fewer), "--out", str(tmp_path / "run")]) == 2
    assert "trained_rows is 1299, but" in capsys.readouterr().err


def test_overlap_of_a_run_is_that_of_its_configuration(first: Path, capsys: Capture) -> None:
    options = ["--suite", "sums/1-op", "--suite", "chat/values", "--count", "20"]
    tables = []
    for of in ("run", "first.toml"):
        capsys.readouterr()
        assert main(["overlap", str(first / of), *options]) == 0
        captured = capsys.readouterr()
        assert f"of {4 * STEPS} training documents read" in captured.err
        assert "the run begins with" not in captured.err
        tables.append(captured.out)
    assert tables[0] == tables[1]
    assert tables[0].count("| 20 | 0 |") == 2
