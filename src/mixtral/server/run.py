"""Listening: one process, one event loop, its limits, and an orderly end on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import math
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from mixtral.errors import ConfigError, MixtralError
from mixtral.server.app import build
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.formats import Grammar
from mixtral.server.transport import HEAD_BYTES, limited

__all__ = ["Server", "serve"]

_log = logging.getLogger("mixtral.server")
_LOOK_S = 0.02
_ABORT_S = 1.0  # for readers to take notice that their request was ended
_BACKLOG = 512  # asyncio also tries to accept this often in a row
_QUIET_S = 10.0  # between lines that say the same
_LAST_S = 3  # and for answers and error events that are on their way


class Server(uvicorn.Server):
    """A uvicorn server over one engine. Setting ``should_exit`` stops it like a signal does.

    It listens at once, and answers 503 until the engine is ready; then ``on_ready`` gets the address, such as
    ``http://127.0.0.1:8000``. ``stopped_by`` is the signal that ended it, ``fault`` what ended the engine, if one did.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        on_ready: Callable[[str], None] | None = None,
        *,
        grammar: Grammar | None = None,
    ) -> None:
        _check_tls(config)
        app = build(engine, config, grammar=grammar)
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=limited(config),
                ws="none",
                backlog=_BACKLOG,
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
                timeout_graceful_shutdown=_LAST_S,
            )
        )
        self.stopped_by: int | None = None
        self.fault: MixtralError | None = None
        self._engine = engine
        self._aborted: float | None = None
        self._full_since = -math.inf
        self._on_ready = on_ready
        self._drain_s = config.drain_s
        self._keys = config.keys
        self._scheme = "https" if config.tls_cert else "http"
        self._handshake_s = config.header_timeout_s if config.tls_cert else None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop.

        Raises:
            ConfigError: the address cannot be bound, or the engine cannot be started as it was told.
            EngineError: the engine ended too often.
        """
        super().run(sockets or [_bind(self.config.host, self.config.port)])
        if self.fault is not None:
            raise self.fault

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to follow the engine."""
        self._loop = asyncio.get_running_loop()
        # uvicorn leaves it at asyncio's minute: that long anybody could hold a connection that no other limit sees.
        listen = functools.partial(self._loop.create_server, ssl_handshake_timeout=self._handshake_s)
        self._loop.create_server = listen  # type: ignore[method-assign]
        await super().startup(sockets)
        self._loop.set_exception_handler(self._note)
        self._follower = asyncio.create_task(self._follow())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests with an answer, let the others finish, and after ``drain_s`` end them with an error."""
        self._engine.drain()
        self._follower.cancel()
        timer = self._loop.call_later(self._drain_s, self._abort)
        while self._engine.busy and (self._aborted is None or time.monotonic() - self._aborted < _ABORT_S):
            await asyncio.sleep(_LOOK_S)
        timer.cancel()
        await super().shutdown(sockets)

    async def _follow(self) -> None:
        try:
            await self._engine.until_ready()
        except MixtralError as error:
            self._give_up(error)
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        try:
            if self._on_ready is not None:
                self._on_ready(f"{self._scheme}://{name}:{port}")
        except Exception:
            _log.exception("nobody could be told that the server is ready; it serves all the same")
        self._give_up(await self._engine.until_ended())

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What nobody waits for. Without free files, accepting fails many times a second: one line is enough."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._full_since > _QUIET_S:
            self._full_since = time.monotonic()
            _log.error("connections cannot be accepted: %s", error.strerror)

    def _abort(self) -> None:
        self._aborted = time.monotonic()
        self._engine.abort()

    def _give_up(self, error: MixtralError) -> None:
        self.fault = error
        self.should_exit = True

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
            self._loop.call_soon_threadsafe(self._abort)
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
        ConfigError: the address is in use or cannot be bound, certificate and key cannot be used, or the engine cannot
            be started as it was told.
        EngineError: the engine ended too often.
    """
    Server(engine, config, on_ready, grammar=grammar).run()


def _check_tls(config: ServerConfig) -> None:
    """Raise ConfigError for a certificate and a key that cannot be used, before anything is started."""
    if config.tls_cert is None:
        return
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password="")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(
            f"the certificate {config.tls_cert} and the key {config.tls_key} cannot be used ({error}); expected PEM "
            "files that belong together, the key without a passphrase",
            param="tls_cert",
        ) from error


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family)
        # Opened anew, it knows that it is TCP: only then does asyncio send small writes, such as events, at once.
        return socket.socket(fileno=made.detach())
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); is another server running there? Choose another port.",
            param="port",
        ) from error
