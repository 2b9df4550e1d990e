"""The command line without a model: table of commands, inspect, prompts, exit codes, output."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import mixtral
from mixtral.cli import app, generate, main, output
from mixtral.errors import CheckpointError, RequestError

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def test_version_is_that_of_the_project(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mixtral {mixtral.__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == mixtral.__version__


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("generate", "chat", "inspect", "serve"))


def test_every_option_has_a_help_text() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) >= {"generate", "chat", "inspect", "serve"}
    bare = [
        f"{name} {option.name}" for name, command in commands.items() for option in command.params if not option.help
    ]
    assert bare == []


def test_inspect_preset_says_the_published_numbers(capsys: Capture) -> None:
    assert main(["inspect", "8x7b"]) == 0
    text = capsys.readouterr().out
    for number in ("46,702,792,704", "12,879,925,248", "93.41 GB", "128.00 KiB", "4.00 GiB", "v1"):
        assert number in text


def test_inspect_json_is_machine_readable(capsys: Capture) -> None:
    assert main(["inspect", "8X22B", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 140_630_071_296
    assert found["kv_cache"] == {
        "bytes_per_token": 229_376,
        "context": 65536,
        "bytes_full_context": 229_376 * 65536,
    }
    assert (found["tokenizer"], found["files"], found["config"]["num_hidden_layers"]) == ("v3", {}, 56)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["generate", "--nonsense"], "--nonsense"),
        (["inspect"], "Missing argument"),
        (["generate", "--max-tokens", "many"], "--max-tokens"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mixtral: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def failing(error: BaseException) -> Callable[..., Any]:
    def describe(subject: str, *, unpickle: bool) -> None:
        raise error

    return describe


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RequestError("wrong"), 2, "mixtral: error: wrong\n"),
        (CheckpointError("two problems:\n  a\n  b"), 2, "mixtral: error: two problems: a; b\n"),
        (CheckpointError("many:\n" + "x\n" * 30), 2, "mixtral: error: many: x; x; x; x; x; and 25 more lines\n"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "mixtral: error: a/b: Permission denied\n"),
        (RequestError("a\x1b[31mb"), 2, "mixtral: error: a\\x1b[31mb\n"),
        (ZeroDivisionError("oops"), 1, "mixtral: error: internal: ZeroDivisionError: oops. "),
        (KeyboardInterrupt(), 130, ""),
        (output.PipeClosedError(), 1, ""),
    ],
)
def test_errors_become_a_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtral.cli.inspect.describe", failing(error))
    monkeypatch.setattr(output, "silence", lambda: None)
    assert main(["inspect", "8x7b"]) == code
    text = capsys.readouterr().err
    assert text.startswith(line)
    assert text.count("\n") == (1 if line else 0)


def test_debug_shows_the_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral.cli.inspect.describe", failing(RequestError("wrong")))
    assert main(["--debug", "inspect", "8x7b"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("mixtral: error: wrong\n")


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    command = f"{sys.executable} -m mixtral inspect 8x7b | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT / "src"
    )
    assert done.stderr == ""
    assert done.stdout in {"1\n", "0\n"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", ["inspect 8x7b", "inspect 8x7b --json", "--version"])
def test_a_full_disk_is_one_line(command: str) -> None:
    assert shell(f"{command} > /dev/full") == (2, "", "mixtral: error: the output: No space left on device\n")


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("--version >&-", 0, ""),
        ("inspect 8x7b >&-", 0, ""),
        ("inspect nothing 2>&-", 2, ""),
        ("inspect nothing 2>/dev/full", 2, ""),
        ("generate --model nothing <&-", 2, "mixtral: error: nothing: no such folder"),
    ],
)
def test_closed_streams_are_empty(command: str, code: int, line: str) -> None:
    found = shell(command)
    assert found[:2] == (code, "")
    assert found[2].startswith(line)
    assert found[2].count("\n") == (1 if line else 0)


def shell(command: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mixtral {command}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT / "src",
    )
    return done.returncode, done.stdout, done.stderr


def test_prompt_comes_from_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate.read_prompt("text", None) == "text"
    assert generate.read_prompt(None, "1, 2 3") == [1, 2, 3]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grüß\n".encode())))
    assert generate.read_prompt(None, None) == "grüß\n"
    with pytest.raises(RequestError, match="both given"):
        generate.read_prompt("text", "1")
    with pytest.raises(RequestError, match="--ids is '1;2'"):
        generate.read_prompt(None, "1;2")


def test_standard_input_must_be_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff")))
    with pytest.raises(RequestError, match=r"not UTF-8 \(byte 3\)"):
        generate.read_prompt(None, None)


def test_control_characters_do_not_reach_the_terminal(capsys: Capture) -> None:
    output.write("a\x1b]0;title\x07b\n\tc")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\n\tc"


def test_ask_reads_lines_and_ends(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\n\ntwo"))
    assert [output.ask("> "), output.ask("> "), output.ask("> "), output.ask("> ")] == ["one", "", "two", None]
    assert capsys.readouterr().out == ""


def test_a_person_types_lines(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    lines = iter(["one", "two"])
    seen: list[str] = []

    def typed(prompt: str) -> str:
        seen.append(prompt)
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(output, "interactive", lambda: True)
    monkeypatch.setattr("builtins.input", typed)
    assert [output.ask("> "), output.ask("> "), output.ask("> ")] == ["one", "two", None]
    assert seen == ["> ", "> ", "> "]
    assert capsys.readouterr().out == "\n"


def test_standard_input_of_a_conversation_must_be_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8", "surrogateescape"))
    output.prepare()
    with pytest.raises(RequestError, match="standard input is not UTF-8"):
        output.ask("> ")
