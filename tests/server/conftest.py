"""Calls to the application without a network, for tests of one request at a time; and a browser."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fake import MESSAGES, FakeEngine, FakeGrammar
from pagefake import PageServer, serving
from pageuser import PageUser
from selenium import webdriver
from threaded import ThreadEngine

from mixtral.server import ServerConfig, build

Send = Callable[..., httpx.Response]
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1000,760"),
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Headless Chromium; one for all tests of a process. Each server has a port, so a storage, of its own."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("the page tests need Chromium: apt-get install -y chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver)) as found:
        yield found


@pytest.fixture
def page_server() -> PageServer:
    return PageServer()


@pytest.fixture
def user(browser: webdriver.Chrome, page_server: PageServer) -> Iterator[PageUser]:
    """Somebody at the page of ``page_server``. At the end the page must have reported no mistake of its own."""
    with serving(page_server) as address:
        user = PageUser(browser, address)
        yield user
        complaints = user.complaints()
        user.leave()
        assert complaints == []


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def grammar() -> FakeGrammar:
    return FakeGrammar()


@pytest.fixture
def send(engine: FakeEngine, grammar: FakeGrammar) -> Send:
    """``send(method, path, config=..., **what httpx takes)`` -> the whole response."""

    def call(method: str, path: str, *, config: ServerConfig | None = None, **parts: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            app = build(ThreadEngine(engine, config or ServerConfig()), config, grammar=grammar)
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
    return _caller(send, "/v1/chat/completions", {"model": "fake", "messages": MESSAGES})


@pytest.fixture
def complete(send: Send) -> Callable[..., httpx.Response]:
    """``complete(field=value, ...)``: one raw completion."""
    return _caller(send, "/v1/completions", {"model": "fake", "prompt": "Once"})


def _caller(send: Send, path: str, fields: dict[str, Any]) -> Callable[..., httpx.Response]:
    """``mark`` replaces the JSON string "MARK", for numbers that Python cannot write."""

    def call(*, mark: str | None = None, **more: Any) -> httpx.Response:
        body = json.dumps(fields | more)
        if mark is not None:
            body = body.replace('"MARK"', mark)
        return send("POST", path, content=body, headers={"content-type": "application/json"})

    return call
