"""Random raw requests to a server that is a program: it lives, and answers with HTTP or closes the connection."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from rawhttp import exchange, read_answers, requests_in
from serving import children, complete, expected, program, until

from mixtral.server import ServerConfig

CONFIG = {"header_timeout_s": 0.4, "body_timeout_s": 0.4, "keep_alive_s": 0.4, "connections": 500}
AT_ONCE = 48
END_S = 20.0  # by when a connection must have ended or be answered, on a busy machine


async def one(host: str, port: int, seed: int) -> tuple[list[int], str]:
    """Statuses of a connection, and what was wrong with it."""
    made = exchange(seed, f"{host}:{port}")
    reader, writer = await asyncio.open_connection(host, port)
    found = b""
    try:
        with contextlib.suppress(ConnectionError):
            for piece in made.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if made.leaves:
                return [], ""
        ended = False
        while not ended:
            try:
                # An answer that is whole, and nothing for a while: the connection is kept for a next request.
                patience = 0.3 if found and read_answers(found)[1] else END_S
                part = await asyncio.wait_for(reader.read(65536), patience)
                found += part
                ended = not part
                if ended and not read_answers(found)[1]:
                    return [], f"seed {seed}: ended in the middle of {found[-300:]!r}"
            except ConnectionError:
                ended = True
            except TimeoutError:
                if patience == END_S:
                    return [], f"seed {seed}: neither an answer nor an end after {found[:200]!r}"
                ended = True
        return read_answers(found)[0], ""
    except ValueError as error:
        return [], f"seed {seed}: {error}"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def many(address: str, seeds: range) -> tuple[Counter[int], list[str]]:
    """Statuses by number, and complaints."""
    place = urlsplit(address)
    counts, wrong, left = Counter[int](), list[str](), iter(seeds)

    async def work() -> None:
        for seed in left:
            statuses, complaint = await one(place.hostname or "", place.port or 0, seed)
            counts.update(statuses)
            wrong.extend([complaint] if complaint else [])

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return counts, wrong


def fuzz(first: int, connections: int, folder: Path) -> Counter[int]:
    """Statuses of the answers. The server and its engine are the same processes after as before."""
    seeds = range(first, first + connections)
    errors = folder / "errors"
    with errors.open("w") as sink, program(config=CONFIG, stderr=sink) as (address, server):
        until(lambda: httpx.get(f"{address}/ready").status_code == 200, timeout_s=60)
        before, memory = children(server.pid), psutil.Process(server.pid).memory_info().rss
        counts, wrong = asyncio.run(many(address, seeds))
        assert not wrong, "\n".join(wrong[:20])
        assert server.poll() is None
        now = children(server.pid)
        assert set(before) <= set(now)
        assert len(now) <= len(before) + ServerConfig().text_processes  # those that read long bodies start when needed
        assert complete(address, [7, 8]).json()["choices"][0]["text"] == expected([7, 8], 20)
        until(lambda: psutil.Process(server.pid).num_fds() < 60)  # all connections were given back
        assert psutil.Process(server.pid).memory_info().rss - memory < 50 * 2**20
    text = errors.read_text()
    assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:3000]
    return counts


def test_some_random_requests(tmp_path: Path) -> None:
    counts = fuzz(0, 250, tmp_path)
    assert counts[200] >= 50
    assert counts[400] >= 50
    assert len(counts) >= 7


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_random_requests(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    wanted, first, made = request.config.getoption("--raw-requests"), 10_000, 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert min(soft, hard) >= 2 * AT_ONCE
    while made < wanted:
        seeds = range(first, first + 2000)
        counts = fuzz(first, len(seeds), tmp_path)
        made += requests_in([exchange(seed, "a:1") for seed in seeds])
        first += len(seeds)
        print(f"{made} requests: {dict(sorted(counts.items()))}", flush=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\n", "status 500"),
        (b"HTTP/1.1 200 x\r\n\r\n", "without a length"),
        (b"garbage\r\n\r\n", "garbage"),
        (b"HTTP/1.1 200 x\r\ncontent-length: 1\r\n\r\nab\r\n\r\n", "illegal status line"),
        (b'HTTP/1.1 400 x\r\ncontent-length: 13\r\n\r\n{"error": {}}', "members"),
        (b"HTTP/1.1 200 x\r\ncontent-length: 9\r\n\r\nTraceback", "internals"),
    ],
)
def test_the_reader_finds_answers_that_are_none(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_answers(data)


def test_the_reader_knows_whole_answers() -> None:
    answer = b"HTTP/1.1 200 x\r\ncontent-length: 2\r\n\r\nab"
    assert read_answers(answer * 3) == ([200, 200, 200], True)
    assert read_answers(answer + answer[:-1]) == ([200], False)
    assert read_answers(answer + answer[:10]) == ([200], False)
    assert read_answers(b"HTTP/1.1 100 Continue\r\n\r\n" + answer) == ([200], True)
