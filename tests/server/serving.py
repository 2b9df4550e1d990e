"""A real server over an engine process that needs no model: in a thread, or as a program of its own."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
from steps import answer

from mixtral.server import Client, Grammars, Server, ServerConfig, process, serve
from mixtral.server.keys import KeyRing
from mixtral.server.supervisor import EngineProcess, Spawn
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Start

COMMAND = (sys.executable, str(Path(__file__).with_name("steps.py")))
PATH = "/v1/completions"


def spawn(delay_s: float = 0.0, *points: str, slots: int = 8, load_s: float = 0.0, model: str | None = None) -> Spawn:
    """Starts engine processes with these failpoints."""
    name = model or f"steps:{delay_s}:{load_s}"
    return process(Start(model=name, max_num_seqs=slots, beat_s=0.05, faults=points), COMMAND)


def lives(*spawns: Spawn) -> Spawn:
    """The first start is the first of these, and so on; the last one is for all that follow."""
    left = list(spawns)
    return lambda: (left.pop(0) if len(left) > 1 else left[0])()


@contextlib.contextmanager
def serving(
    spawned: Spawn,
    config: ServerConfig | None = None,
    *,
    wait: bool = True,
    fails: bool = False,
    grammars: bool = False,
) -> Iterator[tuple[str, Client, Server]]:
    """A server in a thread: its address, its client, itself. Stopped at the end; ``fails`` expects that it fails.

    With ``grammars`` it constrains answers.
    """
    config = config or ServerConfig(port=0, drain_s=1.0)
    client = Client(spawned, config)
    server = Server(client, config, grammar=Grammars(client) if grammars else None)
    errors: list[Exception] = []

    def run() -> None:
        try:
            server.run()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: bool(server.started or errors))
        if wait:
            until(lambda: client.state == "ready" or bool(errors))
        host, port = server.servers[0].sockets[0].getsockname()[:2] if server.servers else ("none", 0)
        yield f"http://{host}:{port}", client, server
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        if thread.is_alive():
            raise TimeoutError("the server did not stop")
    if errors and not fails:
        raise errors[0]


@contextlib.contextmanager
def program(
    *points: str,
    delay_s: float = 0.0,
    config: dict[str, Any] | None = None,
    files: int | None = None,
    keys: Path | None = None,
    stderr: int | IO[str] | None = subprocess.PIPE,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server as a program: its address and its process, which is killed at the end if it still runs.

    ``files`` is the most that it may have open, ``keys`` a file of keys.
    """

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    settings = {"port": 0, **(config or {})}
    path = None if keys is None else str(keys)
    told = json.dumps({"delay_s": delay_s, "points": points, "config": settings, "keys": path})
    command = [sys.executable, __file__, told]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, preexec_fn=limit)
    try:
        if running.stdout is None:
            raise RuntimeError("no pipe")
        address = running.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the server did not start: {running.stderr.read() if running.stderr else ''}")
        yield address, running
    finally:
        running.kill()
        running.communicate()


def complete(address: str, prompt: list[int], max_tokens: int = 20, **fields: Any) -> httpx.Response:
    """One completion of token ids."""
    body = {"model": "steps", "prompt": prompt, "max_tokens": max_tokens, **fields}
    with httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        return client.post(address + PATH, json=body)


def expected(prompt: list[int], count: int) -> str:
    """The text of the answer to a prompt."""
    tokenizer = Tokenizer.from_version("v3")
    return b"".join(tokenizer.token_bytes(id) for id in answer(prompt, count)).decode("utf-8", "replace")


def engine_pid(client: Client) -> int:
    """The process of the engine that runs now."""
    worker = client.supervisor.worker
    if not isinstance(worker, EngineProcess):
        raise RuntimeError("no engine process runs")
    return worker.pid


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[1] == str(pid) and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return as soon as ``condition`` holds; TimeoutError if it never does."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)


def _main(told: dict[str, Any]) -> int:
    from mixtral import log

    keys = None if told["keys"] is None else KeyRing.load(Path(told["keys"]))
    config = ServerConfig(**told["config"], keys=keys)
    client = Client(spawn(told["delay_s"], *told["points"]), config)
    with log.started("text"):
        serve(client, config, on_ready=lambda address: os.write(1, f"{address}\n".encode()) and None)
    return 0


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1])))
