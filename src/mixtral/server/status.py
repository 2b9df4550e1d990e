"""Routes for whoever operates the server: is it alive, does it take requests, what did it count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from mixtral.server.engine import Engine
from mixtral.server.metrics import CONTENT_TYPE

__all__ = ["Status"]

_RETRY = {"retry-after": "1"}


class Status:
    """The handlers; ``table`` lists method, path and handler. None of them waits for the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def table(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """All routes."""
        return [
            ("GET", "/health", self.health),
            ("GET", "/ready", self.ready),
            ("GET", "/metrics", self.metrics),
        ]

    async def health(self) -> Response:
        """200 while the engine lives, also when it drains; 503 with its state while it does not."""
        state = self._engine.state
        if state in ("ready", "draining"):
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": state}, status_code=503, headers=_RETRY)

    async def ready(self) -> Response:
        """200 while new requests are taken, otherwise 503 with the reason."""
        state = self._engine.state
        if state == "ready":
            return JSONResponse({"status": state})
        return JSONResponse({"status": state}, status_code=503, headers=_RETRY)

    async def metrics(self) -> Response:
        """Everything that was counted."""
        return Response(self._engine.metrics.text(), headers={"content-type": CONTENT_TYPE})
