"""The client of the load generator: what it counts in a stream, however that is cut, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from streams import Answer, StreamError, prompts, request, wave

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(value: str, **more: Any) -> bytes:
    return event(id="x", choices=[{"index": 0, "text": value, "finish_reason": None}], **more)


USAGE = event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7})
WHOLE = [b": wait\n\n", text("a"), text(""), text("b\n\ndata: c"), USAGE, DONE]


def chunks(parts: Sequence[bytes]) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def answering(data: bytes, size: int, heard: list[bytes] | None = None) -> AsyncIterator[tuple[str, int]]:
    """A server that answers every request with these bytes, ``size`` at a time."""

    open_ones: list[asyncio.Task[Any]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.suppress(ConnectionError):
            await write(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if heard is not None:
            heard.append(body)
        for start in range(0, len(data) if size else 0, size or 1):
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0.0)
        if not size:
            await reader.read()  # says nothing until the client leaves

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[:2]
        await asyncio.gather(*open_ones)


def ask(data: bytes, size: int = 1 << 16, count: int = 1) -> list[Answer]:
    async def send() -> list[Answer] | StreamError:
        async with answering(data, size) as address:
            try:
                return (await wave(address, [[request("x", {})] for _ in range(count)], timeout_s=10.0)).answers
            except StreamError as error:
                return error

    found = asyncio.run(send())
    if isinstance(found, StreamError):
        raise found
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 50, 1 << 16])
def test_text_tokens_and_times_of_a_stream_cut_anywhere(size: int) -> None:
    for answer in ask(chunks(WHOLE), size, count=2):
        assert answer.text == ["a", "b\n\ndata: c"]
        assert (answer.tokens, answer.prompt_tokens) == (3, 4)
        assert len(answer.times) == 2
        assert len(answer.gaps) == 1
        assert 0 < answer.first < 10
        assert answer.gaps[0] >= 0


def test_an_event_may_begin_in_one_chunk_and_end_in_the_next() -> None:
    whole = b"".join(WHOLE)
    for cut in range(9, len(whole), 9):
        (answer,) = ask(chunks([whole[:cut], whole[cut:]]))
        assert answer.text == ["a", "b\n\ndata: c"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy", "503"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "expected status 200 and an answer in chunks"),
        (chunks(WHOLE[:-1]), "ended before"),
        (chunks(WHOLE)[:150], "ended before"),
        (chunks([text("a"), DONE]), "counted no tokens"),
        (chunks([USAGE, DONE]), "sent no text"),
        (chunks([text("a"), event(error={"message": "broken"})]), "broken"),
        (chunks([b"event: x\n\n"]), "expected an event"),
        (chunks([b"data: {\n\n"]), "truncated"),
        (HEAD + b"zz\r\n", "invalid literal"),
    ],
)
def test_what_is_no_whole_stream_is_an_error(data: bytes, told: str) -> None:
    with pytest.raises(StreamError, match=told):
        ask(data)


def test_a_server_that_says_nothing_is_given_up() -> None:
    async def send() -> None:
        async with answering(b"", 0) as address:
            with pytest.raises(StreamError, match="not all streams ended"):
                await wave(address, [[request("x", {})]], timeout_s=0.1)

    asyncio.run(send())


def test_queues_are_sent_one_after_the_other() -> None:
    heard: list[bytes] = []

    async def send() -> int:
        async with answering(chunks(WHOLE), 1 << 16, heard) as address:
            queues = [[request("x", {"number": 2 * turn + queue}) for turn in range(3)] for queue in range(2)]
            return len((await wave(address, queues)).answers)

    assert asyncio.run(send()) == 6
    numbers = [json.loads(body)["number"] for body in heard]
    assert sorted(numbers) == list(range(6))
    for queue in range(2):
        assert [number for number in numbers if number % 2 == queue] == [queue, queue + 2, queue + 4]
    assert json.loads(heard[0])["stream_options"] == {"include_usage": True}


def test_prompts_are_different_and_of_one_length() -> None:
    made = prompts(50, 20, vocab_size=1000, seed=3)
    assert {len(one) for one in made} == {20}
    assert {one[0] for one in made} == {1}
    assert len({tuple(one[:4]) for one in made}) == 50
    assert all(300 <= id < 1000 for one in made for id in one[1:])
    assert made == prompts(50, 20, vocab_size=1000, seed=3)
    assert made != prompts(50, 20, vocab_size=1000, seed=4)
    shared = prompts(50, 20, vocab_size=1000, seed=3, shared=12)
    assert len({tuple(one[:12]) for one in shared}) == 1
    assert len({tuple(one[:16]) for one in shared}) == 50
