"""The life of an engine behind a channel: messages in, a step, its updates out; in a process or a thread of its own."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from mixtral import faults
from mixtral.engine.heap import Trimmer
from mixtral.errors import MixtralError
from mixtral.wire import (
    Abort,
    Channel,
    ChannelClosedError,
    Done,
    Failed,
    Heartbeat,
    Hello,
    Pause,
    Scheduled,
    Stats,
    Submit,
    ToEngine,
    Tokens,
    Update,
    frames_of,
)

__all__ = ["Engine", "EngineThread", "Loop", "merged", "run"]

_log = logging.getLogger("mixtral.engine")
_STEP_FAILED = "the engine failed while it worked on this request; it is started again"


class Engine(Protocol):
    """What a loop drives. One thread calls it."""

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        ...

    def submit(self, submit: Submit) -> None:
        """Take a request in. Raises MixtralError for one that can never run."""
        ...

    def abort(self, request: str, sequence: int | None = None) -> None:
        """Forget a request, or one sequence of it; what is unknown or finished is left alone."""
        ...

    def pause(self, request: str, *, on: bool) -> None:
        """Stop working on a request, or go on with it; what is unknown or finished is left alone."""
        ...

    def step(self, begin: Callable[[set[str]], None] | None = None) -> list[Update]:
        """Work on some requests, of which ``begin`` is told before, and say what came of it. What it raises ends the
        engine."""
        ...

    def stats(self) -> Stats:
        """Counters, and what it holds now."""
        ...


Build = Callable[[], tuple[Engine, Hello]]


def run(channel: Channel[ToEngine], build: Build, *, beat_s: float = 1.0) -> int:
    """Build an engine and serve it until the other side closes the channel; returns an exit code.

    0: closed by the other side. 1: the engine failed, and every open request was told so. 2: it cannot be built, and
    the reason was sent as a ``Failed`` of no request.
    """
    try:
        try:
            engine, hello = build()
        except MixtralError as error:
            channel.send([Failed(request="", code=error.code, message=str(error), param=error.param)])
            return 2
        channel.send([hello])
        return Loop(engine, channel, beat_s=beat_s).run()
    except ChannelClosedError:
        return 0


class Loop:
    """Drives one engine. Between steps it takes all messages that came; without work it waits for one."""

    def __init__(self, engine: Engine, channel: Channel[ToEngine], *, beat_s: float = 1.0) -> None:
        self._engine = engine
        self._channel = channel
        self._beat_s = beat_s
        self._open: set[str] = set()
        self._scheduled: set[str] = set()  # what was told last
        self._new: dict[str, list[list[int]]] = {}  # prompts that no step worked on yet; for failpoints
        self._lock = threading.Lock()  # guards what the heartbeat reads:
        self._step = 0
        self._began: float | None = None  # the present step
        self._seconds: list[float] = []
        self._stats = engine.stats()
        self._counted = time.monotonic()
        self._trimmer = Trimmer()
        self._ended = threading.Event()

    def run(self) -> int:
        """Serve until the channel is closed (returns 0) or a step fails (returns 1)."""
        pulse = threading.Thread(target=self._beat, name="mixtral-heartbeat", daemon=True)
        pulse.start()
        try:
            while True:
                busy = self._engine.has_work
                if not busy:
                    self._count()
                for message in self._channel.receive(wait=not busy):
                    self._take(message)
                if self._engine.has_work:
                    self._send(self._do_step())
                    self._trimmer.tick()
        except ChannelClosedError:
            return 0
        except Exception:
            _log.exception("the engine ends: a step failed")
            self._fail_all()
            return 1
        finally:
            self._ended.set()
            pulse.join()

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Abort):
            if message.sequence is None:
                self._open.discard(message.request)
                self._new.pop(message.request, None)
            self._engine.abort(message.request, message.sequence)
            return
        if isinstance(message, Pause):
            self._engine.pause(message.request, on=message.on)
            return
        if not isinstance(message, Submit) or message.request in self._open:
            raise RuntimeError(f"unexpected message {type(message).__name__} to a running engine")
        self._open.add(message.request)
        try:
            self._engine.submit(message)
        except MixtralError as error:
            self._send([Failed(request=message.request, code=error.code, message=str(error), param=error.param)])
            return
        if faults.installed():
            self._new[message.request] = message.prompts

    def _do_step(self) -> list[Update]:
        began = time.monotonic()
        with self._lock:
            self._step += 1
            self._began = began
        faults.act(self._step)
        updates = self._engine.step(self._begin)
        now = time.monotonic()
        with self._lock:
            self._began = None
            self._seconds.append(now - began)
        if now - self._counted >= self._beat_s / 2:
            self._count()
        return merged(updates)

    def _begin(self, requests: set[str]) -> None:
        """Say what a step works on, in time for whoever asks what was running when this process ended."""
        self._scheduled &= self._open
        if self._scheduled != requests:
            self._scheduled = requests
            self._channel.send([Scheduled(requests=sorted(requests))])
        faults.act(0, [prompt for each in requests for prompt in self._new.pop(each, ())])

    def _send(self, updates: list[Update]) -> None:
        self._open.difference_update(each.request for each in updates if isinstance(each, Done | Failed))
        self._channel.send(updates)
        kind = faults.channel_fault()
        if kind is not None and any(isinstance(each, Tokens) for each in updates):
            whole = frames_of(updates)
            self._channel.send_bytes({"short": whole[: len(whole) // 2], "garbage": b"\xff" * 64}.get(kind, b""))
            self._channel.close()

    def _count(self) -> None:
        stats = self._engine.stats()
        self._counted = time.monotonic()
        with self._lock:
            self._stats = stats

    def _beat(self) -> None:
        try:
            while not self._ended.is_set():
                self._channel.send([self._heartbeat()])
                self._ended.wait(self._beat_s)
        except ChannelClosedError:
            return  # the other thread finds out by itself

    def _heartbeat(self) -> Heartbeat:
        with self._lock:
            age = 0.0 if self._began is None else time.monotonic() - self._began
            seconds, self._seconds = self._seconds, []
            return Heartbeat(step=self._step, step_age=age, stats=self._stats, seconds=seconds)

    def _fail_all(self) -> None:
        ends = [Failed(request=each, code="engine_dead", message=_STEP_FAILED) for each in sorted(self._open)]
        try:
            self._channel.send(ends)
        except ChannelClosedError:
            _log.error("%d requests could not be told", len(ends))


class EngineThread:
    """An engine in a thread of this process, seen from the other end of the channel, like a process.

    ``sock`` is that end. The thread ends when it is closed; it cannot be stopped in the middle of a step.
    """

    def __init__(self, build: Build, *, beat_s: float = 1.0) -> None:
        self.sock, other = socket.socketpair()
        self._channel: Channel[ToEngine] = Channel(other, ToEngine)
        self._code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(build, beat_s), name="mixtral-engine", daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return None if self._thread.is_alive() else self._code

    def kill(self) -> None:
        """End it after the step it is in."""
        self._channel.close()

    def wait(self, timeout_s: float) -> int | None:
        """``poll``, as soon as it ends or after ``timeout_s``."""
        self._thread.join(timeout_s)
        return self.poll()

    def _run(self, build: Build, beat_s: float) -> None:
        code = 1
        try:
            code = run(self._channel, build, beat_s=beat_s)
        except Exception:
            _log.exception("the engine cannot be built")
        finally:
            self._code = code
            self._channel.close()


def merged(updates: Iterable[Update]) -> list[Update]:
    """The same updates with consecutive tokens of a request in one message; the order within a request stays."""
    out: list[Update] = []
    last: dict[str, int] = {}  # request -> place of its last message
    for update in updates:
        place = last.get(update.request)
        before = None if place is None else out[place]
        if place is not None and isinstance(update, Tokens) and isinstance(before, Tokens):
            out[place] = Tokens(request=update.request, events=[*before.events, *update.events])
        else:
            last[update.request] = len(out)
            out.append(update)
    return out
