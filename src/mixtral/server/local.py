"""An engine in a thread of this process: one request at a time, in order of arrival."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from mixtral.errors import MixtralError
from mixtral.server.config import ServerConfig
from mixtral.server.engine import State
from mixtral.server.errors import ApiError, overloaded
from mixtral.server.metrics import Metrics
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Done, Failed, Started, Submit, TokenEvent, Tokens, Update
from mixtral.wire.sampling import SamplingParams

__all__ = ["Generating", "Plain", "Source", "ThreadEngine", "ThreadRun"]


class Generating(Protocol):
    """A model that makes tokens, as ``mixtral.load`` returns it."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[TokenEvent]: ...


class Source(Protocol):
    """A description as in Engine, and updates of one request. Closing the iterator frees everything."""

    name: str
    context: int
    cache_tokens: int
    vocab_size: int
    layers: int
    experts: int
    fingerprint: str
    tokenizer: Tokenizer

    def updates(self, submit: Submit) -> Iterator[Update]: ...


class Plain:
    """A Source over a model that only makes tokens: no constraints, no scores of prompts, no routing."""

    def __init__(self, model: Generating, *, layers: int = 0, experts: int = 0) -> None:
        self.name = model.name
        self.context = self.cache_tokens = model.context
        self.vocab_size = model.vocab_size
        self.layers, self.experts = layers, experts
        self.tokenizer = model.tokenizer
        self.fingerprint = f"fp_{hashlib.sha256(model.name.encode()).hexdigest()[:16]}"
        self._model = model

    def updates(self, submit: Submit) -> Iterator[Update]:
        """Updates of one request. Raises ApiError for what this engine cannot do."""
        for asked, param in (
            (submit.constraint is not None, "response_format"),
            (submit.params.prompt_logprobs is not None, "echo"),
            (submit.routing, "mixtral.routing"),
        ):
            if asked:
                message = f"{param} needs an engine that this server was not started with; leave it out"
                raise ApiError(400, "unsupported_parameter", message, param=param)
        prompts = [prompt for prompt in submit.prompts for _ in range(submit.n)]
        yield Started(request=submit.request, cached=(0,) * len(submit.prompts))
        with contextlib.closing(self._events(prompts, submit.params)) as events:
            for event in events:
                yield Tokens(request=submit.request, events=[event])
        yield Done(request=submit.request)

    def _events(self, prompts: list[list[int]], params: SamplingParams) -> Generator[TokenEvent, None, None]:
        yield from self._model.stream(prompts, params)


class ThreadRun:
    """Updates of one request on their way from the thread to the event loop; a Run.

    At most ``buffer_tokens`` updates wait; a reader that stands still for ``stall_timeout_s`` ends the run.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Update | Exception] = asyncio.Queue()
        self._room = threading.Semaphore(config.buffer_tokens)
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
