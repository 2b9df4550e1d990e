"""Frames over sockets: every message as it was sent, whatever the pieces; anything else is a clear error."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mixtral.wire import (
    Abort,
    AdapterInfo,
    Candidate,
    Channel,
    ChannelClosedError,
    ChannelError,
    Constraint,
    Done,
    Failed,
    Frames,
    FromEngine,
    Heartbeat,
    Hello,
    PromptScores,
    PromptToken,
    Routing,
    SamplingParams,
    Start,
    Started,
    Stats,
    Submit,
    ToEngine,
    TokenEvent,
    Tokens,
    frames_of,
)
from mixtral.wire.channel import FRAME_BYTES

TO_ENGINE = [
    Start(model="embedded", threads=2, adapters={"a": "x/a", "b": "x/b"}, faults=("step:1:raise",)),
    Submit(
        request="a",
        prompts=[[1, 2, 32767], [0]],
        params=SamplingParams(seed=-(2**63), logit_bias={5: -100.0}, stop_ids=(2,), logprobs=3),
        n=4,
        constraint=Constraint(text="start: /x/", trigger=5),
        scope="key\u2028\x00",
        priority=-3,
        routing=True,
        adapter="b",
    ),
    Abort(request="a"),
]
FROM_ENGINE = [
    Hello(
        name="m", context=1, vocab_size=2, layers=3, experts=4, tokenizer="v3", respell={9: (1, 2)}, cache_tokens=5,
        fingerprint="f", adapters={"b": AdapterInfo(root="b", size_bytes=2**40)},
    ),
    Started(request="a", cached=(0, 64)),
    PromptScores(request="a", prompt=0, tokens=[PromptToken(id=1), PromptToken(id=2, logprob=-1.5)]),
    Tokens(
        request="a",
        events=[
            TokenEvent(sequence=0, id=7, logprob=-0.25, top=(Candidate(7, -0.25),)),
            TokenEvent(
                sequence=1, id=2, finish_reason="stop", routing=Routing(first=3, experts=b"\x00\xff", weights=b"abcd")
            ),
        ],
    ),
    Failed(request="b", code="numerical_error", message="no", param="x"),
    Heartbeat(step=9, step_age=0.5, stats=Stats(expert_tokens=[[1, 2]]), seconds=[0.25]),
    Done(request="a"),
]  # fmt: skip


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(("kind", "messages"), [(ToEngine, TO_ENGINE), (FromEngine, FROM_ENGINE)])
def test_messages_arrive_as_they_were_sent_in_pieces_of_any_size(kind: Any, messages: list[Any]) -> None:
    data = frames_of(messages) + frames_of(messages[:1]) + frames_of([]) + frames_of(messages)
    for size in (1, 2, 3, 5, 64, len(data)):
        frames: Frames[Any] = Frames(kind)
        found = [one for at in range(0, len(data), size) for one in frames.feed(data[at : at + size])]
        frames.finish()
        assert found == [*messages, messages[0], *messages]


def test_a_channel_in_both_directions(pair: tuple[socket.socket, socket.socket]) -> None:
    http: Channel[Any] = Channel(pair[0], FromEngine)
    engine: Channel[Any] = Channel(pair[1], ToEngine)
    assert engine.receive(wait=False) == []
    http.send(TO_ENGINE)
    http.send(TO_ENGINE[:1])
    assert engine.receive(wait=True) == [*TO_ENGINE, TO_ENGINE[0]]
    engine.send(FROM_ENGINE)
    assert http.receive(wait=True) == FROM_ENGINE
    assert http.receive(wait=False) == []


def test_many_senders_do_not_mix_their_frames(pair: tuple[socket.socket, socket.socket]) -> None:
    sender: Channel[Any] = Channel(pair[0], ToEngine)
    receiver: Channel[Any] = Channel(pair[1], FromEngine)
    sizes = [1, 5000, 70_000]

    def send(number: int) -> None:
        for size in sizes * 10:
            sender.send([Started(request=f"{number}", cached=(number,) * size)])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    found: list[Started] = []
    while len(found) < 4 * 30:
        found += receiver.receive(wait=True)
    for thread in threads:
        thread.join()
    for number in range(4):
        own = [one for one in found if one.request == f"{number}"]
        assert [len(one.cached) for one in own] == sizes * 10
        assert all(set(one.cached) == {number} for one in own)


def test_waiting_for_a_message_takes_no_processor_time(pair: tuple[socket.socket, socket.socket]) -> None:
    channel: Channel[Any] = Channel(pair[0], ToEngine)
    timer = threading.Timer(0.3, pair[1].sendall, [frames_of([Abort(request="x")])])
    timer.start()
    before = time.thread_time()
    assert channel.receive(wait=True) == [Abort(request="x")]
    assert time.thread_time() - before < 0.1
    timer.join()


def test_the_end_between_frames_is_a_close_and_inside_one_an_error() -> None:
    data = frames_of([Abort(request="x")])
    for cut in range(len(data) + 1):
        ours, theirs = socket.socketpair()
        with ours:
            channel: Channel[Any] = Channel(ours, ToEngine)
            theirs.sendall(data[:cut])
            theirs.close()
            if cut == len(data):
                assert channel.receive(wait=True) == [Abort(request="x")]
            with pytest.raises(ChannelError) as caught:
                channel.receive(wait=True)
            assert isinstance(caught.value, ChannelClosedError) == (cut in (0, len(data)))


def test_sending_to_nobody_is_a_close(pair: tuple[socket.socket, socket.socket]) -> None:
    channel: Channel[Any] = Channel(pair[0], ToEngine)
    pair[1].close()
    with pytest.raises(ChannelClosedError, match="cannot be reached"):
        channel.send([Abort(request="x")])


def test_closing_wakes_the_thread_that_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    channel: Channel[Any] = Channel(pair[0], ToEngine)
    timer = threading.Timer(0.1, channel.close)
    timer.start()
    with pytest.raises(ChannelClosedError):
        channel.receive(wait=True)
    timer.join()


def test_a_long_list_is_cut_into_frames_and_a_long_message_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral.wire.channel.FRAME_BYTES", 100)
    messages = [Started(request=f"{number}", cached=(number,) * 20) for number in range(50)]
    data = frames_of(messages)
    frames: Frames[Any] = Frames(FromEngine)
    assert frames.feed(data) == messages
    assert data[:4] != struct.pack("<I", len(data) - 4)  # more than one frame
    with pytest.raises(ChannelError, match="of kind Started has"):
        frames_of([Started(request="x", cached=(1,) * 200)])


def framed(value: object) -> bytes:
    packed = msgspec.msgpack.encode(value)
    return struct.pack("<I", len(packed)) + packed


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", FRAME_BYTES + 1),
        b"\xff" * 16,
        struct.pack("<I", 0),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 2) + b"\x90\x90",  # something after the list
        framed(5),
        framed({"type": "abort", "request": "x"}),  # no list
        framed([{"type": "abort", "request": 5}]),
        framed([{"type": "abort"}]),
        framed([{"type": "eval", "code": "x"}]),
        framed([{"type": "done", "request": "x"}]),  # goes the other way
        framed([{"request": "x"}]),
        framed([{"type": "start", "unknown": 1}]),
        framed([{"type": "submit", "request": "x", "prompts": [[1.5]], "params": {}}]),
        framed([{"type": "submit", "request": "x", "prompts": [[1]], "params": {"temperature": 9.0}}]),
        framed([{"type": "submit", "request": "x", "prompts": [[1]], "params": {"top": 1}}]),
        struct.pack("<I", 2000) + b"\x91" * 2000,  # deep
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ChannelError, match=r"expected at most|not a list of known messages"):
        Frames(ToEngine).feed(data)


def test_a_frame_that_is_announced_takes_no_memory_before_it_comes() -> None:
    frames: Frames[Any] = Frames(ToEngine)
    assert frames.feed(struct.pack("<I", FRAME_BYTES)) == []
    assert frames.feed(b"\x90" * 10) == []
    with pytest.raises(ChannelError, match="14 bytes of a frame"):
        frames.finish()


@pytest.mark.parametrize("seed", range(20))
def test_damaged_frames_end_in_a_channel_error_or_in_messages(seed: int) -> None:
    draw = random.Random(seed)
    good = frames_of(TO_ENGINE)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        data = data[: draw.randint(0, len(data))]
        frames: Frames[Any] = Frames(ToEngine)
        try:
            for message in frames.feed(bytes(data)):
                assert isinstance(message, Start | Submit | Abort)
            frames.finish()
        except ChannelError:
            pass
