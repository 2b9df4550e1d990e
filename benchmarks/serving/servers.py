"""The servers that can be measured: how each is started, when it is ready, what it is asked, how much processor time it
takes. Between its turns a server is stopped, so that it takes nothing from the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Kind", "Server", "ServerError", "llama_server", "ours"]

_HOST = "127.0.0.1"
_LOOK_S = 0.05


class ServerError(RuntimeError):
    """A server did not start, or ended."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A server: its name in the results, its command without the port, the route that answers 200 once it is ready,
    and what a request says beside the fields that both know."""

    name: str
    command: list[str]
    ready: str
    more: Mapping[str, Any] = field(default_factory=dict)


def ours(model: str, threads: int, options: list[str]) -> Kind:
    """``mixtral serve`` of the present interpreter."""
    command = [sys.executable, "-m", "mixtral", "serve", "--model", model, "--threads", str(threads)]
    return Kind("mixtral", [*command, *options], "/ready")


def llama_server(program: Path, model: str, threads: int, *, slots: int, context: int, options: list[str]) -> Kind:
    """llama.cpp's server with ``slots`` of ``context`` tokens each.

    Sampling is by temperature alone, as ours is asked to. What its cache of prompts would cost, and could not win with
    prompts that are all different, is spared.
    """
    command = [str(program), "-m", model, "-t", str(threads), "-tb", str(threads)]
    command += ["-np", str(slots), "-c", str(slots * context), "-b", "2048", "-cb", "--no-webui", "--cache-ram", "0"]
    return Kind("llama-server", [*command, *options], "/health", {"cache_prompt": False, "samplers": ["temperature"]})


class Server:
    """A running server. A context manager: leaving it ends the process and what it started."""

    def __init__(self, kind: Kind, *, timeout_s: float = 300.0) -> None:
        """Start it and wait until it is ready.

        Raises:
            ServerError: it cannot be started, ends, or is not ready in time.
        """
        self.kind = kind
        self.port = _free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        try:
            self._process = subprocess.Popen(
                [*kind.command, "--host", _HOST, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # it and what it starts are one group
            )
        except OSError as error:
            self._log.close()
            raise ServerError(f"{kind.command[0]} cannot be started ({error.strerror})") from None
        try:
            self._wait(time.monotonic() + timeout_s)
            self.model = str(self._get("/v1/models")["data"][0]["id"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return _HOST, self.port

    @property
    def host(self) -> str:
        """The address as the header Host has it."""
        return f"{_HOST}:{self.port}"

    @property
    def group(self) -> int:
        """The number of the process group that it and what it started are."""
        return self._process.pid

    def body(self, prompt: list[int], tokens: int, temperature: float) -> dict[str, Any]:
        """The body of a request for exactly so many tokens after the prompt."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": temperature}
        return {**body, "ignore_eos": True, **self.kind.more}

    def cpu(self) -> dict[str, float]:
        """Processor seconds so far: of the process that listens ("http"), and of those that it started ("engine")."""
        found = {"http": 0.0, "engine": 0.0}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[2]) == self._process.pid:
                part = "http" if folder.name == str(self._process.pid) else "engine"
                found[part] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found

    def pause(self) -> None:
        """Stop it until ``resume``."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and what it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _wait(self, end: float) -> None:
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(f"{self.kind.name} ended with exit code {self._process.returncode}{self._said()}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                self._get(self.kind.ready)
                return
            time.sleep(_LOOK_S)
        raise ServerError(f"{self.kind.name} was not ready in time{self._said()}")

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.host}{path}", timeout=10) as answer:
            return json.load(answer)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _said(self) -> str:
        """The last lines of its output."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return "; its last lines:\n" + "\n".join(lines[-5:]) if lines else ""


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as made:
        return int(made.getsockname()[1])
