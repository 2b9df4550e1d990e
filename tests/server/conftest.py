"""Calls to the application without a network, for tests of one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake import MESSAGES, FakeEngine

from mixtral.server import ServerConfig, build

Send = Callable[..., httpx.Response]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def send(engine: FakeEngine) -> Send:
    """``send(method, path, config=..., **what httpx takes)`` -> the whole response."""

    def call(method: str, path: str, *, config: ServerConfig | None = None, **parts: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            app = build(engine, config)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client,
            ):
                return await client.request(method, path, **parts)

        return asyncio.run(run())

    return call


@pytest.fixture
def chat(send: Send) -> Callable[..., httpx.Response]:
    """``chat(field=value, ...)``: one chat request."""
    return lambda **fields: send("POST", "/v1/chat/completions", json={"model": "fake", "messages": MESSAGES, **fields})


@pytest.fixture
def complete(send: Send) -> Callable[..., httpx.Response]:
    """``complete(field=value, ...)``: one raw completion."""
    return lambda **fields: send("POST", "/v1/completions", json={"model": "fake", "prompt": "Once", **fields})
