"""The server's side of an engine: many requests at once over one channel, each with a bounded buffer of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec

from mixtral.errors import EngineError, MixtralError
from mixtral.server.config import ServerConfig
from mixtral.server.deadline import Deadline
from mixtral.server.engine import State
from mixtral.server.errors import ApiError, ClientGone, overloaded
from mixtral.server.metrics import Metrics, Times
from mixtral.server.supervisor import Spawn, Supervisor
from mixtral.tokenizer import Tokenizer
from mixtral.wire import (
    Abort,
    AdapterInfo,
    Done,
    Failed,
    Heartbeat,
    Hello,
    Pause,
    Scheduled,
    Started,
    Submit,
    ToEngine,
    Tokens,
    Update,
    frames_of,
)

__all__ = ["Client", "ClientRun", "Quarantine"]

_log = logging.getLogger("mixtral.server")
_NO_RETRY = {"x-should-retry": "false"}
# Codes of requests that an engine refuses; every other code is a fault of the server.
_REFUSED = frozenset(
    {
        *("request_exceeds_cache", "context_length_exceeded", "invalid_value", "invalid_tokens", "invalid_messages"),
        *("schema_invalid", "schema_unsupported", "regex_invalid", "grammar_invalid", "grammar_too_complex"),
    }
)
_EVENT_BYTES, _CANDIDATE_BYTES = 128, 96  # what they take in memory, about


class ClientRun:
    """Updates of one request on their way to their reader; a Run.

    Tokens that nobody has read yet are put together, so that a slow reader costs the server no messages. Once they take
    more than ``buffer_bytes``, the request is paused in the engine, which works on the others meanwhile; it goes on
    when half of that is read. How long that may take is for whoever writes to the client to say.
    """

    def __init__(self, submit: Submit, config: ServerConfig, *, send: Callable[[ToEngine], None]) -> None:
        self.submit = submit
        self.started = self.ended = self.paused = False
        self.times = Times()
        self._config = config
        self._send = send
        self._waiting: deque[Update] = deque()
        self._error: ApiError | None = None
        self._bytes = 0
        self._news = asyncio.Event()
        self._deadline = Deadline()

    def __aiter__(self) -> ClientRun:
        return self

    async def __anext__(self) -> Update | None:
        if not self._waiting and self._error is None:
            if self.ended:
                raise StopAsyncIteration
            self._news.clear()
            try:
                with self._deadline.within(self._config.wait_note_s):
                    await self._news.wait()
            except TimeoutError:
                return None
        if self._waiting:
            update = self._waiting.popleft()
            self._bytes -= _size(update)
            if self.paused and self._bytes <= self._config.buffer_bytes // 2:
                self._pause(on=False)
            return update
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def put(self, update: Update) -> None:
        """Something came from the engine."""
        if isinstance(update, Failed):
            self.fail(_as_api_error(update))
            return
        self.started = self.started or isinstance(update, Started)
        self.ended = isinstance(update, Done)
        last = self._waiting[-1] if self._waiting else None
        if isinstance(update, Tokens) and isinstance(last, Tokens):
            last.events.extend(update.events)
        else:
            self._waiting.append(update)
        self._bytes += _size(update)
        self._news.set()
        if self._bytes > self._config.buffer_bytes and not self.paused:
            self._pause(on=True)

    def fail(self, error: ApiError) -> None:
        """End with an error, which the reader sees after what came before it."""
        self.ended = True
        self._error = self._error or error
        self._news.set()

    def abort(self, sequence: int) -> None:
        """See Run."""
        if not self.ended:
            self._send(Abort(request=self.submit.request, sequence=sequence))

    def _pause(self, *, on: bool) -> None:
        self.paused = on
        if not self.ended:
            self._send(Pause(request=self.submit.request, on=on))


class Quarantine:
    """Requests that the engine worked on at more than one of its deaths; while that is recent, they are refused.

    Requests are the same if they ask the same of the engine; the seed, which may have been drawn, does not count.
    """

    def __init__(self, within_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._within_s = within_s
        self._clock = clock
        self._deaths: deque[tuple[float, frozenset[bytes]]] = deque()

    def note(self, submits: list[Submit]) -> None:
        """The engine died while it worked on these requests."""
        self._deaths.append((self._clock(), frozenset(map(self.key, submits))))

    def holds(self, submit: Submit) -> bool:
        """Whether to refuse the request."""
        while self._deaths and self._clock() - self._deaths[0][0] > self._within_s:
            self._deaths.popleft()
        if len(self._deaths) < 2:
            return False
        key = self.key(submit)
        return sum(key in present for _, present in self._deaths) >= 2

    @staticmethod
    def key(submit: Submit) -> bytes:
        """A digest of what the request asks of the engine."""
        params = msgspec.structs.replace(submit.params, seed=None)
        routing = (submit.routing, submit.routing_prompt)
        asked = (submit.prompts, params, submit.n, submit.constraint, *routing, submit.adapter)
        return hashlib.blake2b(msgspec.msgpack.encode(asked), digest_size=16).digest()


class Client:
    """An Engine (see ``server/engine.py``) that runs behind a channel, in a process that is watched and restarted.

    ``spawn`` starts what is at the other end. Lives in the event loop that calls ``start``.
    """

    def __init__(self, spawn: Spawn, config: ServerConfig, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics()
        self.supervisor = Supervisor(spawn, self, config)
        self._config = config
        self._runs: dict[str, ClientRun] = {}
        self._quarantine = Quarantine(config.engine_deaths_within_s)
        self._hello: Hello | None = None
        self._tokenizer: Tokenizer | None = None
        self._victims: list[Submit] = []  # requests of which the dying engine itself said so
        self._scheduled: frozenset[str] = frozenset()  # requests that its present step works on
        self._draining = False
        self._loading_since = time.monotonic()
        self._load_s = 5.0  # how long the last start took
        self._ready = asyncio.Event()
        self._task: asyncio.Task[MixtralError] | None = None

    # --- what an Engine is --------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the model in the API. This and the next ones raise ApiError until an engine was ready."""
        return self._known().name

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """Those that a request can choose by name."""
        return self._known().adapters

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._known().context

    @property
    def cache_tokens(self) -> int:
        """What the key-value cache holds."""
        return self._known().cache_tokens

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._known().vocab_size

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self._known().layers

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self._known().experts

    @property
    def fingerprint(self) -> str:
        """Equal for engines that give equal answers."""
        return self._known().fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise self._unavailable()
        return self._tokenizer

    @property
    def state(self) -> State:
        """How the engine is; "draining" once ``drain`` was called."""
        return "draining" if self._draining and self.supervisor.state != "dead" else self.supervisor.state

    @property
    def busy(self) -> bool:
        """Whether a request is open."""
        return bool(self._runs)

    async def start(self) -> None:
        """Start the engine; returns at once."""
        self._task = asyncio.create_task(self.supervisor.run())

    async def until_ready(self) -> None:
        """Wait until requests are taken. Raises MixtralError when that will never be."""
        ready, ended = asyncio.create_task(self._ready.wait()), asyncio.create_task(self.until_ended())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise ended.result()
        finally:
            ready.cancel()
            ended.cancel()

    async def until_ended(self) -> MixtralError:
        """Wait for the end of the last engine; returns why there is no other."""
        if self._task is None:
            raise RuntimeError("start() comes first")
        return await asyncio.shield(self._task)

    @contextlib.asynccontextmanager
    async def run(self, submit: Submit) -> AsyncIterator[ClientRun]:
        """Submit a request; leaving the block aborts what is not finished.

        Raises:
            ApiError: 503 when no requests are taken now; 400 for one that was there when the engine died, twice.
        """
        self._check(submit)
        run = ClientRun(submit, self._config, send=self._send)
        self._runs[submit.request] = run
        self._count()
        try:
            self._send(submit)
            yield run
        except BaseException as error:
            if not run.ended:
                self.metrics.aborted("slow_reader" if run.paused else _reason(error))
            raise
        finally:
            self._forget(run)

    def drain(self) -> None:
        """Refuse new requests; those that are open are finished."""
        self._draining = True

    def abort(self) -> None:
        """Refuse new requests and end all others with ``server_shutting_down``."""
        self._draining = True
        for run in list(self._runs.values()):
            if not run.ended:
                run.fail(self._unavailable())
                self.metrics.aborted("shutdown")
                self._send(Abort(request=run.submit.request))

    async def close(self) -> None:
        """Abort what is left and end the engine."""
        self.abort()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- what the supervisor tells ------------------------------------------------------------------------------------

    def on_hello(self, hello: Hello) -> None:
        """See Owner."""
        if self._hello is None:
            self._tokenizer = Tokenizer.from_version(hello.tokenizer, respell=hello.respell)
            for name, adapter in hello.adapters.items():
                _log.info("adapter %s (%s): %d bytes", name, adapter.root, adapter.size_bytes)
        elif msgspec.structs.replace(hello, cache_tokens=self._hello.cache_tokens) != self._hello:
            raise EngineError("the engine that was started again serves another model than before")
        self._hello = hello
        self._scheduled = frozenset()
        self._load_s = time.monotonic() - self._loading_since
        self.metrics.engine(up=True, restarts=self.supervisor.restarts)
        self._ready.set()

    def on_beat(self, beat: Heartbeat) -> None:
        """See Owner."""
        self.metrics.beat(beat)

    def on_scheduled(self, scheduled: Scheduled) -> None:
        """See Owner."""
        self._scheduled = frozenset(scheduled.requests)

    def on_update(self, update: Update) -> None:
        """See Owner. What comes for a request that was aborted meanwhile is dropped."""
        run = self._runs.get(update.request)
        if run is not None and not run.ended:
            if isinstance(update, Failed) and update.code == EngineError.code:
                self._victims.append(run.submit)
            waited = not run.started
            run.put(update)
            self.metrics.progress(run.times, update, sequences=len(run.submit.prompts) * run.submit.n)
            if waited and (run.started or run.ended):
                self._count()

    def on_down(self, reason: str) -> None:
        """See Owner."""
        self._loading_since = time.monotonic()
        self.metrics.engine(up=False, restarts=self.supervisor.restarts + 1)
        runs = [run for run in self._runs.values() if not run.ended]
        had = [*self._victims, *(run.submit for run in runs)]
        self._quarantine.note([submit for submit in had if submit.request in self._scheduled])
        self._victims.clear()
        if runs:
            _log.error("%d requests end: the engine ended, %s", len(runs), reason)
        message = "the engine ended while it had this request; it is started again, and this request is not"
        for run in runs:
            run.fail(ApiError(500, EngineError.code, message, headers=_NO_RETRY))

    def on_tick(self, lag_s: float) -> None:
        """See Owner."""
        self.metrics.loop_lag(lag_s)

    def _known(self) -> Hello:
        if self._hello is None:
            raise self._unavailable()
        return self._hello

    def _check(self, submit: Submit) -> None:
        if self._draining or self.supervisor.state != "ready":
            raise self._unavailable()
        if submit.request in self._runs:
            raise RuntimeError(f"there is a request {submit.request} already")
        if self._quarantine.holds(submit):
            message = "this request was running when the engine ended, more than once; it is not run again for a while"
            raise ApiError(400, "request_quarantined", message)

    def _unavailable(self) -> ApiError:
        if self._draining or self.supervisor.state == "dead":
            left = math.ceil(self._config.drain_s)
            return overloaded("server_shutting_down", "the server is shutting down", retry_after_s=_clamp(left))
        left = math.ceil(self._load_s - (time.monotonic() - self._loading_since))
        if self._hello is None:
            return overloaded("model_loading", "the model is being loaded", retry_after_s=_clamp(left))
        return overloaded("engine_restarting", "the engine is being restarted", retry_after_s=_clamp(left))

    def _send(self, message: ToEngine) -> None:
        self.supervisor.write(frames_of([message]))

    def _forget(self, run: ClientRun) -> None:
        del self._runs[run.submit.request]
        if not run.ended:
            run.ended = True
            self._send(Abort(request=run.submit.request))
        self.metrics.finished(run.times)
        self._count()

    def _count(self) -> None:
        waiting = [run.submit for run in self._runs.values() if not (run.started or run.ended)]
        running = sum(run.started and not run.ended for run in self._runs.values())
        tokens = sum(submit.n * sum(map(len, submit.prompts)) for submit in waiting)
        self.metrics.requests(waiting=len(waiting), waiting_tokens=tokens, running=running)


def _as_api_error(failed: Failed) -> ApiError:
    if failed.code in _REFUSED:
        return ApiError(400, failed.code, failed.message, param=failed.param)
    return ApiError(500, failed.code, failed.message, param=failed.param, headers=_NO_RETRY)


def _reason(error: BaseException) -> str:
    """Why a request was aborted; one of a few words, as it is a label of a metric."""
    if isinstance(error, ApiError):
        return error.code if error.code in ("queue_timeout", "generation_timeout") else "error"
    return "disconnect" if isinstance(error, asyncio.CancelledError | GeneratorExit | ClientGone) else "error"


def _size(update: Update) -> int:
    """Bytes of tokens that wait, about. What comes once per request does not count."""
    if not isinstance(update, Tokens):
        return 0
    size = len(update.events) * _EVENT_BYTES
    for event in update.events:
        if event.top:
            size += len(event.top) * _CANDIDATE_BYTES
        if event.routing is not None:
            size += len(event.routing.experts) + len(event.routing.weights)
    return size


def _clamp(seconds: int) -> int:
    return min(60, max(1, seconds))
