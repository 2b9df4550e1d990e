"""The door to the engine: a queue bounded in requests and in tokens, time limits, and how long to stay away."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable

from mixtral.server.config import ServerConfig
from mixtral.server.deadline import Deadline
from mixtral.server.engine import Engine, Run
from mixtral.server.errors import ApiError, overloaded
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Started, Submit, Tokens, Update

__all__ = ["Admission", "AdmittedRun", "Throughput"]

_ASSUMED_RATE = 100.0  # tokens per second, as long as nothing was measured


class Throughput:
    """Tokens per second, averaged over the last ``window_s`` seconds in which something was counted."""

    def __init__(self, window_s: float = 20.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._tokens = self._seconds = 0.0
        self._last: float | None = None

    def count(self, tokens: int) -> None:
        """Tokens that were read or made since the last call."""
        now = self._clock()
        if self._last is not None:
            passed = min(now - self._last, 1.0)  # a longer pause had no work in it
            fade = math.exp(-passed / self._window_s)
            self._tokens = self._tokens * fade + tokens
            self._seconds = self._seconds * fade + passed
        self._last = now

    def per_second(self) -> float:
        """The average; an assumption before anything was counted."""
        return self._tokens / self._seconds if self._seconds > 0.1 and self._tokens else _ASSUMED_RATE


class Admission:
    """Hands requests to the engine as long as not too many wait there; one per server, in its event loop."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.waiting = self.waiting_tokens = 0
        self.throughput = Throughput()
        self._engine = engine
        self._config = config

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's."""
        return self._engine.tokenizer

    @contextlib.asynccontextmanager
    async def run(self, submit: Submit) -> AsyncIterator[AdmittedRun]:
        """As ``Engine.run``, with bounds. Leaving the block ends the request.

        Raises:
            ApiError: 503 ``server_overloaded`` at once when the queue is full; while reading updates, 503
                ``queue_timeout`` or 504 ``generation_timeout``.
        """
        tokens = submit.n * sum(map(len, submit.prompts))
        self._check(tokens)
        self.waiting += 1
        self.waiting_tokens += tokens
        async with contextlib.AsyncExitStack() as stack:
            queued = contextlib.ExitStack()
            queued.callback(self._left, tokens)
            stack.enter_context(queued)
            run = await stack.enter_async_context(self._engine.run(submit))
            yield AdmittedRun(run, self, self._config, leave_queue=queued.close)

    def retry_after_s(self) -> int:
        """Seconds until the tokens that wait now are done, 1 to 60."""
        return min(60, max(1, math.ceil(self.waiting_tokens / self.throughput.per_second())))

    def _check(self, tokens: int) -> None:
        config = self._config
        if tokens > config.queue_tokens:
            message = f"the prompts have {tokens} tokens together; the limit is {config.queue_tokens}. Send fewer."
            raise ApiError(400, "request_exceeds_cache", message, param="prompt")
        if self.waiting >= config.queue_size or (self.waiting and self.waiting_tokens + tokens > config.queue_tokens):
            message = (
                f"{self.waiting} requests with {self.waiting_tokens} tokens are waiting; this server allows "
                f"{config.queue_size} with {config.queue_tokens}. Try again later."
            )
            raise overloaded("server_overloaded", message, retry_after_s=self.retry_after_s())

    def _left(self, tokens: int) -> None:
        self.waiting -= 1
        self.waiting_tokens -= tokens


class AdmittedRun:
    """A Run that keeps the time limits and measures what the engine does."""

    def __init__(self, run: Run, door: Admission, config: ServerConfig, *, leave_queue: Callable[[], None]) -> None:
        now = time.monotonic()
        self._run = run
        self._door = door
        self._config = config
        self._leave_queue = leave_queue
        self._queue_end: float | None = now + config.queue_timeout_s
        self._end = now + config.request_timeout_s
        self._deadline = Deadline()

    def __aiter__(self) -> AdmittedRun:
        return self

    async def __anext__(self) -> Update | None:
        end = min(self._end, self._queue_end or self._end)
        try:
            with self._deadline.within(max(end - time.monotonic(), 0)):
                update = await self._run.__anext__()
        except TimeoutError:
            raise self._too_late() from None
        if isinstance(update, Started):
            self._queue_end = None
            self._leave_queue()
            self._door.throughput.count(0)
        elif isinstance(update, Tokens):
            self._door.throughput.count(len(update.events))
        return update

    def abort(self, sequence: int) -> None:
        """See Run."""
        self._run.abort(sequence)

    def _too_late(self) -> ApiError:
        if self._queue_end is not None and self._queue_end <= self._end:
            waited = self._config.queue_timeout_s
            message = f"the request waited {waited:g} s in the queue, the most this server allows"
            return overloaded("queue_timeout", message, retry_after_s=self._door.retry_after_s())
        message = f"the answer took longer than {self._config.request_timeout_s:g} s; lower max_tokens"
        return ApiError(504, "generation_timeout", message, headers={"x-should-retry": "false"})
