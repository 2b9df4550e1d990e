from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mixtral.files.commit import Commit, fingerprint


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
    flushed = ["flush .data.partial", "flush .index.partial", f"flush {tmp_path.name}"]
    names = [f"flush {tmp_path.name}", "rename data", f"flush {tmp_path.name}", "rename index"]
    assert done == [*flushed, *names, f"flush {tmp_path.name}"]


def test_nothing_remains_without_finish(tmp_path: Path) -> None:
    write(tmp_path, "1", finish=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", range(1, 5))
def test_an_interrupted_finish_leaves_no_mixture(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files are set aside, two get their names; whichever of these fails, the old files are as they were."""
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
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"data": "1", "index": "1"}


def test_an_old_file_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1")
    unlink = os.unlink

    def refuse(path: Path) -> None:
        if "replaced" in Path(path).name:
            raise OSError(13, "Permission denied")
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.warns(UserWarning, match="replaced1: is not needed .* not be deleted .Permission denied") as told:
            write(tmp_path, "2")
    assert len(told) == 2
    assert {path.read_text() for path in tmp_path.iterdir() if path.name in ("data", "index")} == {"2"}
    write(tmp_path, "3")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"data": "3", "index": "3"}


def test_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert fingerprint(path) == {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
