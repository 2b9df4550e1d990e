"""Sides that work, and sides that die, hang, print garbage or are missing what they need: one clear line, in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral.bench import peers
from mixtral.bench.sides import PEERS, Side, our_command, peer_command
from mixtral.errors import BenchError

FAKE = Path(__file__).parent / "fake_side.py"
PREPARE = {"do": "prepare", "work": {"steps": 2}, "prompts": []}
RUN = {"do": "run", "prompts": [[1, 2]], "fed": []}


def start(fault: str = "", log: Path | str = os.devnull, timeout_s: float = 20) -> Side:
    command = [sys.executable, str(FAKE), "fake", str(log), fault]
    return Side("llama.cpp", command, {"threads": 2}, timeout_s=timeout_s)


def test_a_side_answers_and_is_gone_afterwards() -> None:
    with start() as side:
        assert side.versions == {"fake": "1.0", "threads": "2"}
        assert side.ask(PREPARE) == {}
        assert side.ask(RUN)["seconds"] == [0.25, 0.25]
        pid, deadline = side._process.pid, time.monotonic() + 5
        while state(pid) != "T" and time.monotonic() < deadline:  # a signal takes a moment
            time.sleep(0.01)
        assert state(pid) == "T"  # between answers it is stopped
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    side.close()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def used(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_side_that_spins_takes_no_time_from_the_other() -> None:
    with start("spins") as side:
        side.ask(PREPARE)
        side.ask(RUN)
        time.sleep(0.05)  # until the signal has arrived
        before = used(side._process.pid)
        time.sleep(0.3)
        assert used(side._process.pid) == before


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("dies", r"llama.cpp: ended with exit code 1 \(its last line: something is broken\)"),
        ("killed", "llama.cpp: was killed, most likely because memory ran out; choose fewer layers"),
        ("garbage", "llama.cpp: answered b'llama_context: n_ctx = 512'; expected a JSON object"),
        ("list", r"answered b'\[1, 2\]'; expected a JSON object"),
        ("endless", "answered more than 16,777,216 bytes without the end of a line"),
        ("error", "llama.cpp: ValueError: too many tokens"),
    ],
)
def test_a_side_that_fails_is_told(fault: str, told: str) -> None:
    with start(fault) as side:
        side.ask(PREPARE)
        with pytest.raises(BenchError, match=told):
            side.ask(RUN)


def test_a_side_that_hangs_is_given_up() -> None:
    with start("hangs") as side:
        side.ask(PREPARE)
        side._timeout_s = 0.3
        started = time.monotonic()
        with pytest.raises(BenchError, match=r"llama.cpp: no answer within 0.3 s; give it more time with --timeout"):
            side.ask(RUN)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("at-start", r"llama.cpp: ended with exit code 1 \(its last line: no libraries here\)"),
        (
            "missing",
            r"llama.cpp cannot be imported by .*python.* \(No module named 'llama_cpp'\); install it there",
        ),
        ("no-ready", "llama.cpp: did not say that it is ready"),
    ],
)
def test_a_side_that_cannot_start_is_told(fault: str, told: str) -> None:
    with pytest.raises(BenchError, match=told):
        start(fault)


def test_what_a_side_started_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "sys.stdin.readline()\n"
        'print(\'{"ready": {"child": %d}}\' % child.pid, flush=True)\n'
        "sys.stdin.readline()\n"
    )
    with Side("x", [sys.executable, str(script)], {}, timeout_s=20) as side:
        child = int(side.versions["child"])
        os.kill(child, 0)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and state(child) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists() or state(child) == "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent died")
def test_a_stopped_side_does_not_outlive_us() -> None:
    code = (
        "import os, signal, sys, time\n"
        "from mixtral.bench import peers, sides\n"
        'serve = \'from mixtral.bench import peers; peers.serve(lambda s: type("S", (), {"versions": dict}))\'\n'
        "side = sides.Side('x', [sys.executable, '-c', serve], {}, timeout_s=20)\n"
        "print(side._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == -signal.SIGKILL, found.stderr
    pid, deadline = int(found.stdout), time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and state(pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists() or state(pid) == "Z"


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(BenchError, match=r"x: /nonexistent/python cannot be started \(No such file or directory\)"):
        Side("x", ["/nonexistent/python"], {}, timeout_s=1)


def interpreter(folder: Path, line: str) -> str:
    """Something that is called like a Python interpreter."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_the_commands_of_the_sides(tmp_path: Path) -> None:
    assert our_command() == [sys.executable, "-m", "mixtral.bench.ours"]
    good = interpreter(tmp_path, "exit 0")
    for name in PEERS:
        assert peer_command(name, good) == [good, peers.__file__, name]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "exit 3",
            r"vllm cannot be imported by .*/python \(No module named 'vllm'\); install it there with `pip",
        ),
        ("exit 1", "--peer-python .*/python: ended with exit code 1; expected a Python interpreter that has vllm"),
    ],
)
def test_an_interpreter_without_the_peer_is_refused(line: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=told):
        peer_command("vllm", interpreter(tmp_path, line))


def test_no_interpreter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"none: No such file or directory; expected a Python interpreter"):
        peer_command("llama.cpp", str(tmp_path / "none"))
    (tmp_path / "text").write_text("no program")
    with pytest.raises(BenchError, match=r"text: Permission denied; expected a Python interpreter"):
        peer_command("llama.cpp", str(tmp_path / "text"))
