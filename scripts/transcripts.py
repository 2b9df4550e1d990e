"""Runs the examples of docs/clients.md against a server and writes what comes back. Run: python scripts/transcripts.py

A block marked ``sh`` or ``python`` with a block marked ``output`` after it is an example. Examples run in one empty
folder, one after the other; http://127.0.0.1:8000 in them stands for the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ADDRESS",
    "PAGE",
    "Example",
    "can_run_node",
    "compared",
    "examples",
    "main",
    "run_example",
    "with_outputs",
    "workplace",
]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "clients.md"
ADDRESS = "http://127.0.0.1:8000"
_EXAMPLE = re.compile(r"```(sh|python)\n(.*?)```\n```output\n(.*?)```\n", re.DOTALL)
# What is another one each time.
_VOLATILE = (
    (re.compile(r"\b(chatcmpl|cmpl)-[0-9a-f]{32}"), r"\1-ID"),
    (re.compile(r'("created": ?)\d+'), r"\g<1>0"),
    (re.compile(r"\bfp_[0-9a-f]{16}"), "fp_ID"),
    (re.compile(r"http://127\.0\.0\.1:\d+"), ADDRESS),
)


@dataclass(frozen=True)
class Example:
    """One example: its language, what is run, and what the page says comes back."""

    language: str
    text: str
    output: str

    @property
    def needs_node(self) -> bool:
        """Whether it runs JavaScript, with the package ``openai`` in the checkout's ``node_modules``."""
        return self.text.startswith("node ")


def examples(page: str) -> list[Example]:
    """All examples of a page."""
    return [Example(*match.groups()) for match in _EXAMPLE.finditer(page)]


def with_outputs(page: str, outputs: Sequence[str]) -> str:
    """The page with these outputs, one for each example."""
    left = iter(outputs)
    return _EXAMPLE.sub(lambda match: f"```{match[1]}\n{match[2]}```\n```output\n{next(left)}```\n", page)


def compared(output: str) -> str:
    """An output without what is another one each time: numbers, and where a stream of text is cut into events."""
    return re.sub(r"(?:^data: \{.*\n\n?)+", _as_one_event, _without_numbers(output), flags=re.MULTILINE)


def _without_numbers(output: str) -> str:
    for pattern, replacement in _VOLATILE:
        output = pattern.sub(replacement, output)
    return output


def _as_one_event(events: re.Match[str]) -> str:
    # A server that is behind sends the tokens that are there together.
    first, *others = [json.loads(line.removeprefix("data: ")) for line in events[0].split("\n") if line]
    for event in others:
        assert len(event["choices"]) == 1, "several choices would have to be joined one by one"
        event["choices"][0]["text"] = first["choices"][0]["text"] + event["choices"][0]["text"]
        first = event
    return f"data: {json.dumps(first, separators=(',', ':'))}\n\n"


def can_run_node() -> bool:
    """Whether examples in JavaScript can be run here."""
    return shutil.which("node") is not None and (ROOT / "node_modules" / "openai").is_dir()


@contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder in which examples can be run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "scripts" / "clients" / "openai.mjs", folder)
        if (ROOT / "node_modules").is_dir():
            (folder / "node_modules").symlink_to(ROOT / "node_modules")
        yield folder


def run_example(example: Example, address: str, folder: Path, before: Sequence[str] = ()) -> str:
    """What an example prints. ``before`` stands between the interpreter and a Python program.

    Raises:
        RuntimeError: it ended with an error.
    """
    text = example.text.replace(ADDRESS, address)
    if example.language == "python":
        script = folder / "example.py"
        script.write_text(text, encoding="utf-8")
        command = [sys.executable, *before, str(script)]
    else:
        command = ["bash", "-c", text]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["HF_HOME"] = str(folder / "cache")
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode} of\n{text}\n{done.stdout}\n{done.stderr}")
    # One line each, without what editors take away at the ends of lines.
    return "".join(f"{line.rstrip()}\n" for line in _without_numbers(done.stdout).rstrip("\n").split("\n"))


def main(argv: Sequence[str]) -> int:
    """Write the outputs anew; the argument is the address of a server with the embedded model."""
    address = argv[0] if argv else ADDRESS
    try:
        urllib.request.urlopen(f"{address}/ready", timeout=10).close()
    except OSError as error:
        sys.stderr.write(f"{address}/ready: {error}; start `mixtral serve` and wait until it says that it is ready\n")
        return 2
    page = PAGE.read_text(encoding="utf-8")
    outputs = []
    with workplace() as folder:
        for example in examples(page):
            skipped = example.needs_node and not can_run_node()
            if skipped:
                sys.stderr.write("JavaScript is left as it is: npm install --no-save openai\n")
            outputs.append(example.output if skipped else run_example(example, address, folder))
    PAGE.write_text(with_outputs(page, outputs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
