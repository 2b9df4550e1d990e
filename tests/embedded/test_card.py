"""The model card of a run, and of one that began with the model of another; small runs of the same commands."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from nano import toml

from mixtral.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCORES = ROOT / "src" / "mixtral" / "embedded" / "scores.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``first.toml``, its run ``run`` and ``model``, and ``second`` and ``model2`` that began with it."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "first.toml").write_text(toml(run={"steps": 2}))
    start = f"[start]\npath = {json.dumps(str(folder / 'model'))}\n"
    (folder / "second.toml").write_text(toml(run={"steps": 1}, data={"seed": 2}) + start)
    for config, run, model in (("first.toml", "run", "model"), ("second.toml", "second", "model2")):
        assert main(["train", "pretrain", str(folder / config), "--out", str(folder / run)]) == 0
        assert main(["train", "export", str(folder / run), str(folder / model)]) == 0
        shutil.copy(SCORES, folder / model / "scores.json")
    return folder


@pytest.fixture
def card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script; its first run is that of ``first.toml``."""
    spec = importlib.util.spec_from_file_location("card", ROOT / "scripts" / "card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FIRST", folder / "first.toml")
    return module


def tokens(run: Path) -> int:
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return max(record.get("tokens_total", 0) for record in steps)


def test_a_run_from_nothing(card: ModuleType, folder: Path) -> None:
    text = card.render(folder / "run", folder / "model")
    assert f"2 steps, {tokens(folder / 'run'):,} tokens (" in text
    assert "from seed 1:\n\nchat 36, calls 20" in text
    assert f"| 2 | {tokens(folder / 'run'):,} |" in text
    assert "Then from seed" not in text


def test_a_run_that_began_with_the_first_tells_of_both(card: ModuleType, folder: Path) -> None:
    text = card.render(folder / "second", folder / "model2")
    first, second = tokens(folder / "run"), tokens(folder / "second")
    assert f"2 steps, {first:,} tokens, " in text
    assert f"1 steps, {second:,} tokens (" in text
    assert f"{first + second:,} tokens in all" in text
    assert "first from seed 1:" in text
    assert "Then from seed 2:" in text


def test_parts_that_do_not_belong_together_are_refused(
    card: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="is not the one that"):
        card.render(folder / "run", folder / "model2")
    (tmp_path / "other.toml").write_text(toml(run={"steps": 3}))
    with monkeypatch.context() as patch:
        patch.setattr(card, "FIRST", tmp_path / "other.toml")
        with pytest.raises(ValueError, match=r"was not made by other\.toml"):
            card.render(folder / "second", folder / "model2")
    monkeypatch.setattr(card, "generator_id", lambda: "another")
    with pytest.raises(ValueError, match="another version of the generator"):
        card.render(folder / "run", folder / "model")
