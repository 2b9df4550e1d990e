"""Several tokens at once, as they come to a reader that is behind or from drafts: a stop string may be among them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake import FakeEngine
from threaded import ThreadEngine

from mixtral.server import ServerConfig
from mixtral.server.protocol import read_completion
from mixtral.server.work import Work, _pieces, begin, prepare_completion
from mixtral.wire import Done, TokenEvent, Tokens, Update


class Run:
    """Updates that are there already; what is aborted is written down."""

    def __init__(self, updates: list[Update]) -> None:
        self.updates = updates
        self.aborted: list[int] = []

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> Update:
        if not self.updates:
            raise StopAsyncIteration
        return self.updates.pop(0)

    def abort(self, sequence: int) -> None:
        self.aborted.append(sequence)


def work(**fields: Any) -> Work:
    engine = ThreadEngine(FakeEngine(), ServerConfig())
    body = {"model": "fake", "prompt": "x", "max_tokens": 100, **fields}
    request = read_completion(body, vocab_size=engine.vocab_size, layers=engine.layers)
    return begin(engine, prepare_completion(engine, request, None, ""))


def tokens(sequence: int, text: str, *, end: bool = False) -> list[TokenEvent]:
    ids = FakeEngine().tokenizer.encode(text, eos=end)
    reasons = [None] * (len(ids) - 1) + ["stop" if end else None]
    return [
        TokenEvent(sequence=sequence, id=id, finish_reason=reason)  # type: ignore[arg-type]
        for id, reason in zip(ids, reasons, strict=True)
    ]


def read(wanted: Work, *events: list[TokenEvent]) -> tuple[list[list[tuple[int, str, str | None]]], Run]:
    updates: list[Update] = [Tokens(request="a", events=each) for each in events]
    run = Run([*updates, Done(request="a")])

    async def act() -> list[list[tuple[int, str, str | None]]]:
        found = []
        async for pieces in _pieces(run, wanted):  # type: ignore[arg-type]
            found.append([(index, piece.text, piece.finish_reason) for index, piece in pieces])
        return found

    return asyncio.run(act()), run


def test_a_stop_string_in_the_middle_ends_the_answer_there() -> None:
    wanted = work(stop="STOP")
    found, run = read(wanted, tokens(0, "one two STOP three four"))
    assert found == [[(0, " one two ", "stop")]]
    assert run.aborted == []  # the request ends as a whole
    assert wanted.answers[0].completion_tokens < len(tokens(0, "one two STOP three four"))


def test_a_choice_that_stops_is_ended_while_the_others_go_on() -> None:
    found, run = read(
        work(stop="STOP", n=3),
        tokens(0, "one STOP two") + tokens(1, "a b") + tokens(2, "x", end=True),
        tokens(0, " three"),
        tokens(1, " c", end=True),
    )
    assert run.aborted == [0]
    assert [each for pieces in found for each in pieces if each[2]] == [
        (0, " one ", "stop"),
        (2, " x", "stop"),
        (1, found[-1][0][1], "stop"),
    ]
    assert len(found) == 2  # what came for the first one afterwards says nothing


def test_an_engine_that_ends_early_is_an_error() -> None:
    with pytest.raises(Exception, match="ended before all answers"):
        read(work(n=2), tokens(0, " one", end=True))
