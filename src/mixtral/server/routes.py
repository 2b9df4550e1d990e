"""The API's routes. Each reads a request, checks it, and answers; everything that goes wrong is raised."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mixtral.server.admission import Admission
from mixtral.server.body import read_json
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.errors import ApiError, show
from mixtral.server.protocol import Options, read_chat, read_completion
from mixtral.server.sse import EventStream, unless_gone
from mixtral.server.work import Work, collect, prepare_chat, prepare_completion, stream

__all__ = ["Routes"]

_log = logging.getLogger("mixtral.server")


class Routes:
    """The handlers of one server; ``table`` lists method, path and handler."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self._engine = engine
        self._door = Admission(engine, config)
        self._config = config
        self._created = int(time.time())

    def table(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """All API routes."""
        return [
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.completions),
        ]

    async def models(self) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, name: str) -> Response:
        """The one model by its name; 404 for any other."""
        self._check_model(name)
        return JSONResponse(self._description())

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation."""
        wanted = read_chat(await read_json(request, self._config))
        self._check_model(wanted.options.model)
        return await self._answer(request, wanted.options, lambda: prepare_chat(self._engine, wanted))

    async def completions(self, request: Request) -> Response:
        """Continuations of raw prompts."""
        body = await read_json(request, self._config)
        wanted = read_completion(body, vocab_size=self._engine.vocab_size)
        self._check_model(wanted.options.model)
        return await self._answer(request, wanted.options, lambda: prepare_completion(self._engine, wanted))

    async def _answer(self, request: Request, options: Options, prepare: Callable[[], Work]) -> Response:
        if options.user is not None:
            digest = hashlib.sha256(options.user.encode()).hexdigest()[:16]
            _log.info("request %s: user %s", request.scope.get("mixtral.request_id"), digest)
        # Encoding a long text takes a while; other requests are served meanwhile.
        work = await asyncio.to_thread(prepare)
        headers = {"x-mixtral-seed": str(work.params.seed)}
        if options.stream:
            return EventStream(stream(self._door, work), self._config, headers)
        body = await unless_gone(request.receive, collect(self._door, work))
        return JSONResponse(body, headers=headers)

    def _check_model(self, name: str) -> None:
        if name != self._engine.name:
            message = f"there is no model {show(name)}; this server has {self._engine.name!r}"
            raise ApiError(404, "model_not_found", message, param="model")

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._engine.name,
            "object": "model",
            "created": self._created,
            "owned_by": "mixtral",
            "parent": None,
            "max_model_len": self._engine.context,
        }
