"""Ranks start together and end together."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import pytest

from mixtral.errors import TrainingError
from mixtral.parallel.launch import launch

SAY = """
import os, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
store = Path(os.environ["MIXTRAL_STORE"]).parent
(folder / f"rank{rank}").write_text(f"{os.environ['WORLD_SIZE']} {os.environ['LOCAL_RANK']} {store.stat().st_mode:o}")
"""
WAIT = (
    SAY
    + """
import signal
def end(number, frame):
    (folder / f"asked{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
(folder / f"ready{rank}").touch()
time.sleep(60)
"""
)


def command(text: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", text, str(folder)]


def test_every_rank_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = SAY + "assert store.parent == folder and store.name.startswith('mixtral-ranks-')"
    launch(command(text, tmp_path), 3)
    # And nothing else: the folder through which they met is gone.
    found = sorted((path.name, path.read_text()) for path in tmp_path.iterdir())
    assert found == [(f"rank{rank}", f"3 {rank} 40700") for rank in range(3)]


@pytest.mark.parametrize(
    ("fault", "says"), [("sys.exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", "signal SIGKILL")]
)
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, fault: str, says: str) -> None:
    begin = time.monotonic()
    text = WAIT.replace("time.sleep(60)", f"{fault} if rank == 1 and (time.sleep(0.5) or True) else time.sleep(60)")
    with pytest.raises(TrainingError, match=f"rank 1 of 2 ended with {says}"):
        launch(command(text, tmp_path), 2)
    assert (tmp_path / "asked0").exists()
    assert time.monotonic() - begin < 30


def test_a_rank_that_does_not_end_is_killed(tmp_path: Path) -> None:
    text = SAY + "\nimport signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    text += "(folder / f'ready{rank}').touch()\nsys.exit(3) if rank == 1 else time.sleep(60)"
    with pytest.raises(TrainingError, match="rank 1 of 2 ended with exit code 3"):
        launch(command(text, tmp_path), 2, grace_s=0.2)


def test_stopping_asks_every_rank_once(tmp_path: Path) -> None:
    def ready() -> bool:
        return all((tmp_path / f"ready{rank}").exists() for rank in range(2))

    launch(command(WAIT, tmp_path), 2, stopping=ready)
    assert {f"asked{rank}" for rank in range(2)} <= {path.name for path in tmp_path.iterdir()}
