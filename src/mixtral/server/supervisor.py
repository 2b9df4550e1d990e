"""Starts the engine process, watches it, and starts it again when it dies or stands still, a few times."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from mixtral.errors import ConfigError, EngineError, MixtralError
from mixtral.server.config import ServerConfig
from mixtral.server.engine import State
from mixtral.wire import Channel, ChannelError, Failed, Frames, FromEngine, Heartbeat, Hello, Scheduled, Start, Update

__all__ = ["EXHAUSTED", "EngineProcess", "Link", "Owner", "Spawn", "Supervisor", "Worker", "process"]

_log = logging.getLogger("mixtral.server")
_TICK_S = 0.25
_PAUSES_S = (0.1, 1.0, 3.0)  # before a restart, by recent deaths
_EXHAUSTED_S = 1.0  # before another try, when the system had no room for a process
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})  # no files or memory left
_GRACE_S = 1.0  # for an engine that noticed the end of its channel, to write its last lines
_END_S = 5.0


class Worker(Protocol):
    """A running engine: a process, or a thread that looks like one. ``sock`` is this side of its channel."""

    @property
    def sock(self) -> socket.socket: ...

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        ...

    def kill(self) -> None:
        """End it at once, or as soon as possible. May be called again."""
        ...


Spawn = Callable[[], Worker]


class Owner(Protocol):
    """Who is told what happens, in the event loop."""

    def on_hello(self, hello: Hello) -> None:
        """An engine takes requests from now on. Raises EngineError if it cannot be used."""
        ...

    def on_beat(self, beat: Heartbeat) -> None:
        """What the engine counts, about once a second."""
        ...

    def on_scheduled(self, scheduled: Scheduled) -> None:
        """What the next step works on."""
        ...

    def on_update(self, update: Update) -> None:
        """Something came for a request."""
        ...

    def on_down(self, reason: str) -> None:
        """The engine is gone, and so are all its requests."""
        ...

    def on_tick(self, lag_s: float) -> None:
        """A few times a second; the event loop was late by ``lag_s``."""
        ...


class EngineProcess:
    """``python -m mixtral.worker`` at the other end of a socket pair. It ends with this process, whatever happens."""

    def __init__(self, start: Start, command: Sequence[str]) -> None:
        self.sock, other = socket.socketpair()
        try:
            with other:
                descriptor = other.fileno()
                self._process = subprocess.Popen(
                    [*command, str(descriptor)],
                    pass_fds=[descriptor],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        except BaseException:
            self.sock.close()
            raise
        try:
            first: Channel[FromEngine] = Channel(self.sock, FromEngine)
            first.send([msgspec.structs.replace(start, parent=os.getpid())])
        except ChannelError as error:
            _log.error("the engine process took no message: %s", error)  # it is found dead by whoever watches it

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """See Worker; negative for a signal."""
        return self._process.poll()

    def kill(self) -> None:
        """See Worker."""
        self._process.kill()


# -P: modules are not looked for in the current folder, which may be that of a model.
_COMMAND = (sys.executable, "-P", "-m", "mixtral.worker")


def process(start: Start, command: Sequence[str] = _COMMAND) -> Spawn:
    """Starts engine processes that load what ``start`` says."""
    return lambda: EngineProcess(start, command)


class Link(asyncio.Protocol):
    """The event loop's end of a channel: each message goes to ``take`` as it comes; ``lost`` is done at the end."""

    def __init__(self, take: Callable[[FromEngine], None]) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.heard = time.monotonic()
        self._take = take
        self._frames: Frames[FromEngine] = Frames(FromEngine)
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard = time.monotonic()
        if self.lost.done():
            return
        try:
            for message in self._frames.feed(data):
                self._take(message)
        except ChannelError as error:
            self._lose(str(error))
        except Exception as error:
            _log.exception("a message of the engine cannot be used")
            self._lose(f"a message of it cannot be used ({type(error).__name__})")

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self._frames.finish()
        except ChannelError as error:
            self._lose(str(error))
        self._lose("it closed the channel" if exc is None else f"its channel broke ({exc})")

    def write(self, data: bytes) -> None:
        """Send bytes, now or later; nothing happens if the other side is gone."""
        if self._transport is not None and not self.lost.done():
            self._transport.write(data)

    def close(self, why: str = "its process ended") -> None:
        """Close the channel at once."""
        self._lose(why)

    def _lose(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)
        if self._transport is not None:
            self._transport.abort()


class Supervisor:
    """Keeps one engine running for ``owner``. ``state`` says how it is: "draining" is the owner's business.

    A death is an exit, a broken channel, or a stall: nothing heard, or a step that lasts, longer than
    ``engine_stall_s``. After ``engine_deaths`` of them in ``engine_deaths_within_s`` it gives up.
    """

    def __init__(self, spawn: Spawn, owner: Owner, config: ServerConfig) -> None:
        self.state: State = "starting"
        self.restarts = 0
        self.beat: Heartbeat | None = None
        self._spawn = spawn
        self._owner = owner
        self._config = config
        self._link: Link | None = None
        self._worker: Worker | None = None
        self._deaths: deque[float] = deque()
        self._refusal: ConfigError | None = None
        self._exhausted = False  # the system had no room for another process
        self.served = False  # an engine was ready once
        self._tick_s = min(_TICK_S, config.engine_stall_s / 4)

    @property
    def worker(self) -> Worker | None:
        """What runs now."""
        return self._worker

    def write(self, data: bytes) -> None:
        """Send bytes to the engine, if there is one."""
        if self._link is not None:
            self._link.write(data)

    async def run(self) -> MixtralError:
        """Start the engine again and again; returns why no more. Cancel it to end it together with the engine."""
        try:
            while True:
                why = await self._one_life()
                if self.state == "ready":
                    self.state = "restarting"
                if self._exhausted:
                    _log.error("the engine cannot be started now: %s", why)
                    await asyncio.sleep(_EXHAUSTED_S)
                    continue
                self._owner.on_down(why)
                await self._end()
                problem = self._count_death(why)
                if problem is not None:
                    self.state = "dead"
                    return problem
                self.state = "restarting" if self.served else "starting"
                self.restarts += 1
                await asyncio.sleep(_PAUSES_S[min(len(self._deaths), len(_PAUSES_S)) - 1])
        finally:
            await self._end()

    async def _one_life(self) -> str:
        """From start to end of one engine; returns how it ended. Raises nothing but cancellation."""
        self._exhausted = False
        try:
            self._worker = self._spawn()
        except (OSError, MixtralError) as error:
            self._exhausted = isinstance(error, OSError) and error.errno in EXHAUSTED
            return f"it cannot be started ({error})"
        link = Link(self._take)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=self._worker.sock)
        except OSError as error:
            return f"its channel cannot be used ({error})"
        self._link = link
        last = time.monotonic()
        while not link.lost.done():
            await asyncio.wait({link.lost}, timeout=self._tick_s)
            now = time.monotonic()
            self._look(link, self._worker, slept_s=now - last)
            last = now
        return link.lost.result()

    def _look(self, link: Link, worker: Worker, *, slept_s: float) -> None:
        """One look at a living engine; ends the link of one that is dead or stands still."""
        limit = self._config.engine_stall_s
        if slept_s > limit / 2:
            link.heard = time.monotonic()  # this process stood still; what the engine sent has yet to be read
        if link.lost.done():
            return
        self._owner.on_tick(max(0.0, slept_s - self._tick_s))
        if worker.poll() is not None:
            link.close()
        elif self.state == "ready":
            silent = time.monotonic() - link.heard
            age = 0.0 if self.beat is None else self.beat.step_age
            if max(silent, age) > limit:
                self.state = "stalled"
                what = f"nothing was heard of it for {silent:.1f} s" if silent > limit else f"a step took {age:.1f} s"
                link.close(f"it stood still: {what}")

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Hello):
            self._owner.on_hello(message)
            self.beat = None
            self.served = True
            self.state = "ready"
        elif isinstance(message, Heartbeat):
            self.beat = message
            self._owner.on_beat(message)
        elif isinstance(message, Scheduled):
            self._owner.on_scheduled(message)
        elif isinstance(message, Failed) and not message.request:
            self._refusal = ConfigError(message.message, param=message.param, code=message.code)
        else:
            self._owner.on_update(message)
            if isinstance(message, Failed) and message.code == EngineError.code and self._link is not None:
                # It says so of each of its requests, in one frame, and then ends.
                self.state = "restarting"
                asyncio.get_running_loop().call_soon(self._link.close, "a step failed")

    def _count_death(self, why: str) -> MixtralError | None:
        """Note a death; the reason to give up, if there is one."""
        refusal, self._refusal = self._refusal, None
        if refusal is not None and not self.served:
            return refusal
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > self._config.engine_deaths_within_s:
            self._deaths.popleft()
        _log.error("the engine ended: %s (death %d of at most %d)", why, len(self._deaths), self._config.engine_deaths)
        if len(self._deaths) < self._config.engine_deaths:
            return None
        message = f"the engine ended {len(self._deaths)} times in a short time; the last time {why}"
        return EngineError(message if refusal is None else f"{message}: {refusal}")

    async def _end(self) -> None:
        """Make sure that no engine runs. What does not end within some seconds (a thread in a step) is left behind."""
        worker, link, self._link = self._worker, self._link, None
        if link is not None:
            link.close()
        if worker is None:
            return
        if self.state == "stalled" or not await _ended(worker, _GRACE_S):
            worker.kill()
        if not await _ended(worker, _END_S):
            _log.error("the engine did not end within %g s", _END_S)
        worker.sock.close()
        self._worker = None  # not before: who is cancelled on the way here must still be able to end it


async def _ended(worker: Worker, within_s: float) -> bool:
    """Wait for a worker to end; whether it did."""
    deadline = time.monotonic() + within_s
    while worker.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True
