"""The engine as the server sees it, and the one thread that runs it: one request at a time, others queue."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from mixtral.server.config import ServerConfig
from mixtral.server.errors import ApiError, overloaded
from mixtral.tokenizer import Tokenizer
from mixtral.wire import SamplingParams, TokenEvent

__all__ = ["Engine", "Run", "Runner"]


class Engine(Protocol):
    """A model with its tokenizer, as handed in by the caller. ``context`` counts tokens of prompt and answer."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[TokenEvent]:
        """One event per sampled token; ``sequence`` is the prompt's place. Closing the iterator frees everything."""
        ...


class Run:
    """Tokens of one request on their way from the engine thread to the event loop.

    Iterate over it in the event loop: each item is an event, or None when nothing came for ``wait_note_s``. What the
    engine raises is raised there. At most ``buffer_tokens`` wait; a reader that stands still for ``stall_timeout_s``
    ends the run.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self._room = threading.Semaphore(config.buffer_tokens)
        self._cancelled = threading.Event()
        self._deadline = time.monotonic() + config.request_timeout_s

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> TokenEvent | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            message = f"the answer took longer than {self._config.request_timeout_s:g} s; lower max_tokens"
            raise ApiError(504, "generation_timeout", message, headers={"x-should-retry": "false"})
        try:
            async with asyncio.timeout(min(left, self._config.wait_note_s)):
                item = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        self._room.release()
        return item

    def cancel(self) -> None:
        """The engine's iterator is closed after the token it is working on."""
        self._cancelled.set()
        self._room.release()

    def fail(self, error: Exception) -> None:
        """Cancel, and let the reader see ``error`` after the tokens that already came."""
        self.cancel()
        self._queue.put_nowait(error)

    def pump(self, engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """The engine thread's part: take tokens from the engine until it ends, fails, or the run is cancelled."""
        end: Exception = StopAsyncIteration()
        try:
            events = iter(()) if self._cancelled.is_set() else engine.stream(prompts, params)
            try:
                for event in events:
                    if self._cancelled.is_set():
                        break
                    if not self._room.acquire(timeout=self._config.stall_timeout_s):
                        end = overloaded("slow_reader", "the client did not read its answer", retry_after_s=1)
                        break
                    self._post(event)
            finally:
                if isinstance(events, Generator):
                    events.close()
        except Exception as error:
            end = error
        self._post(end)

    def _post(self, item: TokenEvent | Exception) -> None:
        # A closed loop has no readers left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class Runner:
    """Runs requests on the engine, one at a time and in order of arrival. Lives in one event loop."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine = engine
        self.waiting = 0
        self._config = config
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mixtral-engine")
        self._current: Run | None = None
        self._draining = self._aborted = False
        self._seconds = 1.0  # moving average of a request's time on the engine

    @property
    def busy(self) -> bool:
        """Whether the engine works on a request, or still has to notice that its client left."""
        return self._turn.locked()

    @contextlib.asynccontextmanager
    async def run(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> AsyncIterator[Run]:
        """Wait for the engine and generate; leaving the block, for whatever reason, stops the engine within a token.

        Raises:
            ApiError: 503, when the queue is full, the wait was too long, or the server is stopping.
        """
        await self._enter()
        run = Run(self._config)
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._thread, run.pump, self.engine, prompts, params)
        # The next request waits for the thread, not for this block: the engine may be in the middle of a step.
        done.add_done_callback(lambda _: self._leave(started))
        self._current = run
        try:
            yield run
        finally:
            run.cancel()

    def drain(self) -> None:
        """Refuse new requests; those that run or wait are finished."""
        self._draining = True

    def abort(self) -> None:
        """Refuse new requests and end all others with ``server_shutting_down``."""
        self._draining = self._aborted = True
        if self._current is not None and self.busy:
            self._current.fail(self._stopping())

    async def close(self) -> None:
        """Abort what is left and wait for the engine thread to end."""
        self.abort()
        await asyncio.to_thread(self._thread.shutdown)

    async def _enter(self) -> None:
        if self._draining:
            raise self._stopping()
        if self.waiting >= self._config.queue_size and (self.busy or self.waiting):
            message = f"the server is busy and {self.waiting} requests are waiting, the most it allows; try again later"
            raise overloaded("server_overloaded", message, retry_after_s=self._retry_after_s())
        self.waiting += 1
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                await self._turn.acquire()
        except TimeoutError:
            message = f"the request waited {self._config.queue_timeout_s:g} s in the queue, the most this server allows"
            raise overloaded("queue_timeout", message, retry_after_s=self._retry_after_s()) from None
        finally:
            self.waiting -= 1
        if self._aborted:
            self._turn.release()
            raise self._stopping()

    def _leave(self, started: float) -> None:
        self._seconds += 0.3 * (time.monotonic() - started - self._seconds)
        self._turn.release()

    def _retry_after_s(self) -> int:
        return min(60, max(1, math.ceil(self._seconds * (self.waiting + 1))))

    def _stopping(self) -> ApiError:
        seconds = min(60, max(1, math.ceil(self._config.drain_s)))
        return overloaded("server_shutting_down", "the server is shutting down", retry_after_s=seconds)
