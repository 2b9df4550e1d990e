"""Who may send what: keys, denied by default on the path as it was sent, and pages of other sites that were allowed."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtral.server.errors import ApiError
from mixtral.server.keys import Holder, KeyRing

__all__ = ["Auth", "Cors"]

_METRICS = b"/metrics"
_SCHEME = "bearer "


class Auth:
    """ASGI layer before any routing: without a key only the paths in ``open_paths`` can be reached.

    A path is compared byte for byte as it was sent: no decoding, no other spelling.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open = frozenset(path.encode("ascii") for path in open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or raise ApiError 401, 403 or 429."""
        if scope.get("mixtral.preflight"):
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        path: bytes = scope.get("raw_path") or scope.get("path", "").encode("utf-8", "surrogateescape")
        if scope["type"] != "http" or self._keys is None or path in self._open:
            await self._app(scope, receive, send)
            return
        holder = self._holder(scope, self._keys)
        if "api" not in holder.key.scopes and not ("metrics" in holder.key.scopes and path == _METRICS):
            raise ApiError(403, "insufficient_scope", "this key may not use this route; use a key with the scope api")
        holder.enter()
        scope["mixtral.holder"] = holder
        try:
            await self._app(scope, receive, send)
        finally:
            holder.leave()

    def _holder(self, scope: Scope, keys: KeyRing) -> Holder:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) == 1 and given[0][: len(_SCHEME)].lower() == _SCHEME:
            holder = keys.find(given[0][len(_SCHEME) :].strip(" "))
            if holder is not None:
                return holder
        message = "the API key is missing or wrong; send it as: Authorization: Bearer KEY"
        raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


class Cors:
    """The outermost ASGI layer: pages of the listed origins may ask beforehand (Auth answers), and read answers."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.encode("ascii") for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add headers for an allowed origin; no credentials are ever allowed."""
        headers = scope.get("headers", ())
        origin = next((value for name, value in headers if name == b"origin" and value in self._origins), None)
        if scope["type"] != "http" or origin is None:
            await self._app(scope, receive, send)
            return
        more = [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"x-request-id, x-mixtral-seed, retry-after"),
            (b"vary", b"origin"),
        ]

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *more]
            await send(message)

        if scope["method"] == "OPTIONS" and any(name == b"access-control-request-method" for name, _ in headers):
            scope["mixtral.preflight"] = True
            more += [
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
                (b"access-control-max-age", b"600"),
            ]
        await self._app(scope, receive, send_allowed)
