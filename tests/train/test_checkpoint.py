"""Run states: what comes back is what was saved, and a folder that is not whole does not count."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mixtral.errors import TrainingError
from mixtral.parallel.mesh import Mesh, alone
from mixtral.parallel.plan import Axes
from mixtral.parallel.state import StateFiles
from mixtral.train import checkpoint

VALUES: dict[str, Any] = {"config": {"a": {"b": 0.1 + 0.2}}, "trained_ids": [0, 5], "seconds_total": 1e-17}


def state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn((4, 3), generator=generator)
    weights[0, 0] = float("nan")
    return {"master.x": weights, "half": weights.bfloat16(), "steps": torch.tensor([step])}


def save(folder: Path, step: int, keep_last: int = 9) -> Path:
    return checkpoint.save(folder, step, state(step), VALUES | {"step": step}, keep_last=keep_last)


def newest(folder: Path) -> int | None:
    found = checkpoint.load_latest(folder)
    if found is None:
        return None
    step, tensors, values = found
    assert values == VALUES | {"step": step}
    for name, value in state(step).items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name].view(torch.uint8), value.view(torch.uint8))
    assert tensors.keys() == state(step).keys()
    return step


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    assert save(tmp_path / "run", 12) == tmp_path / "run" / "step-00000012"
    assert newest(tmp_path / "run") == 12


def test_an_empty_or_missing_folder_has_no_state(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


def test_the_newest_is_the_highest_step(tmp_path: Path) -> None:
    for step in (900, 20, 1000):
        save(tmp_path, step)
    assert newest(tmp_path) == 1000


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step-notes").mkdir()
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004", "step-notes"]


def truncate(folder: Path) -> None:
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite_commit(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "COMMIT").write_bytes(content)


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "state.safetensors is not what was saved"),
    "flipped bit": (flip, "state.safetensors is not what was saved"),
    "edited": (edit, "state.json is not what was saved"),
    "no commit": (lose("COMMIT"), "COMMIT: No such file"),
    "no json": (lose("state.json"), "state.json: No such file"),
    "no tensors": (lose("state.safetensors"), "state.safetensors: No such file"),
    "binary": (rewrite_commit(b"\xff{"), "COMMIT is not what was saved"),
    "empty list": (rewrite_commit(b"[]"), "COMMIT is not what was saved"),
    "empty table": (rewrite_commit(b"{}"), "COMMIT is not what was saved"),
}


@pytest.mark.parametrize(("harm", "says"), HARMS.values(), ids=HARMS)
def test_a_damaged_state_is_passed_over_with_a_warning(
    tmp_path: Path, harm: Callable[[Path], object], says: str
) -> None:
    save(tmp_path, 1)
    harm(save(tmp_path, 2))
    with pytest.warns(UserWarning, match=rf"passed over step-00000002 \({says}.*\); going on from step-00000001"):
        assert newest(tmp_path) == 1


@pytest.mark.parametrize(("harm", "says"), HARMS.values(), ids=HARMS)
def test_a_folder_of_damaged_states_is_refused(tmp_path: Path, harm: Callable[[Path], object], says: str) -> None:
    harm(save(tmp_path, 2))
    truncate(save(tmp_path, 3))
    with pytest.raises(TrainingError, match="holds no whole run state") as caught:
        checkpoint.load_latest(tmp_path)
    for part in (
        str(tmp_path),
        f"step-00000002 ({says}",
        "step-00000003 (state.safetensors is",
        "start in a new folder",
    ):
        assert part in str(caught.value)


def test_a_save_that_was_never_finished_is_no_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    folder.rename(folder.with_name(folder.name + ".tmp"))
    assert newest(tmp_path) is None
    save(tmp_path, 1)
    with warnings.catch_warnings(action="error"):
        assert newest(tmp_path) == 1


def test_damaged_folders_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate(save(tmp_path, 2))
    save(tmp_path, 3, keep_last=2)
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.warns(UserWarning, match="going on from step-00000001"):
        assert newest(tmp_path) == 1


def test_where_ranks_wait_states_that_have_not_changed_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    damage = checkpoint._damage
    two = Mesh(Axes(dp=2), 0, torch.device("cpu"), {"dp": cast(DeviceMesh, None)})
    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setattr(checkpoint, "_whole", {})  # another process
    monkeypatch.setattr(checkpoint, "_damage", lambda path: read.append(path.name) or damage(path))
    checkpoint._remove_old(tmp_path, 3, two)
    assert read == ["step-00000001", "step-00000002", "step-00000003"]
    checkpoint._remove_old(tmp_path, 3, two)
    assert len(read) == 3
    flip(tmp_path / "step-00000003")
    checkpoint._remove_old(tmp_path, 1, two)
    assert read[3:] == ["step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    checkpoint._remove_old(tmp_path, 1, alone())  # a process of its own has the time
    assert read[4:] == ["step-00000002", "step-00000003"]


def test_what_an_interrupted_save_left_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "step-00000002.tmp"
    left.mkdir()
    (left / "rubbish").write_text("x")
    assert sorted(p.name for p in save(tmp_path, 2).iterdir()) == ["COMMIT", "state.json", "state.safetensors"]
    assert not left.exists()
    truncate(save(tmp_path, 2))
    save(tmp_path, 2)
    assert newest(tmp_path) == 2


def test_the_next_save_removes_what_all_interrupted_ones_left(tmp_path: Path) -> None:
    for name in ("step-00000002.tmp", "step-00000007.tmp", "step-mine.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rubbish").write_text("x")
    save(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-mine.tmp"]


@pytest.mark.parametrize("written", [False, True])
def test_a_full_disk_keeps_the_old_state_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    save(tmp_path, 1, keep_last=1)

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        if written:
            save_file(tensors, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(TrainingError, match=r"step-00000002: the state was not saved .*No space left"):
        save(tmp_path, 2, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path) == 1


def test_steps_are_in_order_also_beyond_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, keep_last=1)
    assert newest(tmp_path) == 100_000_000


def failing(problem: Exception, only: str) -> Callable[..., Any]:
    """In the place of ``_fingerprint``: the disk cannot read one state."""
    right = checkpoint._fingerprint

    def read(path: Path) -> dict[str, Any]:
        if path.parent.name == only:
            raise problem
        return right(path)

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_state_that_cannot_be_read_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fingerprint", failing(OSError(number, os.strerror(number)), "step-00000002"))
        with pytest.raises(TrainingError, match=f"cannot be read: .*{os.strerror(number)}; nothing was changed"):
            checkpoint.load_latest(tmp_path)
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("problem", [OSError(errno.EIO, "Input/output error"), SafetensorError("Input/output error")])
def test_a_disk_that_fails_between_check_and_reading_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def fail(files: StateFiles, wanted: object) -> dict[str, Tensor]:
        raise problem

    save(tmp_path, 1)
    monkeypatch.setattr(StateFiles, "read", fail)
    with pytest.raises(TrainingError, match=r"cannot be read: .*Input/output error; nothing was changed"):
        checkpoint.load_latest(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path, 1)
    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(TrainingError, match=r"cannot be read: .*Permission denied"):
        checkpoint.load_latest(tmp_path)


def test_a_state_that_cannot_be_read_is_neither_counted_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setattr(checkpoint, "_fingerprint", failing(OSError(errno.EIO, "broken"), "step-00000002"))
    save(tmp_path, 4, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000004"]


def test_only_one_trains_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with checkpoint.exclusive(folder):
        with (
            pytest.raises(TrainingError, match=f"{folder}: another process is training here; wait"),
            checkpoint.exclusive(folder),
        ):
            pytest.fail("two at once")
        with checkpoint.exclusive(tmp_path / "other"):
            pass
    with checkpoint.exclusive(folder):
        pass


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another process is training here"), checkpoint.exclusive(tmp_path):
            pytest.fail("two at once")
        save(tmp_path, 1)
        assert newest(tmp_path) == 1  # who only reads needs no lock
        other.kill()
    with checkpoint.exclusive(tmp_path):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        pytest.warns(UserWarning, match="cannot be locked .No locks available.; see to it"),
        checkpoint.exclusive(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(TrainingError, match=r"file/run: cannot be written .Not a directory"),
        checkpoint.exclusive(tmp_path / "file" / "run"),
    ):
        pytest.fail("locked")
