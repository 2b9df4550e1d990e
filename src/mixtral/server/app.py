"""The application: routes, page, error answers and the outermost layer, around an engine that the caller hands in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mixtral.errors import MixtralError
from mixtral.server.auth import Auth, Cors
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.errors import ApiError, as_api_error, error_response, show
from mixtral.server.formats import Grammar
from mixtral.server.gate import Gate
from mixtral.server.routes import UNSUPPORTED, Routes
from mixtral.server.status import Status

__all__ = ["build"]

_log = logging.getLogger("mixtral.server")
_PAGE = Path(__file__).parent / "page"
_SCRIPTS = (
    "app calls chat connection dom examples experts experts-view markdown markup messages panels request schema "
    "settings sidebar store stream theme tools transfer"
)
# Path -> file and media type. Nothing else is ever read from disk.
_FILES = {
    "/": ("index.html", "text/html"),
    "/static/base.css": ("base.css", "text/css"),
    "/static/chat.css": ("chat.css", "text/css"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
    **{f"/static/{name}.js": (f"{name}.js", "text/javascript") for name in _SCRIPTS.split()},
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def build(engine: Engine, config: ServerConfig | None = None, *, grammar: Grammar | None = None) -> FastAPI:
    """The application over ``engine``. Without ``grammar`` it refuses what only constrained output can promise.

    It has no documentation pages: those load scripts from elsewhere.
    """
    config = config or ServerConfig()
    routes = Routes(engine, config, grammar)
    status = Status(engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            routes.close()
            await engine.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for method, path, handler in [*routes.table(), *status.table()]:
        app.add_api_route(path, handler, methods=[method], response_model=None)
    for path, (name, media_type) in _FILES.items():
        app.add_api_route(path, _file((_PAGE / name).read_bytes(), media_type), methods=["GET"], response_model=None)
    for kind in (ApiError, MixtralError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    # The last one is the outermost.
    app.add_middleware(Auth, keys=config.keys, open_paths=(*_FILES, "/health", "/ready"))
    app.add_middleware(Gate, config=config, metrics=engine.metrics)
    app.add_middleware(Cors, origins=config.allowed_origins)
    return app


def _file(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def handler() -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return handler


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        known = _routing_error(request, error)
    elif isinstance(error, RequestValidationError):
        known = ApiError(400, "invalid_request", "the request cannot be read")
    else:
        known = as_api_error(error)
    request.scope["mixtral.code"] = known.code
    if known.status >= 500 and not isinstance(error, ApiError | HTTPException):
        _log.error("request %s failed", request.scope.get("mixtral.request_id"), exc_info=error)
    return error_response(known)


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{show(request.method)} is not allowed here; expected {allowed}"
        return ApiError(405, "method_not_allowed", message, headers=error.headers)
    if error.status_code == 404:
        path = request.scope["path"]
        reason = next((why for start, why in UNSUPPORTED.items() if f"{path}/".startswith(f"{start}/")), "")
        message = f"there is no {show(path)} on this server"
        return ApiError(404, "route_not_found", f"{message}: {reason}" if reason else message)
    return ApiError(error.status_code, "invalid_request", "the request cannot be read", headers=error.headers)
