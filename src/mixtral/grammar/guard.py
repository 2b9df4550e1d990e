"""Tries grammars of clients where they can do no harm, before an engine compiles them."""

from __future__ import annotations

import hashlib
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mixtral.errors import BusyError, GrammarError, MixtralError
from mixtral.grammar.source import Kind, Source
from mixtral.grammar.trial import read_message, write_message
from mixtral.tokenizer import Tokenizer

__all__ = ["Guard", "Limits"]

_START_SECONDS = 60.0
_GRACE_SECONDS = 0.5  # that a worker may take beyond the time of a trial
_CODES: dict[Kind, str] = {
    "schema": "schema_invalid",
    "regex": "regex_invalid",
    "grammar": "grammar_invalid",
    "choice": "grammar_invalid",
}
_TOO_COMPLEX = re.compile(
    r"too (?:large|complex|many|big|deep)|fuel|recursion limit|limit exceeded|max is", re.IGNORECASE
)
_UNSUPPORTED = re.compile(r"not supported|only supported|not disjoint|unable to determine|oneOf", re.IGNORECASE)
_QUOTED = re.compile(r'"[^"]*"|/[^/]*/')
# Parts of the library's messages that tell a client nothing: places in our text and excerpts of it.
_NOISE = re.compile(r"\n +\d+ \|.*|<non-verbose/>|\(in regex\): ", re.DOTALL)
_PLACE = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a trial may use. ``stack_bytes`` is half of what any thread of an engine has."""

    seconds: float = 2.0
    memory_bytes: int = 1024 * 1024 * 1024
    stack_bytes: int = 1024 * 1024
    cache_bytes: int = 1024 * 1024


class Guard:
    """Says of a grammar whether an engine may compile it. One for each vocabulary; may be shared between threads.

    A grammar is compiled, and a few answers are begun, in a child process that dies with it if it is hostile. What was
    found is remembered by the hash of the grammar, except that a trial took too long. Trials wait for one of
    ``workers`` processes, which start with the first trials or by ``start``; ``check`` blocks, so call it from a
    thread.
    """

    def __init__(self, tokenizer: Tokenizer, *, workers: int = 2, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        respell = {str(id): list(others) for id, others in tokenizer.respell.items()}
        hello = {"version": tokenizer.version, "respell": respell, "limits": _as_dict(self._limits)}
        self._workers = [_Worker(hello, self._limits.seconds) for _ in range(workers)]
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._known_bytes = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the processes now. Call it before the first ``check``. Raises MixtralError if one does not start."""
        for worker in self._workers:
            worker.start()

    def check(self, source: Source, *, wait_s: float = 4.0) -> None:
        """Return if the grammar can be used.

        Raises:
            GrammarError: it cannot; with the code and the ``param`` of what the client gave.
            BusyError: no process was free within ``wait_s``.
        """
        key = hashlib.sha256(source.text.encode()).digest()
        with self._lock:
            known = key in self._known
            reason = self._known.get(key)
            if known:
                self._known.move_to_end(key)
        if not known:
            outcome = self._try(source.text, wait_s)
            if "died" in outcome:
                raise _refusal(source, "grammar_too_complex", f"costs too much: {outcome['died']}")
            reason = None if outcome["reason"] is None else _plain(outcome["reason"])
            self._remember(key, reason)
        if reason is not None:
            raise _refusal(source, _code(source.kind, reason), f"cannot be used: {reason}")

    @property
    def cache_bytes(self) -> int:
        """Memory of what is remembered."""
        return self._known_bytes

    def pids(self) -> list[int]:
        """The processes that run now."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def close(self) -> None:
        """End the processes. A later ``check`` starts them anew."""
        for worker in self._workers:
            worker.stop()

    def _try(self, text: str, wait_s: float) -> dict[str, Any]:
        try:
            worker = self._free.get(timeout=wait_s)
        except queue.Empty:
            raise BusyError(
                f"grammars of other requests are being tried; none of {len(self._workers)} processes was free "
                f"within {wait_s:g} s. Try again"
            ) from None
        try:
            # A process that was killed from outside is no fault of this grammar; one that dies twice is.
            return worker.ask(text) or worker.ask(text) or {"died": "the process that tried it died"}
        finally:
            self._free.put(worker)

    def _remember(self, key: bytes, reason: str | None) -> None:
        with self._lock:
            if key not in self._known:
                self._known[key] = reason
                self._known_bytes += _size(reason)
            while self._known_bytes > self._limits.cache_bytes and len(self._known) > 1:
                self._known_bytes -= _size(self._known.popitem(last=False)[1])


class _Worker:
    """One process that tries grammars, started when it is needed. Used by one thread at a time."""

    def __init__(self, hello: dict[str, Any], seconds: float) -> None:
        self._hello = hello
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, text: str) -> dict[str, Any] | None:
        """The outcome of a trial; None if the process died or hung, which ends it."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        return self._exchange({"text": text}, self._seconds + _GRACE_SECONDS)

    @property
    def pid(self) -> int | None:
        """The process, if it was started."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def start(self) -> None:
        """Start the process anew. Raises MixtralError if it does not answer."""
        self.stop()
        # Nothing of our environment is handed on; the path of modules is.
        code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from mixtral.grammar.trial import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the library tells there what is told in answers already
            bufsize=0,
            env={"OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
        )
        if self._exchange(self._hello, _START_SECONDS) is None:
            raise MixtralError("the process that tries grammars does not start")

    def _exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        end = time.monotonic() + seconds
        try:
            write_message(process.stdin.fileno(), message, end)
            answer = read_message(process.stdout.fileno(), end)
        except OSError:  # a TimeoutError is one
            answer = None
        if not isinstance(answer, dict):
            self.stop()
            return None
        return answer


def _code(kind: Kind, reason: str) -> str:
    bare = _QUOTED.sub("", reason)  # without what the client wrote
    if _TOO_COMPLEX.search(bare):
        return "grammar_too_complex"
    if kind == "schema" and _UNSUPPORTED.search(bare):
        return "schema_unsupported"
    return _CODES[kind]


def _plain(reason: str) -> str:
    """The library's message without what concerns our text instead of the client's."""
    if "NoExtension" in reason:
        return "it allows no text at all"
    if "oneOf constraints" in reason:
        return "options of oneOf are not seen to exclude each other, which is not supported; use anyOf"
    if "regex parse error:" in reason:
        return f"the regular expression is wrong: {_NOISE.sub('', reason).rpartition('error: ')[2].strip()}"
    plain = _NOISE.sub("", reason)
    if plain.startswith("at 1(8): "):  # of `start: `, which we wrote, unless the client has such a line
        plain = _PLACE.sub("", plain)
    return " ".join(plain.split())


def _refusal(source: Source, code: str, what: str) -> GrammarError:
    return GrammarError(f"{source.param} {what}", param=source.param, code=code)


def _size(reason: str | None) -> int:
    return 128 + len(reason or "")


def _as_dict(limits: Limits) -> dict[str, Any]:
    return {"seconds": limits.seconds, "memory_bytes": limits.memory_bytes, "stack_bytes": limits.stack_bytes}
