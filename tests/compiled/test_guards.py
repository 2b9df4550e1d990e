"""No kernel reads or writes a byte beyond an array: guards.py in processes of their own, which a wrong access ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral.ops.native import kernel_levels
from mixtral.quant.native import levels as encoder_levels

GUARDS = Path(__file__).parent / "guards.py"
TOO_FAR = f"""
import ctypes, runpy
made = runpy.run_path({str(GUARDS)!r})
buffer = made["Guard"](at_end=AT_END).bytes(1000)
first, behind = buffer.ctypes.data, buffer.ctypes.data + 1000
ctypes.string_at(first, 1000)
print("inside", flush=True)
ctypes.string_at(PLACE, 1)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.parametrize("level", kernel_levels())
def test_nothing_beyond_an_array_is_touched(level: str) -> None:
    encoders = encoder_levels()
    done = run(str(GUARDS), level, encoders[min(kernel_levels().index(level), len(encoders) - 1)])
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


@pytest.mark.parametrize(("at_end", "place"), [("True", "behind"), ("False", "first - 1")])
def test_a_byte_too_far_is_seen(at_end: str, place: str) -> None:
    done = run("-c", TOO_FAR.replace("AT_END", at_end).replace("PLACE", place))
    assert done.stdout == "inside\n", done.stderr
    assert done.returncode == -signal.SIGSEGV or "AddressSanitizer: SEGV" in done.stderr
