"""The parts of a trial that need no other process: attempts, and messages over a pipe."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from mixtral.grammar import Grammar
from mixtral.grammar.source import lark_grammar
from mixtral.grammar.trial import attempt, read_message, write_message


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        try:
            os.close(end)
        except OSError:
            continue  # closed by the test


def test_an_attempt_follows_answers_to_their_end(v3: Grammar) -> None:
    assert attempt(v3, lark_grammar('start: "a"')) is None
    assert attempt(v3, lark_grammar("start: /(?s:.*)/")) is None


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("start: x", "unknown name"),
        ("start: start", "NoExtension"),
        ('start: "a" <[3]>', "no token"),
        ("start: /((((a{1,100}){1,100}){1,100}){1,100}){1,100}b/", "too many"),
    ],
)
def test_an_attempt_tells_what_is_wrong(v3: Grammar, rules: str, reason: str) -> None:
    assert reason in (attempt(v3, lark_grammar(rules)) or "")


def test_messages_of_any_length(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    for message in ({"a": "é" * 1000}, [], {"reason": None}):
        write_message(writing, message)
        assert read_message(reading) == message


def test_the_end_of_input_is_no_message(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"\x00\x00\x00\x05ab")
    os.close(writing)
    assert read_message(reading) is None
    assert read_message(reading) is None


def test_a_length_that_nobody_sends_is_not_believed(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"\xff\xff\xff\xff")
    assert read_message(reading) is None


def test_waiting_ends(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with pytest.raises(TimeoutError):
        read_message(reading, time.monotonic() + 0.05)
    os.write(writing, b"\x00\x00")
    with pytest.raises(TimeoutError):
        read_message(reading, time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        write_message(writing, "x" * 1_000_000, time.monotonic() + 0.05)
