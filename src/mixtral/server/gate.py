"""The outermost layer: request ids, Host and Origin, size of the request head, and a last answer to what went wrong."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtral.server.config import ServerConfig
from mixtral.server.errors import ApiError, ClientGone, as_api_error, error_response, show
from mixtral.server.metrics import Metrics

__all__ = ["Gate"]

_log = logging.getLogger("mixtral.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_URI_BYTES = 8192
_HEADERS = 100
_HEAD_BYTES = 32 * 1024


class Gate:
    """ASGI layer around the whole application. No exception leaves it: each becomes an answer or a log line."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        own = f"[{config.host}]" if ":" in config.host else config.host
        self._loopback = {*_LOOPBACK, own.lower()}
        self._others = {name.lower() for name in config.allowed_hosts}
        self._any_host = not config.loopback and not self._others
        self._origins = frozenset(config.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope["headers"])
        scope["mixtral.request_id"] = request_id
        began = time.monotonic()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"cache-control", b"no-store"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_marked)
        except ClientGone:
            status = 499
        except Exception as error:
            known = as_api_error(error)
            scope["mixtral.code"] = known.code
            if not isinstance(error, ApiError):
                _log.exception("request %s failed", request_id)
            if status == 0:
                await error_response(known)(scope, receive, send_marked)
        self._note(scope, status, time.monotonic() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log one answer; 499 is a client that left."""
        code = scope.get("mixtral.code", "client_gone" if status == 499 else "")
        self._metrics.answered(_route(scope), status, code)
        facts = {
            "request": scope["mixtral.request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "code": code,
            "seconds": round(seconds, 3),
        }
        what = f"{status} {code}" if code else f"{status}"
        line = f"{facts['request']} {facts['method']} {facts['path']!r}: {what} in {seconds:.3f} s"
        _log.info("%s", line, extra={"facts": facts})

    def _check(self, scope: Scope) -> None:
        headers = scope["headers"]
        if len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"]) > _URI_BYTES:
            raise ApiError(414, "uri_too_long", f"the path has more than {_URI_BYTES} bytes")
        if len(headers) > _HEADERS:
            raise ApiError(431, "headers_too_large", f"the request has more than {_HEADERS} headers")
        if sum(len(name) + len(value) + 4 for name, value in headers) > _HEAD_BYTES:
            message = f"the headers have more than {_HEAD_BYTES} bytes together"
            raise ApiError(431, "headers_too_large", message, headers={"connection": "close"})
        if {b"content-length", b"transfer-encoding"} <= {name.lower() for name, _ in headers}:
            # A proxy in front may go by the other one, and then a part of this request is the next one to it.
            message = "the request has both content-length and transfer-encoding; expected one of them"
            raise ApiError(400, "invalid_headers", message, headers={"connection": "close"})
        host = self._check_host(_values(headers, b"host"), scope.get("server"))
        for origin in _values(headers, b"origin"):
            parts = _split(origin)
            if origin not in self._origins and (parts is None or parts != host):
                message = (
                    f"requests from pages of {show(origin)} are not allowed; only the page of this server may use it"
                )
                raise ApiError(403, "origin_not_allowed", message)

    def _check_host(self, given: Sequence[str], server: tuple[str, int | None] | None) -> str:
        """The one Host header, if it names this server: otherwise a foreign name was pointed at this address.

        A server with keys on an address that others reach has many names; a page with a foreign name has no key.
        """
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is not None:
            name, port = match[1].lower(), int(match[2] or (443 if self._config.tls_cert else 80))
            if name in self._others or given[0].lower() in self._others:
                return given[0].lower()
            own_port = server[1] if server else None
            if self._any_host or (name in self._loopback and own_port in (None, port)):
                return given[0].lower()
        got = show(given[0]) if len(given) == 1 else f"given {len(given)} times"
        message = f"the Host header is {got}; expected this server's own address, or one of its allowed hosts"
        raise ApiError(421, "host_not_allowed", message)


def _request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    given = _values(headers, b"x-request-id")
    return given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The path of the route that answered, as the server names it: never what the client wrote."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else "none"


def _values(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key.lower() == name]


def _split(origin: str) -> str | None:
    """Host and port of an http(s) origin, or None."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") and parts.netloc else None
