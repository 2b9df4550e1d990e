"""An engine without a model: it answers with texts it was given, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from mixtral.server import Server, ServerConfig, ThreadEngine
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Candidate, Done, SamplingParams, Started, Submit, TokenEvent, Tokens, Update

CONTEXT = 512
MESSAGES = [{"role": "user", "content": "When does breakfast start?"}]
CALL = '[{"name": "get_hours", "arguments": {"place": "Castle"}}]'


class FakeEngine:
    """A source for ThreadEngine. ``reply`` is a text, ids, or a function of the prompt's ids giving either.

    ``delay_s`` passes before each token. After ``fails_after`` tokens it raises ``error``. ``opened`` and ``closed``
    count streams. ``hold`` makes it wait before the first token.
    """

    def __init__(
        self,
        reply: str
        | Sequence[int]
        | Callable[[Sequence[int]], str | Sequence[int]] = "Breakfast is from 07:00 to 10:30.",
        *,
        version: str = "v3",
        delay_s: float = 0.0,
        fails_after: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self.name = "fake"
        self.context = CONTEXT
        self.tokenizer = Tokenizer.from_version(version)
        self.vocab_size = self.tokenizer.vocab_size
        self.cache_tokens, self.layers, self.experts, self.fingerprint = 10**6, 4, 8, "fp_fake"
        self.reply = reply
        self.delay_s = delay_s
        self.fails_after = fails_after
        self.error = error or RuntimeError("secret detail /root/weights")
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.submits: list[Submit] = []
        self.opened = self.closed = self.tokens = 0
        self.hold: threading.Event | None = None

    def updates(self, submit: Submit) -> Iterator[Update]:
        self.opened += 1
        try:
            self.submits.append(submit)
            self.prompts.extend(list(prompt) for prompt in submit.prompts)
            self.params.append(submit.params)
            yield Started(request=submit.request, cached=(0,) * len(submit.prompts))
            if self.hold is not None and not self.hold.wait(timeout=20):
                raise TimeoutError("nobody let the fake engine go on")
            answers = [self._ids(prompt) for prompt in submit.prompts for _ in range(submit.n)]
            for event in self._events(answers, submit.params):
                yield Tokens(request=submit.request, events=[event])
            yield Done(request=submit.request)
        finally:
            self.closed += 1

    def _ids(self, prompt: Sequence[int]) -> list[int]:
        reply = self.reply(prompt) if callable(self.reply) else self.reply
        return self.tokenizer.encode(reply, eos=True) if isinstance(reply, str) else list(reply)

    def _events(self, answers: list[list[int]], params: SamplingParams) -> Iterator[TokenEvent]:
        for step in range(params.max_tokens):
            for sequence, ids in enumerate(answers):
                if step >= len(ids):
                    continue
                if self.fails_after is not None and self.tokens >= self.fails_after:
                    raise self.error
                time.sleep(self.delay_s)
                self.tokens += 1
                yield self._event(sequence, ids[step], params, last=step + 1 == params.max_tokens)

    def _event(self, sequence: int, id: int, params: SamplingParams, *, last: bool) -> TokenEvent:
        top = tuple(Candidate((id + n) % self.vocab_size, -0.5 - n) for n in range(params.logprobs or 0))
        return TokenEvent(
            sequence=sequence,
            id=id,
            logprob=None if params.logprobs is None else -0.5,
            top=top,
            finish_reason="stop" if id in (params.stop_ids or (2,)) else "length" if last else None,
        )


def calling(tokenizer: Tokenizer, text: str = CALL) -> list[int]:
    """Ids of an answer that is a function call."""
    return [tokenizer.control_id("[TOOL_CALLS]"), *tokenizer.encode(text, eos=True)]


@contextlib.contextmanager
def listening(engine: FakeEngine, config: ServerConfig | None = None) -> Iterator[str]:
    """A real server on a free loopback port, in a thread; gives its address and stops it at the end."""
    ready = threading.Event()
    addresses: list[str] = []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    config = config or ServerConfig(port=0, drain_s=1.0)
    server = Server(ThreadEngine(engine, config), config, on_ready)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        if not ready.wait(timeout=20):
            raise TimeoutError("the server did not start")
        yield addresses[0]
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        if thread.is_alive():
            raise TimeoutError("the server did not stop")


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Return as soon as ``condition`` holds; TimeoutError if it never does."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)
