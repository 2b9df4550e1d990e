"""Giving memory back: not too often, and memory that was free is gone from the process afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mixtral.engine.heap import Trimmer

# Small pieces, every hundredth of which stays: what is free between them cannot be cut off at the end of the heap.
_CHILD = """
from mixtral.engine.heap import trim
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
kept = [bytes(5000) for _ in range(20_000)][::100]
before = rss()
print(trim(), before - rss())
"""


def test_it_is_done_at_most_so_often() -> None:
    clock, calls = [0.0], []

    def call() -> bool:
        calls.append(clock[0])
        return True

    trimmer = Trimmer(10.0, clock=lambda: clock[0], call=call)
    for clock[0] in (0.0, 5.0, 9.9, 10.0, 11.0, 19.9, 20.5, 100.0, 100.0):
        trimmer.tick()
    assert calls == [10.0, 20.5, 100.0]


@pytest.mark.skipif(sys.platform != "linux", reason="the call is glibc's")
def test_free_memory_between_pieces_in_use_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True).stdout.split()
    if found[0] == "False":
        pytest.skip("this C library has no such call")
    assert int(found[1]) > 40 * 2**20
