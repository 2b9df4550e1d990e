"""Long requests are read in processes of their own, so that nobody else waits: this side of them, and its messages."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from mixtral.server.config import ServerConfig
from mixtral.server.engine import Facts
from mixtral.server.errors import ApiError, overloaded
from mixtral.server.supervisor import EXHAUSTED
from mixtral.server.work import Prepared
from mixtral.wire import AdapterInfo, ChannelError, Frames, frames_of

__all__ = ["Answer", "Ask", "FromText", "Model", "Part", "Ready", "Refused", "Texts", "ToText", "in_parts"]

_log = logging.getLogger("mixtral.server")
_START_S = 60.0
_PART_BYTES = 2**20
_USUAL_BYTES = 4 * 2**20  # of a body that may take the usual time; a longer one gets more
# -P: modules are not looked for in the current folder, which may be that of a model.
_COMMAND = (sys.executable, "-P", "-m", "mixtral.server.textchild")
T = TypeVar("T")


class Model(msgspec.Struct, frozen=True, kw_only=True, tag="model", forbid_unknown_fields=True):
    """What requests are read for, see ``Facts``; told before the first one, and again when it changed.

    ``parent`` is the process that this one must not outlive; ``grammar``: whether formats can be promised.
    """

    name: str
    adapters: dict[str, AdapterInfo]
    context: int
    cache_tokens: int
    vocab_size: int
    layers: int
    tokenizer: str
    respell: dict[int, tuple[int, ...]]
    grammar: bool
    parent: int


class Part(msgspec.Struct, frozen=True, kw_only=True, tag="part", forbid_unknown_fields=True):
    """Bytes of a body, or of an answer, which is complete with the next message of another kind."""

    data: bytes


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask", forbid_unknown_fields=True):
    """Read the body that was sent in parts, as ``reading.read`` does."""

    route: str
    holder: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready", forbid_unknown_fields=True):
    """A model was taken in."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer", forbid_unknown_fields=True):
    """The parts before are the whole answer to a request."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused", forbid_unknown_fields=True):
    """An ApiError."""

    status: int
    code: str
    message: str
    param: str | None
    headers: dict[str, str]


ToText = Model | Part | Ask
FromText = Ready | Prepared | Part | Answer | Refused


def in_parts(data: bytes) -> list[bytes]:
    """Frames that carry bytes of any length."""
    return [
        frames_of([Part(data=data[at : at + _PART_BYTES])]) for at in range(0, len(data), _PART_BYTES)
    ]  # each by itself, so that a frame has one copy


class Texts:
    """A few processes that read long requests, one at a time each. Lives in one event loop.

    They start when they are needed. One that ends, or works for longer than ``text_timeout_s``, costs the request that
    it had, and the next one gets a new process.
    """

    def __init__(self, config: ServerConfig, *, grammar: bool, command: Sequence[str] = _COMMAND) -> None:
        self._config = config
        self._grammar = grammar
        self._free = [_Process(command) for _ in range(config.text_processes)]
        self._all = tuple(self._free)
        self._turn = asyncio.Semaphore(config.text_processes)
        self._waiting = 0

    async def read(self, route: str, facts: Facts, body: bytes, holder: str) -> Prepared | bytes:
        """As ``reading.read``, elsewhere.

        Raises:
            ApiError: what that raises; 500 ``internal_error`` if the process was lost; 503 if too many wait.
        """
        if self._waiting >= self._config.queue_size:
            message = f"{self._waiting} long requests wait to be read; try again later"
            raise overloaded("server_overloaded", message, retry_after_s=2)
        self._waiting += 1
        try:
            async with self._turn:
                process = self._free.pop()  # the one that was used last: others may never have to start
                try:
                    return await self._ask(process, route, facts, body, holder)
                finally:
                    self._free.append(process)
        finally:
            self._waiting -= 1

    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.pid for process in self._all if process.pid is not None]

    def close(self) -> None:
        """End them."""
        for process in self._all:
            process.end()

    async def _ask(self, process: _Process, route: str, facts: Facts, body: bytes, holder: str) -> Prepared | bytes:
        tokenizer = facts.tokenizer
        model = Model(
            name=facts.name,
            adapters=dict(facts.adapters),
            context=facts.context,
            cache_tokens=facts.cache_tokens,
            vocab_size=facts.vocab_size,
            layers=facts.layers,
            tokenizer=tokenizer.version,
            respell=tokenizer.respell,
            grammar=self._grammar,
            parent=os.getpid(),
        )
        try:
            await asyncio.wait_for(process.know(model), _START_S)
            asked = process.exchange([*in_parts(body), frames_of([Ask(route=route, holder=holder)])])
            limit = self._config.text_timeout_s * max(1.0, len(body) / _USUAL_BYTES)
            found, data = await asyncio.wait_for(asked, limit)
        except (OSError, ChannelError) as error:  # a TimeoutError is one
            process.end()
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                message = "the server has no room for a process that reads long requests; try again later"
                raise overloaded("server_overloaded", message, retry_after_s=2) from error
            why = "it took too long" if isinstance(error, TimeoutError) else str(error)
            _log.error("the process that reads long requests is replaced: %s", why)
            message = "the server lost this request while it read it; other requests are not affected"
            raise ApiError(500, "internal_error", message) from error
        except BaseException:
            process.end()  # it is in the middle of something
            raise
        if isinstance(found, Refused):
            raise ApiError(found.status, found.code, found.message, param=found.param, headers=found.headers)
        return found if isinstance(found, Prepared) else data


class _Process(asyncio.Protocol):
    """One process, started when it is first used, and again after its end."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._frames: Frames[FromText] = Frames(FromText)
        self._known: Model | None = None
        self._parts = bytearray()
        self._answer: asyncio.Future[tuple[FromText, bytes]] | None = None

    @property
    def pid(self) -> int | None:
        """It, if it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    async def know(self, model: Model) -> None:
        """Make sure that a process runs that reads for this model."""
        if self.pid is None or self._transport is None:
            self.end()
            await self._start()
        if self._known != model:
            await self.exchange([frames_of([model])])
            self._known = model

    async def exchange(self, frames: Sequence[bytes]) -> tuple[FromText, bytes]:
        """Send frames; the message that ends the answer, and the parts before it. Raises ChannelError at its end."""
        transport = self._transport
        if transport is None:
            raise ChannelError("the process that reads long requests is gone")
        self._answer = asyncio.get_running_loop().create_future()
        for data in frames:
            transport.write(data)
        return await self._answer

    def end(self) -> None:
        """Kill it, if it runs."""
        process, transport = self._process, self._transport
        self._process = self._transport = self._known = self._answer = None
        self._frames = Frames(FromText)
        self._parts.clear()
        if transport is not None:
            transport.abort()
        if process is not None:
            process.kill()
            process.wait()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                if isinstance(message, Part):
                    self._parts += message.data
                elif self._answer is not None and not self._answer.done():
                    self._answer.set_result((message, bytes(self._parts)))
                    self._parts.clear()
        except ChannelError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(ChannelError("it ended"))

    def _fail(self, error: ChannelError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*self._command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            except BaseException:
                ours.close()
                raise
        transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        self._transport = transport
