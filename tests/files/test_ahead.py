"""Reading ahead: a thread maps what follows, and no more; it ends when it is told to."""

from __future__ import annotations

import mmap
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral.files.ahead import ReadAhead

MB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped on demand by Linux only")


def memory_of(path: Path, size: int) -> mmap.mmap:
    path.write_bytes(bytes(range(256)) * (size // 256))
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def mapped(path: Path) -> int:
    """Bytes of a file that are in this process's page tables."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def eventually(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not what() and time.monotonic() < end:
        time.sleep(0.005)
    return what()


def running() -> bool:
    return "mixtral-read-ahead" in [thread.name for thread in threading.enumerate()]


def test_what_follows_is_mapped_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "x"
    memory, ahead = memory_of(path, 80 * MB), ReadAhead()
    try:
        assert mapped(path) == 0
        assert ahead.need(memory, 4 * MB, 10 * MB + 5)
        assert mapped(path) >= 6 * MB
        assert eventually(lambda: mapped(path) >= 38 * MB)
        time.sleep(0.05)
        assert mapped(path) <= 48 * MB
        assert ahead.release(memory, 4 * MB, 8 * MB)
        assert eventually(lambda: mapped(path) <= 40 * MB)
        assert ahead.need(memory, 60 * MB, 80 * MB)
        assert mapped(path) >= 50 * MB
        assert running()
    finally:
        ahead.close()
    assert not running()
    assert not ahead.need(memory, 0, MB)  # and it stays closed
    assert not ahead.release(memory, 0, MB)
    assert not running()


def test_what_a_reader_goes_back_to_is_mapped(tmp_path: Path) -> None:
    """To pages that were given back, and to pages that were never there; from there it goes on as before."""
    path = tmp_path / "x"
    memory, ahead = memory_of(path, 80 * MB), ReadAhead()
    try:
        assert ahead.need(memory, 40 * MB, 60 * MB)
        assert eventually(lambda: mapped(path) == 40 * MB)
        assert ahead.release(memory, 40 * MB, 20 * MB)
        assert eventually(lambda: mapped(path) == 20 * MB)
        assert ahead.need(memory, 20 * MB, 30 * MB)  # was never there
        assert mapped(path) >= 30 * MB
        assert eventually(lambda: mapped(path) == 60 * MB)  # 20 of them were given back
        assert ahead.need(memory, 0, MB)
        assert mapped(path) >= 61 * MB
        assert eventually(lambda: mapped(path) == 80 * MB)
    finally:
        ahead.close()


def test_a_piece_that_was_on_its_way_when_the_reader_went_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not count as what lies before it."""
    path = tmp_path / "x"
    memory, ahead = memory_of(path, 80 * MB), ReadAhead()
    real, wanted, done = ahead._task, threading.Event(), []

    def slow() -> object:
        task = real()
        if task is not None:
            done.append(task[1])
            if len(done) == 2:
                wanted.wait(10)  # the piece is on its way
        return task

    monkeypatch.setattr(ahead, "_task", slow)
    try:
        assert ahead.need(memory, 40 * MB, 48 * MB)
        assert eventually(lambda: len(done) == 2)
        threading.Timer(0.1, wanted.set).start()
        assert ahead.need(memory, 0, MB)
        assert done[:3] == [40 * MB, 48 * MB, 0]
    finally:
        wanted.set()
        ahead.close()


def test_a_thread_that_fails_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, ahead = memory_of(tmp_path / "a", 4 * MB), ReadAhead()

    def failing() -> None:
        raise OSError("no")

    monkeypatch.setattr(ahead, "_task", failing)
    monkeypatch.setattr(threading, "excepthook", lambda given: None)
    found: list[bool] = []
    reader = threading.Thread(target=lambda: found.append(ahead.need(memory, 0, MB)), daemon=True)
    reader.start()
    reader.join(10)
    assert found == [False]
    ahead.close()


def test_another_file_is_read_from_where_it_is_used(tmp_path: Path) -> None:
    first, second, ahead = memory_of(tmp_path / "a", 4 * MB), memory_of(tmp_path / "b", 48 * MB), ReadAhead()
    try:
        assert ahead.need(first, 0, 4096)
        assert eventually(lambda: mapped(tmp_path / "a") == 4 * MB)
        assert ahead.need(second, 40 * MB, 48 * MB)
        assert mapped(tmp_path / "b") == 8 * MB
    finally:
        ahead.close()


def test_a_file_that_became_shorter_ends_it(tmp_path: Path) -> None:
    """The reader is told that nobody reads for it, and does what it can itself."""
    memory, ahead = memory_of(tmp_path / "a", 32 * MB), ReadAhead()
    os.truncate(tmp_path / "a", 4 * MB)
    try:
        assert not ahead.need(memory, 8 * MB, 9 * MB)
        assert not ahead.need(memory, 0, MB)
    finally:
        ahead.close()


def test_without_a_reader_there_is_no_thread() -> None:
    ReadAhead().close()
    assert not running()
