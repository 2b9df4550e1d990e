"""The process that tries grammars: for each one it forks a child with little time, memory and stack, and reports.

It reads and writes messages on its standard input and output: 4 bytes of length, then JSON. The first one tells the
vocabulary and the limits; each further one is a grammar, answered by what became of it. It ends with its input.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from typing import Any

import numpy as np

from mixtral.errors import MixtralError
from mixtral.grammar.mask import Grammar
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint
from mixtral.wire.child import confine

__all__ = ["attempt", "read_message", "write_message"]

STEPS = 64
_MESSAGE_BYTES = 16 * 1024 * 1024
_REASON = 500  # characters that are told of an error


def attempt(grammar: Grammar, text: str) -> str | None:
    """Compile a grammar and write masks for random answers; the reason it cannot be used, or None."""
    random = np.random.default_rng(0)
    words = np.zeros(-(-grammar.tokenizer.vocab_size // 32), dtype=np.uint32)
    try:
        matcher = grammar.matcher(Constraint(text=text))
        for _ in range(STEPS):
            matcher.mask(words)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            others = allowed[allowed != grammar.tokenizer.eos_id]
            matcher.advance(int(random.choice(others if len(others) else allowed)))
            if matcher.finished:
                matcher = grammar.matcher(Constraint(text=text))
    except MixtralError as error:
        return str(error)[:_REASON]
    return None


def read_message(file: int, end: float | None = None) -> Any | None:
    """The next message, or None at the end of the input. TimeoutError if it is not there at ``end`` (monotonic)."""
    head = _read(file, 4, end)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "big")
    if size > _MESSAGE_BYTES:
        return None
    body = _read(file, size, end)
    return json.loads(body) if len(body) == size else None


def write_message(file: int, message: object, end: float | None = None) -> None:
    """Send a message. Raises OSError if nobody reads, TimeoutError if it is not sent at ``end`` (monotonic)."""
    body = json.dumps(message).encode()
    waiting = memoryview(len(body).to_bytes(4, "big") + body)
    while waiting:
        _wait(end, write=file)
        # A pipe that can be written to takes this much at once.
        waiting = waiting[os.write(file, waiting[: select.PIPE_BUF]) :]


def _read(file: int, size: int, end: float | None) -> bytes:
    found = bytearray()
    while len(found) < size:
        _wait(end, read=file)
        if not (part := os.read(file, size - len(found))):
            break
        found += part
    return bytes(found)


def _wait(end: float | None, *, read: int | None = None, write: int | None = None) -> None:
    # Not select.select: a server with many connections has descriptors that it cannot take.
    one = select.poll()
    if read is not None:
        one.register(read, select.POLLIN)
    if write is not None:
        one.register(write, select.POLLOUT)
    if not one.poll(None if end is None else max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError("the other process does not answer")


def _child(grammar: Grammar, text: str, limits: dict[str, Any], file: int) -> None:
    """Runs in the child and never returns. Its limits hold from here on, the stack's too."""
    confine()
    seconds = int(limits["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_STACK, (limits["stack_bytes"], limits["stack_bytes"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    write_message(file, {"reason": attempt(grammar, text)})


def _try(grammar: Grammar, text: str, limits: dict[str, Any]) -> dict[str, Any] | None:
    """Fork a child for one grammar; what it wrote, or what killed it. None if our own input ended meanwhile."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _child(grammar, text, limits, writing)
        finally:
            os._exit(0)
    os.close(writing)
    end = time.monotonic() + limits["seconds"]
    try:
        while True:
            ready, _, _ = select.select([reading, 0], [], [], max(0.0, end - time.monotonic()))
            if reading in ready:
                return read_message(reading, end + 1) or {"died": "it crashed, or needed more memory than it may have"}
            if not ready:
                return {"died": f"it took longer than {limits['seconds']:g} s"}
            return None  # the other side speaks only between trials, so this is its end
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main() -> None:
    """Serve trials until the input ends."""
    confine(dies_with_starter=False)  # that is a thread, which may end; the end of the input is what counts
    start = read_message(0)
    if start is None:
        return
    respell = {int(id): tuple(others) for id, others in start["respell"].items()}
    grammar = Grammar(Tokenizer.from_version(start["version"], respell=respell))
    write_message(1, {"ready": True})
    while (message := read_message(0)) is not None:
        outcome = _try(grammar, message["text"], start["limits"])
        if outcome is None:
            return
        write_message(1, outcome)
