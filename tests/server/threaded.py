"""Engines for tests in this process: a source that runs one request at a time, and a model that was loaded."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from starlette.testclient import TestClient

import mixtral
from mixtral.engine.engine import Engine
from mixtral.engine.loop import EngineThread
from mixtral.errors import MixtralError
from mixtral.grammar import Grammar
from mixtral.server import Client, Grammars, build
from mixtral.server.config import ServerConfig
from mixtral.server.engine import State
from mixtral.server.errors import ApiError, overloaded
from mixtral.server.metrics import Metrics
from mixtral.tokenizer import Tokenizer
from mixtral.wire import AdapterInfo, Failed, Hello, Submit, Update

_ROOM = 64  # updates that may wait for a reader


class Source(Protocol):
    """A description as in Engine, and updates of one request. Closing the iterator frees everything."""

    name: str
    adapters: dict[str, AdapterInfo]
    context: int
    cache_tokens: int
    vocab_size: int
    layers: int
    experts: int
    fingerprint: str
    tokenizer: Tokenizer

    def updates(self, submit: Submit) -> Iterator[Update]: ...


class ThreadRun:
    """Updates of one request on their way from the thread to the event loop; a Run.

    At most ``_ROOM`` updates wait; a reader that stands still for ``stall_timeout_s`` ends the run.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.aborted: list[int] = []
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Update | Exception] = asyncio.Queue()
        self._room = threading.Semaphore(_ROOM)
        self._cancelled = threading.Event()

    def __aiter__(self) -> ThreadRun:
        return self

    async def __anext__(self) -> Update | None:
        try:
            async with asyncio.timeout(self._config.wait_note_s):
                item = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        self._room.release()
        if isinstance(item, Failed):
            raise ApiError(500, item.code, item.message, param=item.param)
        return item

    def abort(self, sequence: int) -> None:
        """The source goes on with all; what comes for this one means nothing."""
        self.aborted.append(sequence)

    def cancel(self) -> None:
        """The iterator of updates is closed after the one it is working on."""
        self._cancelled.set()
        self._room.release()

    def fail(self, error: Exception) -> None:
        """Cancel, and let the reader see ``error`` after the updates that already came."""
        self.cancel()
        self._queue.put_nowait(error)

    def pump(self, source: Source, submit: Submit) -> None:
        """The thread's part: take updates until they end or fail, or the run is cancelled."""
        end: Exception = StopAsyncIteration()
        try:
            updates = iter(()) if self._cancelled.is_set() else source.updates(submit)
            try:
                for update in updates:
                    if self._cancelled.is_set():
                        break
                    if not self._room.acquire(timeout=self._config.stall_timeout_s):
                        end = overloaded("slow_reader", "the client did not read its answer", retry_after_s=1)
                        break
                    self._post(update)
            finally:
                if isinstance(updates, Generator):
                    updates.close()
        except Exception as error:
            end = error
        self._post(end)

    def _post(self, item: Update | Exception) -> None:
        # A closed loop has no readers left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class ThreadEngine:
    """Runs requests on a source, one at a time and in order of arrival; an Engine. Lives in one event loop."""

    def __init__(self, source: Source, config: ServerConfig) -> None:
        self.source = source
        self.name, self.context, self.vocab_size = source.name, source.context, source.vocab_size
        self.adapters = source.adapters
        self.cache_tokens, self.layers, self.experts = source.cache_tokens, source.layers, source.experts
        self.fingerprint, self.tokenizer = source.fingerprint, source.tokenizer
        self.state: State = "ready"
        self.metrics = Metrics()
        self._config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixtral-engine")
        self._runs: set[ThreadRun] = set()

    @property
    def busy(self) -> bool:
        """See Engine."""
        return bool(self._runs)

    @property
    def held(self) -> int:
        """Requests that run or wait."""
        return len(self._runs)

    async def start(self) -> None:
        """See Engine."""

    async def until_ready(self) -> None:
        """See Engine."""

    async def until_ended(self) -> MixtralError:
        """See Engine."""
        never: asyncio.Future[MixtralError] = asyncio.get_running_loop().create_future()
        return await never

    @contextlib.asynccontextmanager
    async def run(self, submit: Submit) -> AsyncIterator[ThreadRun]:
        """See Engine. The next request waits for the thread, which may be in the middle of a step."""
        if self.state == "draining":
            raise self._stopping()
        run = ThreadRun(self._config)
        self._runs.add(run)
        asyncio.get_running_loop().run_in_executor(self._thread, run.pump, self.source, submit)
        try:
            yield run
        finally:
            run.cancel()
            self._runs.discard(run)

    def drain(self) -> None:
        """See Engine."""
        self.state = "draining"

    def abort(self) -> None:
        """See Engine."""
        self.drain()
        for run in self._runs:
            run.fail(self._stopping())

    async def close(self) -> None:
        """See Engine."""
        self.abort()
        await asyncio.to_thread(self._thread.shutdown)

    def _stopping(self) -> ApiError:
        seconds = min(60, max(1, math.ceil(self._config.drain_s)))
        return overloaded("server_shutting_down", "the server is shutting down", retry_after_s=seconds)


@contextlib.contextmanager
def serving_model(llm: mixtral.LLM, *, constrained: bool = False) -> Iterator[TestClient]:
    """Calls to a server over a model that was loaded in this process, with the real loop and client between them.

    ``constrained``: it has grammars, as ``mixtral serve`` has.
    """
    hello = Hello(
        name=llm.name,
        context=llm.context,
        vocab_size=llm.vocab_size,
        layers=llm.config.num_hidden_layers,
        experts=llm.config.num_local_experts,
        tokenizer=llm.tokenizer.version,
        respell=llm.tokenizer.respell,
        cache_tokens=llm.generator.engine.cache_tokens,
        fingerprint="fp_test",
    )
    compiler = Grammar(llm.tokenizer) if constrained else None
    client = Client(
        lambda: EngineThread(lambda: (Engine(llm.generator.model, grammar=compiler), hello)), ServerConfig()
    )
    app = build(client, grammar=Grammars(client) if constrained else None)
    with TestClient(app, base_url="http://127.0.0.1:8000") as calls:
        while calls.get("/ready").status_code != 200:
            time.sleep(0.01)
        yield calls
