"""``mixtral serve`` as a program of its own, with the embedded model unless told otherwise."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving import until

READY = re.compile(r"is ready: (https?://[\w.:\[\]]+) ")


@dataclass(frozen=True)
class Served:
    """A server that runs: its address, its process, and the file that holds what it wrote to standard error."""

    address: str
    process: subprocess.Popen[bytes]
    errors: Path

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self.errors.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def served(*options: str, python: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """``mixtral serve`` with these options on a free port, ready for requests; told to stop at the end.

    ``python`` are options of the interpreter; ``environment`` is added to this process's own.

    Raises:
        RuntimeError: it ended before it was ready; the message holds what it wrote.
    """
    command = [sys.executable, *python, "-m", "mixtral", "serve", "--port", "0", "--drain-timeout", "1", *options]
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        with errors.open("wb") as sink, subprocess.Popen(command, stderr=sink, env=variables) as process:
            try:
                until(lambda: bool(READY.search(errors.read_text())) or process.poll() is not None, timeout_s=180)
                found = READY.search(errors.read_text())
                if found is None:
                    raise RuntimeError(f"the server did not start: {errors.read_text()}")
                yield Served(found[1], process, errors)
            finally:
                process.terminate()
                try:
                    process.wait(timeout=60)
                finally:
                    process.kill()
