"""Many streamed completions at once over HTTP, and when each of their events came.

The client is one event loop that reads sockets itself, so that it takes little of the processors that the server needs;
what it takes is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

__all__ = ["Answer", "StreamError", "Wave", "prompts", "request", "wave"]

_FIRST_ID = 300  # of the ids that prompts are made of: none that controls, none that stands for a single byte
_SHOWN = 300


class StreamError(RuntimeError):
    """A server answered something else than a whole stream."""


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


@dataclass(slots=True)
class Answer:
    """One stream: when it was asked for, when each event with text came, and how many tokens the server counted."""

    asked: float
    times: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first event with text."""
        return self.times[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between two events with text."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Wave:
    """All answers of a measurement, its time, and the processor time of the client meanwhile, in seconds."""

    answers: list[Answer]
    seconds: float
    client_cpu: float


def prompts(count: int, length: int, *, vocab_size: int, seed: int, shared: int = 0) -> list[list[int]]:
    """Different prompts of random ids, all of the same length; the first id is 1, which begins a text. The first
    ``shared`` ids are the same in all of them."""
    draw = random.Random(seed)
    begin = [1, *(draw.randrange(_FIRST_ID, vocab_size) for _ in range(max(0, shared - 1)))]
    return [begin + [draw.randrange(_FIRST_ID, vocab_size) for _ in range(length - len(begin))] for _ in range(count)]


def request(host: str, body: Mapping[str, Any]) -> bytes:
    """The bytes of a request for a streamed completion."""
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


async def wave(address: tuple[str, int], queues: Sequence[Sequence[bytes]], timeout_s: float = 600.0) -> Wave:
    """Send the requests of each queue one after the other, all queues at once.

    Raises:
        StreamError: an answer is no whole stream, or one does not end in time.
    """

    async def send(queue: Sequence[bytes]) -> list[Answer]:
        return [await _ask(address, one) for one in queue]

    began, cpu = time.perf_counter(), _cpu()
    try:
        async with asyncio.timeout(timeout_s):
            found = await asyncio.gather(*map(send, queues))
    except TimeoutError:
        raise StreamError(f"not all streams ended within {timeout_s:g} s") from None
    return Wave([answer for answers in found for answer in answers], time.perf_counter() - began, _cpu() - cpu)


async def _ask(address: tuple[str, int], data: bytes) -> Answer:
    loop = asyncio.get_running_loop()
    transport, stream = await loop.create_connection(lambda: _Stream(data, loop.create_future()), *address)
    try:
        return await stream.done
    finally:
        transport.close()


class _Stream(asyncio.Protocol):
    """One connection: sends the request, reads the answer in chunks, notes when events come."""

    def __init__(self, data: bytes, done: asyncio.Future[Answer]) -> None:
        self.done = done
        self._data = data
        self._answer = Answer(0.0)
        self._kept = bytearray()
        self._text = bytearray()
        self._head = True
        self._whole = False  # the event [DONE] came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.WriteTransport):
            raise TypeError("the connection cannot be written to")
        self._answer.asked = time.perf_counter()
        transport.write(self._data)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._kept += data
        try:
            if self._head and not self._read_head():
                return
            while (chunk := self._chunk()) is not None:
                self._text += chunk
            *events, rest = self._text.split(b"\n\n")
            for event in events:
                self._take(bytes(event).strip(), now)
            self._text = rest
        except (StreamError, msgspec.MsgspecError, ValueError) as error:
            self._fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done.done():
            return
        if not self._whole or self._text.strip():
            said = bytes(self._kept or self._text)[-_SHOWN:]
            self._fail(f"the stream ended before [DONE]; the last bytes: {said!r}")
        elif not self._answer.tokens or not self._answer.times:
            self._fail("the server counted no tokens, or sent no text")
        else:
            self.done.set_result(self._answer)

    def _read_head(self) -> bool:
        head, end, rest = bytes(self._kept).partition(b"\r\n\r\n")
        if not end:
            return False
        first, *fields = head.lower().split(b"\r\n")
        if first.split()[1:2] != [b"200"] or b"transfer-encoding: chunked" not in fields:
            raise StreamError(f"got {first!r} {rest[:_SHOWN]!r}; expected status 200 and an answer in chunks")
        self._kept = bytearray(rest)
        self._head = False
        return True

    def _chunk(self) -> bytes | None:
        """The next whole chunk; None if it has yet to come, or there are no more."""
        end = self._kept.find(b"\r\n")
        if end < 0:
            return None
        size = int(self._kept[:end], 16)
        if not size or len(self._kept) < end + size + 4:
            return None
        chunk = bytes(self._kept[end + 2 : end + 2 + size])
        del self._kept[: end + size + 4]
        return chunk

    def _take(self, event: bytes, now: float) -> None:
        if not event or event.startswith(b":"):
            return  # a comment, sent when nothing else is
        if not event.startswith(b"data: "):
            raise StreamError(f"got {event[:_SHOWN]!r}; expected an event")
        if event == b"data: [DONE]":
            self._whole = True
            return
        found = _decoder.decode(event[6:])
        if found.error is not None:
            raise StreamError(f"the server sent an error: {found.error}"[:_SHOWN])
        if found.usage is not None:
            self._answer.prompt_tokens, self._answer.tokens = found.usage.prompt_tokens, found.usage.completion_tokens
        text = "".join(choice.text for choice in found.choices)
        if text:
            self._answer.times.append(now)
            self._answer.text.append(text)

    def _fail(self, message: str) -> None:
        if not self.done.done():
            self.done.set_exception(StreamError(message))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
