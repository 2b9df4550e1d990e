"""An engine without a model: it answers with texts it was given, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from threaded import ThreadEngine

from mixtral.errors import RequestError
from mixtral.grammar import Source
from mixtral.server import Server, ServerConfig
from mixtral.tokenizer import Tokenizer
from mixtral.wire import (
    AdapterInfo,
    Candidate,
    Done,
    PromptScores,
    PromptToken,
    Routing,
    SamplingParams,
    Started,
    Submit,
    TokenEvent,
    Tokens,
    Update,
)

CONTEXT = 512
MESSAGES = [{"role": "user", "content": "When does breakfast start?"}]
CALL = '[{"name": "get_hours", "arguments": {"place": "Castle"}}]'


class FakeEngine:
    """A source for ThreadEngine. ``reply`` is a text, ids, or a function of the prompt's ids giving either.

    ``delay_s`` passes before each token. After ``fails_after`` tokens it raises ``error``. ``opened`` and ``closed``
    count streams, ``begun`` those whose beginning was handed on. ``hold`` makes it wait before the first token.
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
        self.adapters: dict[str, AdapterInfo] = {}
        self.context = CONTEXT
        self.tokenizer = Tokenizer.from_version(version)
        self.vocab_size = self.tokenizer.vocab_size
        self.cache_tokens, self.layers, self.experts, self.fingerprint = 10**6, 4, 8, "fp_fake"
        self.reply = reply
        self.cached = 0
        self.delay_s = delay_s
        self.fails_after = fails_after
        self.error = error or RuntimeError("secret detail /root/weights")
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.submits: list[Submit] = []
        self.opened = self.begun = self.closed = self.tokens = 0
        self.hold: threading.Event | None = None
        self.runner: ThreadEngine | None = None

    @property
    def held(self) -> int:
        """Requests that the server of ``listening`` has handed over, running or waiting."""
        return 0 if self.runner is None else self.runner.held

    def updates(self, submit: Submit) -> Iterator[Update]:
        self.opened += 1
        try:
            self.submits.append(submit)
            self.prompts.extend(list(prompt) for prompt in submit.prompts)
            self.params.append(submit.params)
            yield Started(request=submit.request, cached=(self.cached,) * len(submit.prompts))
            self.begun += 1
            if self.hold is not None and not self.hold.wait(timeout=60):
                raise TimeoutError("nobody let the fake engine go on")
            if submit.params.prompt_logprobs is not None:
                yield from self._scores(submit)
            answers = [self._ids(prompt) for prompt in submit.prompts for _ in range(submit.n)]
            for event in self._events(submit, answers):
                yield Tokens(request=submit.request, events=[event])
            yield Done(request=submit.request)
        finally:
            self.closed += 1

    def _scores(self, submit: Submit) -> Iterator[Update]:
        count = submit.params.prompt_logprobs or 0
        for place, prompt in enumerate(submit.prompts):
            tokens = [
                PromptToken(id=id, logprob=-1.5 if at else None, top=self._top(id, count) if at else ())
                for at, id in enumerate(prompt)
            ]
            yield PromptScores(request=submit.request, prompt=place, tokens=tokens)

    def _ids(self, prompt: Sequence[int]) -> list[int]:
        reply = self.reply(prompt) if callable(self.reply) else self.reply
        return self.tokenizer.encode(reply, eos=True) if isinstance(reply, str) else list(reply)

    def _events(self, submit: Submit, answers: list[list[int]]) -> Iterator[TokenEvent]:
        for step in range(submit.params.max_tokens):
            for sequence, ids in enumerate(answers):
                if step >= len(ids):
                    continue
                if self.fails_after is not None and self.tokens >= self.fails_after:
                    raise self.error
                if self.delay_s:
                    time.sleep(self.delay_s)
                self.tokens += 1
                yield self._event(submit, sequence, step, ids[step])

    def _event(self, submit: Submit, sequence: int, step: int, id: int) -> TokenEvent:
        params, prompt = submit.params, submit.prompts[sequence // submit.n]
        last = step + 1 == params.max_tokens
        routing = None
        if submit.routing:
            first = len(prompt) + step - 1 if step else 0 if submit.routing_prompt else len(prompt)
            routing = self.routing(first, len(prompt) + step - first)
        return TokenEvent(
            sequence=sequence,
            id=id,
            logprob=None if params.logprobs is None else -0.5,
            top=self._top(id, params.logprobs or 0),
            finish_reason="stop" if id in (params.stop_ids or (2,)) else "length" if last else None,
            routing=routing if routing is not None and routing.experts else None,
        )

    def routing(self, first: int, tokens: int) -> Routing:
        """Experts that tell position and layer."""
        places = [(first + token, layer) for token in range(tokens) for layer in range(self.layers)]
        experts = bytes((place + layer + each) % self.experts for place, layer in places for each in range(2))
        weights = b"".join(struct.pack("<ee", 0.5 + layer / 16, 0.5 - layer / 16) for _, layer in places)
        return Routing(first=first, experts=experts, weights=weights)

    def _top(self, id: int, count: int) -> tuple[Candidate, ...]:
        return tuple(Candidate((id + n) % self.vocab_size, -0.5 - n) for n in range(count))


class FakeGrammar:
    """Grammars that are only written down; ``error`` is raised instead, by the method called ``fails``."""

    def __init__(self) -> None:
        self.fails = ""
        self.error: Exception = RequestError("no", param="response_format", code="schema_unsupported")
        self.tried: list[str] = []
        self.hold: threading.Event | None = None  # trials wait for it

    def text_constraint(self, response_format: Mapping[str, Any]) -> Source:
        self._fail("text_constraint")
        return Source(json.dumps(response_format), "schema", "response_format")

    def calls_constraint(self, tools: Sequence[Mapping[str, Any]], *, name: str | None, parallel: bool) -> Source:
        self._fail("calls_constraint")
        names = [tool["function"]["name"] for tool in tools]
        return Source(json.dumps({"names": names, "name": name, "parallel": parallel}), "schema", "tools")

    cache_bytes = 0

    def close(self) -> None:
        """Nothing to give back."""

    def check(self, source: Source) -> None:
        self.tried.append(source.text)
        if self.hold is not None and not self.hold.wait(timeout=60):
            raise TimeoutError("nobody let the trials go on")
        self._fail("check")

    def _fail(self, method: str) -> None:
        if self.fails == method:
            raise self.error


def calling(tokenizer: Tokenizer, text: str = CALL) -> list[int]:
    """Ids of an answer that is a function call."""
    return [tokenizer.control_id("[TOOL_CALLS]"), *tokenizer.encode(text, eos=True)]


@contextlib.contextmanager
def listening(
    engine: FakeEngine, config: ServerConfig | None = None, grammar: FakeGrammar | None = None
) -> Iterator[str]:
    """A real server on a free loopback port, in a thread; gives its address and stops it at the end."""
    ready = threading.Event()
    addresses: list[str] = []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    config = config or ServerConfig(port=0, drain_s=1.0)
    engine.runner = ThreadEngine(engine, config)
    server = Server(engine.runner, config, on_ready, grammar=grammar)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        if not ready.wait(timeout=60):
            raise TimeoutError("the server did not start")
        yield addresses[0]
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        if thread.is_alive():
            raise TimeoutError("the server did not stop")


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return as soon as ``condition`` holds; TimeoutError if it never does."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)
