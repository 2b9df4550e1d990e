from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixtral.weights.commit import Commit


def write(folder: Path, text: str, *, finish: bool = True) -> None:
    with Commit(folder) as commit:
        for name in ("data", "index"):
            commit.path(name).write_text(text)
        if finish:
            commit.finish(remove=["old", "data"])


def test_files_appear_together_and_old_ones_go(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "old").write_text("x")
    write(folder, "1")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"data": "1", "index": "1"}


def test_every_file_is_on_disk_before_the_first_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        done.append(f"rename {target.name}")
        rename(source, target)

    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
    )
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path, "1")
    flushed = ["flush .data.partial", "flush .index.partial"]
    assert done == [*flushed, "rename data", "rename index", f"flush {tmp_path.name}"]


def test_nothing_remains_without_finish(tmp_path: Path) -> None:
    write(tmp_path, "1", finish=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupted_finish_leaves_no_mixture(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the last file no reader takes the folder for complete."""
    write(tmp_path, "1")
    calls = 0
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, "2")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
