"""Limits below HTTP: connections, time to send a request's head, and answers to bytes that are no request."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixtral.server.config import ServerConfig
from mixtral.server.errors import ApiError

__all__ = ["HEAD_BYTES", "LimitedProtocol", "limited"]

HEAD_BYTES = 32 * 1024
_OWN_FILES = 48  # descriptors that are kept for everything but connections
_LINGER_S = 1.0
_TOLD = 16  # connections beyond the limit that get an answer
_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large", 503: b"Service Unavailable"}


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with a limit of connections and a time limit for request heads; see ``limited``."""

    header_timeout_s: float
    stall_timeout_s: float
    most_connections: int
    _head_timer: asyncio.TimerHandle | None = None
    _one_too_many = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection. One too many is told so as soon as it has sent something, far too many are just closed."""
        super().connection_made(transport)
        # The cycles of this connection close it through this one too.
        self.transport = _Patient(transport, self)  # type: ignore[assignment]
        self.flow = FlowControl(self.transport)
        self._one_too_many = len(self.connections) > self.most_connections
        if len(self.connections) > self.most_connections + _TOLD:
            transport.abort()
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client. The head of the next request must be complete in time, from its first byte on."""
        if self.transport.is_closing():
            return
        if self._one_too_many:
            message = f"the server has {self.most_connections} connections, the most it takes; try again later"
            self._refuse(ApiError(503, "too_many_connections", message, headers={"retry-after": "1"}))
            return
        super().data_received(data)
        their_state = self.conn.their_state
        if their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()
        elif their_state is not h11.IDLE:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """A kept connection waits for its next request; what came of that already has to be completed in time."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._wait_for_head()

    def eof_received(self) -> None:
        """The client sends no more; if it only was to read its answer, the connection ends."""
        if self.transport.is_closing():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP request, or a head that is too long."""
        large = len(self.conn.trailing_data[0]) >= HEAD_BYTES
        if large:
            message = f"the head of the request has more than {HEAD_BYTES} bytes"
            self._refuse(ApiError(431, "headers_too_large", message))
        else:
            self._refuse(None)

    @property
    def is_sent_to(self) -> bool:
        """Whether the client is, or may be, in the middle of sending a request."""
        return self.conn.their_state is h11.SEND_BODY or self._one_too_many

    def _wait_for_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, error: ApiError | None) -> None:
        """Answer without the application and close; None is a bare 400."""
        self._stop_waiting()
        status = 400 if error is None else error.status
        body = b"" if error is None else json.dumps(error.body()).encode()
        headers = {"connection": "close", "content-length": str(len(body))}
        if error is not None:
            headers |= {"content-type": "application/json", "cache-control": "no-store", **error.headers}
            headers["x-request-id"] = uuid.uuid4().hex
        lines = [b"HTTP/1.1 %d %s" % (status, _REASONS[status])]
        lines += [f"{name}: {value}".encode("ascii") for name, value in headers.items()]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()


class _Patient:
    """A transport whose ``close`` first lets a client that is still sending read its answer.

    Closing a socket with unread bytes resets the connection, and the client may lose the answer that tells it why. So
    the writing side is closed, and for a short time what comes is thrown away.
    """

    def __init__(self, transport: asyncio.Transport, protocol: LimitedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether no more is sent or read."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Send what is left and close, now or a little later."""
        if self.is_closing():
            return
        self._closing = True
        if self._transport.get_write_buffer_size():  # who reads nothing would keep the connection for ever
            self._protocol.loop.call_later(self._protocol.stall_timeout_s, self._transport.abort)
        if self._protocol.is_sent_to and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._protocol.loop.call_later(_LINGER_S, self._transport.close)
        else:
            self._transport.close()


def limited(config: ServerConfig) -> type[LimitedProtocol]:
    """The protocol with the limits of ``config``, and never more connections than this process may open files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = config.connections if files == resource.RLIM_INFINITY else min(config.connections, files - _OWN_FILES)

    # Every stranger can send bytes that are no request; that is worth no line in the log.
    log = logging.getLogger("mixtral.server.transport")
    log.setLevel(logging.ERROR)

    class Configured(LimitedProtocol):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self.logger = log

        header_timeout_s = config.header_timeout_s
        stall_timeout_s = config.stall_timeout_s
        most_connections = max(most, 1)

    return Configured
