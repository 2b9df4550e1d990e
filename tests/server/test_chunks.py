"""Streams of answers: however tokens come together and bytes are cut, a client puts the same message together."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fake import MESSAGES, FakeEngine
from openai._streaming import SSEDecoder
from random_schemas import random_tools
from sampling import answer
from test_answer import TEXTS
from threaded import ThreadEngine

from mixtral.desk.write import SKILLS
from mixtral.errors import GrammarError
from mixtral.grammar import Grammar, calls_constraint
from mixtral.server import ServerConfig, work
from mixtral.server.protocol import read_chat
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint, Done, Started, Submit, TokenEvent, Tokens, Update

CALLS = 5  # the id that opens function calls
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL_TEXTS = [
    '[{"name": "f", "arguments": {"n": -12, "x": 2.50e-3, "deep": [[1, {"k": [null, true]}], "\\"\\\\\\n\\u00e9"]}}]',
    '[ {"name":"f","arguments":{}} ,\n {"arguments": {"a": "🥐 早餐"}, "name": "f"}, {"name": "f"}]',
    '[{"name": "f", "arguments": "{\\"in\\": 1}"}, {"id": "abcdefghi", "name": "f", "arguments": {"}": "]"}}]',
]


@dataclass
class Door:
    """Where requests go in: gives the same updates for every one."""

    tokenizer: Tokenizer
    updates: Sequence[Update]

    @contextlib.asynccontextmanager
    async def run(self, submit: Submit) -> AsyncIterator[AsyncIterator[Update]]:
        async def each() -> AsyncIterator[Update]:
            for update in self.updates:
                yield update

        yield each()


class Recorder:
    """Makes streams and whole answers of given tokens by the server's own way, without a network."""

    def __init__(self) -> None:
        self.engine = ThreadEngine(FakeEngine(), ServerConfig())
        self.grammar = Grammar(self.engine.tokenizer)
        self.logprobs = True
        self._runner = asyncio.Runner()

    def events(self, seed: int) -> list[TokenEvent]:
        """The tokens of an answer: text, or calls."""
        tokenizer = self.engine.tokenizer
        if seed < len(CALL_TEXTS):
            ids = [CALLS, *tokenizer.encode(CALL_TEXTS[seed], eos=True)]
        elif seed % 5 < 3:
            ids = self._calls(seed) or [CALLS, *tokenizer.encode(CALL_TEXTS[seed % len(CALL_TEXTS)], eos=True)]
        else:
            text = TEXTS[seed // 5] if seed < 5 * len(TEXTS) else document_text(seed)
            ids = [*tokenizer.encode(text)[:50], tokenizer.eos_id]
        last, listed = len(ids) - 1, -0.5 if self.logprobs else None
        return [
            TokenEvent(sequence=0, id=id, logprob=listed, finish_reason="stop" if place == last else None)
            for place, id in enumerate(ids)
        ]

    def _calls(self, seed: int) -> list[int] | None:
        """Calls drawn under the grammar of random functions; None where that cannot be kept, or takes too long."""
        try:
            source = calls_constraint(random_tools(seed))
            return answer(self.grammar, Constraint(calls=source.text, trigger=CALLS, forced=True), seed, most=60)
        except GrammarError:
            return None

    def whole(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """The message of a whole answer, with the reason of its end and the listed tokens."""
        body = self._runner.run(work.collect(self._door([events]), self._work(stream=False)))
        (choice,) = body["choices"]
        message = {**choice["message"], "content": choice["message"]["content"] or ""}
        tokens = (choice["logprobs"] or {"content": []})["content"]
        return {"message": message, "finish_reason": choice["finish_reason"], "tokens": tokens}

    def stream(self, groups: Sequence[Sequence[TokenEvent]]) -> bytes:
        """The bytes of a stream for which tokens came in these groups."""

        async def run() -> bytes:
            return b"".join([data async for data in work.stream(self._door(groups), self._work(stream=True))])

        return self._runner.run(run())

    def close(self) -> None:
        """End the event loop."""
        self._runner.close()

    def _door(self, groups: Sequence[Sequence[TokenEvent]]) -> Any:
        tokens = [Tokens(request="a", events=list(group)) for group in groups]
        return Door(self.engine.tokenizer, [Started(request="a", cached=(0,)), *tokens, Done(request="a")])

    def _work(self, *, stream: bool) -> work.Work:
        body = {"model": "fake", "messages": MESSAGES, "tools": TOOLS, "seed": 1, "stream": stream}
        body["logprobs"] = self.logprobs
        wanted = read_chat(body, vocab_size=self.engine.vocab_size, layers=self.engine.layers)
        return work.begin(self.engine, work.prepare_chat(self.engine, wanted, None, ""))


def document_text(seed: int) -> str:
    """A text in one of five languages."""
    document = SKILLS[("chat", "records", "sums", "notes")[seed % 4]](0, "train", seed)
    return "\n".join(str(message.get("content")) for message in document.messages)


def data_of(chunks: Iterator[bytes]) -> list[str]:
    """What the client of OpenAI reads from bytes that come like this."""
    return [event.data for event in SSEDecoder().iter_bytes(chunks)]


def message_of(data: Sequence[str]) -> dict[str, Any]:
    """What a client puts together."""
    assert data[-1] == "[DONE]"
    message: dict[str, Any] = {"role": "", "content": "", "refusal": None}
    tokens: list[Any] = []
    finish = None
    for text in data[:-1]:
        (choice,) = json.loads(text)["choices"]
        assert finish is None, "something follows the end"
        finish, delta = choice["finish_reason"], choice["delta"]
        message["role"] += delta.get("role", "")
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            made = message.setdefault("tool_calls", [])
            if call["index"] == len(made):
                made.append({"id": call["id"], "type": call["type"], "function": {"name": "", "arguments": ""}})
                made[-1]["function"]["name"] = call["function"]["name"]
            made[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        tokens += (choice["logprobs"] or {"content": []})["content"]
    return {"message": message, "finish_reason": finish, "tokens": tokens}


def groupings(events: list[TokenEvent], draw: random.Random) -> Iterator[list[list[TokenEvent]]]:
    """One by one, all at once, in two at every place, and in random groups."""
    yield [[event] for event in events]
    yield [events]
    for place in range(1, len(events)):
        yield [events[:place], events[place:]]
    for _ in range(8):
        cuts = sorted({0, len(events), *(draw.randrange(len(events)) for _ in range(draw.randint(1, len(events))))})
        yield [events[begin:end] for begin, end in itertools.pairwise(cuts)]


def check_cuts(stream: bytes, expected: list[str], draw: random.Random) -> int:
    """Bytes one by one, cut at random places, and each pair of neighbouring events cut at every place; how many."""
    assert data_of(stream[place : place + 1] for place in range(len(stream))) == expected
    for _ in range(10):
        place = draw.randrange(len(stream))
        assert data_of(iter([stream[:place], stream[place:]])) == expected
    blocks = [block + b"\n\n" for block in stream.split(b"\n\n")[:-1]]
    assert len(blocks) == len(expected)
    cuts = 0
    for number in range(len(blocks) - 1):
        pair = blocks[number] + blocks[number + 1]
        for place in range(1, len(pair) if number == len(blocks) - 2 else len(blocks[number]) + 1):
            assert data_of(iter([pair[:place], pair[place:]])) == expected[number : number + 2]
            cuts += 1
    return cuts


def check_streams(seeds: range) -> tuple[int, int, int]:
    """How many groupings and cuts were looked at, and how many calls there were."""
    recorder = Recorder()
    grouped = cuts = calls = 0
    with contextlib.closing(recorder):
        for seed in seeds:
            recorder.logprobs = seed % 4 == 0
            draw, events = random.Random(seed), recorder.events(seed)
            whole = recorder.whole(events)
            calls += len(whole["message"].get("tool_calls", []))
            for groups in groupings(events, draw):
                stream = recorder.stream(groups)
                data = data_of(iter([stream]))
                found = message_of(data)
                assert found == whole, f"{seed}: {[len(group) for group in groups]}"
                grouped += 1
                if len(groups) == len(events):
                    cuts += check_cuts(stream, data, draw)
    return grouped, cuts, calls


def test_some_streams_are_the_same_message_however_they_are_cut() -> None:
    grouped, cuts, calls = check_streams(range(4))
    assert grouped > 100
    assert cuts > 5000
    assert calls > 5


def test_a_piece_that_gets_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "joined", lambda pieces: pieces[-1])
    with pytest.raises(AssertionError):
        check_streams(range(1))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_streams_are_the_same_message_however_they_are_cut() -> None:
    grouped, cuts, calls = check_streams(range(1000))
    print(f"{grouped} groupings, {cuts} cuts, {calls} calls")
    assert calls > 600
