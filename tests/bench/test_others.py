"""What other programs take of the processors: told apart from what the side itself takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral.bench import others
from mixtral.bench.others import Watch, share_of_others

SPIN = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.mark.parametrize(
    ("seconds", "busy", "own", "share"),
    [(10, 6, 6, 0.0), (10, 6, 1, 0.5), (10, 5.9, 6, 0.0), (10, 20, 1, 1.0), (0, 1, 0, 0.0)],
)
def test_the_share_of_others(seconds: float, busy: float, own: float, share: float) -> None:
    assert share_of_others(seconds, busy, own) == pytest.approx(share)


@linux
def test_a_busy_process_counts_as_the_side_or_as_another() -> None:
    process = subprocess.Popen([sys.executable, "-c", SPIN], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while others._group_seconds(process.pid) < 0.05 and time.monotonic() < deadline:
            time.sleep(0.02)
        side, another = Watch(process.pid), Watch(os.getpgid(0))
        enough = others._group_seconds(process.pid) + 0.2
        while others._group_seconds(process.pid) < enough and time.monotonic() < deadline:
            time.sleep(0.02)
        assert others._group_seconds(process.pid) >= enough
        as_side, as_another = side.share(), another.share()
    finally:
        process.kill()
        process.wait()
    assert as_side is not None
    assert as_another is not None
    # Both are shares of a machine that others use too: no more can be said of them.
    assert 0.0 <= as_side <= 1.0
    assert 0.0 <= as_another <= 1.0
    assert others._group_seconds(process.pid) == 0.0


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "_PROC", tmp_path)
    assert Watch(1).share() is None
    (tmp_path / "stat").write_text("cpu  1 2 x\n")
    assert Watch(1).share() is None
    (tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 2\n")
    (tmp_path / "12").mkdir()
    assert Watch(1).share() == 0.0
