"""Server-sent events: one ``data:`` line per object, an error event in place of the end, ``[DONE]`` after success."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixtral.server.config import ServerConfig
from mixtral.server.deadline import Deadline
from mixtral.server.errors import ApiError, ClientGone, as_api_error

__all__ = ["DONE", "WAIT", "EventStream", "Frames", "Whole", "frame", "unless_gone"]

DONE = b"data: [DONE]\n\n"
WAIT = b": wait\n\n"
_PART_BYTES = 64 * 1024  # what a client has to take before it counts as standing still
T = TypeVar("T")

_log = logging.getLogger("mixtral.server")
# Some clients split lines at these as well.
_LINE_ENDS = {chr(place).encode(): f"\\u{place:04x}".encode() for place in (0x85, 0x2028, 0x2029)}


def frame(data: Mapping[str, Any]) -> bytes:
    """One event with ``data`` as JSON on one line."""
    return b"data: %b\n\n" % _line(data)


class Frames:
    """The events of one stream: all of them have ``head`` before the choices and ``note`` after them."""

    def __init__(self, head: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        self._begin = b'data: %b,"choices":[' % _line(head)[:-1]
        self._end = b"]" + _members(note)

    def event(self, choice: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> bytes:
        """The event of one choice. It equals ``frame(head | {"choices": [choice]} | note | extra)``."""
        return b"%b%b%b%b}\n\n" % (self._begin, _line(choice), self._end, _members(extra) if extra else b"")


def _members(data: Mapping[str, Any]) -> bytes:
    """As they follow other members of an object."""
    return b"," + _line(data)[1:-1] if data else b""


def _line(data: Mapping[str, Any]) -> bytes:
    text = msgspec.json.encode(data)
    for end, escape in _LINE_ENDS.items():
        text = text.replace(end, escape)
    return text


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves. The body must have been read before.

    Raises:
        ClientGone: the client left first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """A response whose frames come from an async generator.

    Headers are sent with the first frame (an empty one will do), so what is raised before it is an ordinary HTTP error.
    What is raised later becomes an error event, after which nothing follows.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], config: ServerConfig, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._sender = _Sender(config.stall_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._stream(scope, send))

    async def _stream(self, scope: Scope, send: Send) -> None:
        started = False
        async with contextlib.aclosing(self._safe(scope)) as frames:
            async for data in frames:
                if not started:
                    start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                    await send(start)
                    started = True
                await self._sender.send(send, data, more=True)
        await self._sender.send(send, b"", more=False)

    async def _safe(self, scope: Scope) -> AsyncGenerator[bytes, None]:
        started = False
        try:
            async with contextlib.aclosing(self._frames) as frames:
                async for data in frames:
                    started = True
                    yield data
        except Exception as error:
            if not started:
                raise
            known = as_api_error(error)
            scope["mixtral.code"] = known.code
            if not isinstance(error, ApiError) and known.status >= 500:
                _log.exception("request %s failed", scope.get("mixtral.request_id"), exc_info=error)
            yield frame(known.body())


class Whole(Response):
    """A JSON answer that may be long, for a reader that takes it in time."""

    media_type = "application/json"

    def __init__(self, content: bytes, config: ServerConfig, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(content, headers=headers)
        self._sender = _Sender(config.stall_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._sender.send(send, bytes(self.body), more=False)


class _Sender:
    """Sends the body of a response in parts; a reader that takes none for ``limit_s`` is gone."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadline = Deadline()

    async def send(self, send: Send, data: bytes, *, more: bool) -> None:
        """Send ``data``; ``more`` says whether other data follow. Raises ClientGone."""
        try:
            for start in range(0, len(data) or 1, _PART_BYTES):
                end = start + _PART_BYTES
                goes_on = more or end < len(data)
                with self._deadline.within(self._limit_s):
                    await send({"type": "http.response.body", "body": data[start:end], "more_body": goes_on})
        except (TimeoutError, OSError):
            raise ClientGone from None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
