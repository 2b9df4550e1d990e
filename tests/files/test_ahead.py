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
        assert ahead.need(memory, 0, MB)  # going back is allowed, and maps nothing
        assert running()
    finally:
        ahead.close()
    assert not running()
    assert not ahead.need(memory, 0, MB)  # and it stays closed
    assert not ahead.release(memory, 0, MB)
    assert not running()


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
