"""Listening: one process, one event loop, its limits, and an orderly end on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from mixtral.errors import ConfigError
from mixtral.server.app import build
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.formats import Grammar
from mixtral.server.transport import HEAD_BYTES, limited

__all__ = ["Server", "serve"]

_log = logging.getLogger("mixtral.server")


class Server(uvicorn.Server):
    """A uvicorn server over one engine. Setting ``should_exit`` stops it like a signal does.

    ``on_ready`` gets the address, such as ``http://127.0.0.1:8000``, once requests are accepted. ``stopped_by`` is the
    signal that ended it, if one did.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        on_ready: Callable[[str], None] | None = None,
        *,
        grammar: Grammar | None = None,
    ) -> None:
        app = build(engine, config, grammar=grammar)
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=limited(config),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                timeout_keep_alive=math.ceil(config.keep_alive_s),
                timeout_graceful_shutdown=math.ceil(config.drain_s) + 5,
            )
        )
        self.stopped_by: int | None = None
        self._engine = engine
        self._on_ready = on_ready
        self._drain_s = config.drain_s
        self._keys = config.keys
        self._scheme = "https" if config.tls_cert else "http"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Raises ConfigError if the address cannot be bound."""
        super().run(sockets or [_bind(self.config.host, self.config.port)])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._on_ready is not None and self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            self._on_ready(f"{self._scheme}://{name}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let the others finish, and end what is left after ``drain_s`` with an error."""
        self._engine.drain()
        timer = self._loop.call_later(self._drain_s, self._engine.abort)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, not the process: the caller decides what comes next."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._reload_keys)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self.should_exit:  # asked twice
            self._loop.call_soon_threadsafe(self._engine.abort)
        self.stopped_by = number
        self.should_exit = True

    def _reload_keys(self, number: int, frame: object) -> None:
        """Read the key file again; a file that cannot be used changes nothing."""
        if self._keys is None:
            return
        try:
            self._keys.reload()
        except ConfigError as error:
            _log.error("the API keys stay as they were: %s", error)
        else:
            _log.info("the API keys were read again")


def serve(
    engine: Engine,
    config: ServerConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    grammar: Grammar | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; the second signal does not wait for running requests.

    Raises:
        ConfigError: the address is in use or cannot be bound.
    """
    Server(engine, config, on_ready, grammar=grammar).run()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); is another server running there? Choose another port.",
            param="port",
        ) from error
