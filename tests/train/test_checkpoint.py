"""Run states: what comes back is what was saved, and a folder that is not whole does not count."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mixtral.errors import TrainingError
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
