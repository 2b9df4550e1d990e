"""Options of ``mixtral serve``: familiar ones work or say what to do, sizes are read, and faults have exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from mixtral.cli import main
from mixtral.cli.serve import _FOREIGN
from mixtral.cli.serving import read_adapters, read_bytes
from mixtral.errors import ConfigError

SERVER = Path(__file__).resolve().parents[1] / "server"
# The command, with the engine process of the tests in place of the real one.
PROGRAM = f"""
import functools, sys
sys.path.insert(0, {str(SERVER)!r})
import mixtral.server
from serving import COMMAND
mixtral.server.process = functools.partial(mixtral.server.process, command=COMMAND)
from mixtral.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("option", [*_FOREIGN, "--no-enable-chunked-prefill", "--swap-space=4"])
def test_options_of_other_servers_say_what_to_do(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", option, "4"]) == 2
    shown = capsys.readouterr().err
    name = option.split("=")[0]
    assert shown.startswith(f"mixtral: error: {name} is an option of another server: ")
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nonsense"], "No such option"),
        (["nonsense"], "No such option or argument"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is 2"),
        (["--gpu-memory-utilization", "0.9"], "--kv-cache-memory"),
        (["--kv-cache-memory", "much"], "expected a size such as 4G"),
        (["--log-format", "xml"], "expected text or json"),
        (["--port", "70000"], "port is 70000"),
        (["--max-num-seqs", "x"], "--max-num-seqs"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter a=y: the name 'a' is given twice"),
        (["--adapter", "a=x", "--adapter", "y"], "--adapter y: there are several adapters; expected NAME=PATH"),
        (["--adapter", "x", "--adapter", "a=y"], "--adapter x: there are several adapters; expected NAME=PATH"),
        (["--adapter", "=x"], "--adapter =x: expected NAME=PATH, or PATH alone"),
        (["--adapter", "a="], "--adapter a=: expected NAME=PATH, or PATH alone"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *options]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("mixtral: error: ")
    assert says in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("4k", 4096), ("4K", 4096), ("2M", 2**21), ("2MiB", 2**21), ("3 GB", 3 * 2**30), ("1t", 2**40)],
)
def test_sizes_are_read(text: str, value: int) -> None:
    assert read_bytes("--x", text) == value


def test_adapters_are_read() -> None:
    here = Path.cwd()
    assert read_adapters([]) == (None, {})
    assert read_adapters(["runs/a"]) == (str(here / "runs/a"), {})
    assert read_adapters(["./r=8"]) == (str(here / "r=8"), {})
    named = {"a": str(here / "runs/a"), "b": "/x/r=8"}
    assert read_adapters(["a=runs/a", "b=/x/r=8"]) == (None, named)
    assert list(read_adapters(["b=x", "a=y"])[1]) == ["b", "a"]


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "4X", "4GG", "0x10", "٤", "1" * 30])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        read_bytes("--x", text)


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", "--port", "0", *options], stderr=subprocess.PIPE, text=True
    )


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_2() -> None:
    with start("--model", "broken") as process:
        assert process.wait(timeout=60) == 2
        assert process.stderr is not None
        assert process.stderr.read() == "mixtral: error: there is no model 'broken'\n"


@pytest.mark.slow
def test_an_engine_that_ends_again_and_again_is_exit_code_70() -> None:
    with start("--model", "steps") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("steps is ready: http://127.0.0.1:")
        address = line.split()[3]
        for death in range(3):
            end = time.monotonic() + 60
            while httpx.get(address + "/ready").status_code != 200 and time.monotonic() < end:
                time.sleep(0.05)
            (engine,) = _children(process.pid)
            os.kill(engine, signal.SIGKILL)
            if death < 2:
                while httpx.get(address + "/ready").status_code == 200:
                    time.sleep(0.005)
        assert process.wait(timeout=60) == 70
        *log, last = process.stderr.read().splitlines()
        assert last.startswith("mixtral: error: the engine ended 3 times")
        assert any("death 3 of at most 3" in each for each in log)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_log_lines_may_be_json() -> None:

    with start("--model", "steps", "--log-format", "json") as process:
        assert process.stderr is not None
        address = process.stderr.readline().split()[3]
        httpx.get(address + "/v1/models", headers={"x-request-id": "mine"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        (line,) = process.stderr.read().splitlines()
    found = json.loads(line)
    assert {found[key] for key in ("request", "method", "path", "status")} == {"mine", "GET", "/v1/models", 200}
