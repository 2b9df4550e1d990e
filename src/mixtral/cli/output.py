"""Everything the command line prints. A reader that went away ends the command quietly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

__all__ = [
    "PipeClosedError",
    "ask",
    "error",
    "interactive",
    "note",
    "pairs",
    "prepare",
    "progress",
    "say",
    "silence",
    "write",
    "write_json",
]

_SHOWN_LINES = 6  # of a message with many lines
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}  # all but tab and newline


class PipeClosedError(Exception):
    """Nobody reads the output any more."""


def prepare() -> None:
    """Make the three streams fit for the commands.

    Characters that the terminal's encoding lacks become "?", input that is not text is an error, a stream that the
    caller closed is empty, and a warning is one line.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    warnings.showwarning = _show_warning


def interactive() -> bool:
    """Whether a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def write(text: str) -> None:
    """Put out text at once, without a line end. Control characters, which could drive a terminal, are spelled out."""
    _put(sys.stdout, text, end="")


def say(text: str = "") -> None:
    """Put out one line."""
    _put(sys.stdout, text)


def write_json(value: object, *, indent: int | None = None) -> None:
    """Put out one JSON value: one line, or indented."""
    _put(sys.stdout, json.dumps(value, ensure_ascii=False, indent=indent))


def note(text: str) -> None:
    """One line for the person at the terminal, on standard error, so that it does not mix with the result."""
    _put(sys.stderr, text)


def error(message: str) -> None:
    """``mixtral: error: ...`` on one line of standard error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["unknown error"]
    more = f"; and {len(lines) - _SHOWN_LINES} more lines" if len(lines) > _SHOWN_LINES else ""
    with contextlib.suppress(PipeClosedError, OSError):
        _put(sys.stderr, f"mixtral: error: {_join(lines[:_SHOWN_LINES])}{more}")


def pairs(title: str, rows: Mapping[str, str] | Sequence[tuple[str, str]]) -> None:
    """A titled table of two columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows.items() if isinstance(rows, Mapping) else rows:
        table.add_row(Text(f"  {name}"), Text(value.translate(_CONTROL), overflow="fold"))
    with _pipe():
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        console.print(Text(title, style="bold"))
        console.print(table)


def ask(prompt: str) -> str | None:
    """One line from standard input, None at its end. A person sees the prompt and can edit the line."""
    try:
        if interactive():
            return _typed(prompt)
        line = sys.stdin.readline()
    except UnicodeDecodeError as problem:
        from mixtral.errors import RequestError

        raise RequestError(f"standard input is not UTF-8 ({problem.reason}); expected UTF-8 text") from None
    return line.rstrip("\r\n") if line else None


def _typed(prompt: str) -> str | None:
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - gives `input` arrow keys and the lines typed before
    try:
        return input(prompt)
    except EOFError:
        say()
        return None


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with throughput and time left, if a person watches; it takes bytes done and in all."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def silence() -> None:
    """After ``PipeClosedError``: keep the interpreter's last flush from complaining."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    with contextlib.suppress(PipeClosedError, OSError):
        _put(sys.stderr, f"mixtral: warning: {' '.join(str(message).split())}")


def _put(stream: TextIO, text: str, *, end: str = "\n") -> None:
    with _pipe():
        print(text.translate(_CONTROL), end=end, file=stream, flush=True)


def _join(lines: Sequence[str]) -> str:
    text = lines[0]
    for line in lines[1:]:
        text += (" " if text.endswith((":", ".", ",", ";")) else "; ") + line
    return text


@contextlib.contextmanager
def _pipe() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise PipeClosedError from None
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, "the output") from None
