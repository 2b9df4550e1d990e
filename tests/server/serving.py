"""A real server in a thread, over an engine process that needs no model; and a person who waits."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtral.server import Server, ServerConfig
from mixtral.server.client import Client
from mixtral.server.supervisor import Spawn, process
from mixtral.wire import Start

COMMAND = (sys.executable, str(Path(__file__).with_name("steps.py")))


def spawn(delay_s: float = 0.0, *points: str, slots: int = 8, model: str | None = None) -> Spawn:
    """Starts engine processes with these failpoints."""
    start = Start(model=model or f"steps:{delay_s}", max_num_seqs=slots, beat_s=0.05, faults=points)
    return process(start, COMMAND)


@contextlib.contextmanager
def serving(
    spawned: Spawn, config: ServerConfig | None = None, *, wait: bool = True
) -> Iterator[tuple[str, Client, Server]]:
    """A real server over an engine process, in a thread: its address, its client, itself. Stopped at the end."""
    config = config or ServerConfig(port=0, drain_s=1.0)
    client = Client(spawned, config)
    addresses: list[str] = []
    ready = threading.Event()

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    server = Server(client, config, on_ready)
    errors: list[Exception] = []

    def run() -> None:
        try:
            server.run()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if wait and not ready.wait(timeout=20):
            raise TimeoutError("the server did not become ready")
        yield addresses[0] if addresses else "", client, server
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        if thread.is_alive():
            raise TimeoutError("the server did not stop")


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return as soon as ``condition`` holds; TimeoutError if it never does."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)
