"""Routes, headers, the outermost layer, and what goes wrong inside the engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from checks import check_error, events
from fake import CONTEXT, MESSAGES, FakeEngine
from starlette.testclient import TestClient
from threaded import ThreadEngine

from mixtral.errors import CapacityError, ConfigError, EngineError, MessagesError, NumericalError, RequestError
from mixtral.server import ServerConfig, build
from mixtral.server.engine import State

Send = Callable[..., httpx.Response]
GOOD = {"model": "fake", "messages": MESSAGES}


def test_health_and_models(send: Send) -> None:
    assert send("GET", "/health").json() == {"status": "ok"}
    (model,) = send("GET", "/v1/models").json()["data"]
    assert model == send("GET", "/v1/models/fake").json()
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", CONTEXT)
    check_error(send("GET", "/v1/models/other"), 404, "model_not_found", "model")
    check_error(send("GET", "/v1/models/a%2Fb/c"), 404, "model_not_found", "model")


@pytest.mark.parametrize("path", ["/v1", "/v1/models/../x", "/docs", "/static/", "/static/%2e%2e/app.py"])
def test_unknown_routes_are_a_404(send: Send, path: str) -> None:
    response = send("GET", path)
    if "models" not in path:
        check_error(response, 404, "route_not_found", None)
    assert response.status_code == 404


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/files/f-1", "/v1/audio/speech"])
def test_routes_that_others_have_are_a_404_with_the_reason(send: Send, method: str, path: str) -> None:
    response = send(method, path)
    check_error(response, 404, "route_not_found", None)
    assert len(response.json()["error"]["message"]) > len(f"there is no '{path}' on this server") + 20


@pytest.mark.parametrize("state", ["starting", "stalled", "restarting", "dead", "draining", "ready"])
def test_health_and_readiness_follow_the_engine(engine: FakeEngine, state: State) -> None:
    runner = ThreadEngine(engine, ServerConfig())
    runner.state = state
    with TestClient(build(runner), base_url="http://127.0.0.1:8000") as client:
        alive = state in ("ready", "draining")
        health, ready = client.get("/health"), client.get("/ready")
    assert (health.status_code, health.json()) == (200 if alive else 503, {"status": "ok" if alive else state})
    assert (ready.status_code, ready.json()) == (200 if state == "ready" else 503, {"status": state})


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("HEAD", "/health", "GET"),
        ("DELETE", "/v1/models/fake", "GET"),
        ("POST", "/", "GET"),
    ],
)
def test_wrong_methods_are_a_405(send: Send, method: str, path: str, allow: str) -> None:
    response = send(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    if method != "HEAD":
        check_error(response, 405, "method_not_allowed", None)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/app.js", "text/javascript; charset=utf-8"),
        ("/static/base.css", "text/css; charset=utf-8"),
        ("/static/icon.svg", "image/svg+xml"),
    ],
)
def test_the_page_is_served_with_a_strict_policy(send: Send, path: str, kind: str) -> None:
    response = send("GET", path)
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["referrer-policy"] == "no-referrer"
    outside = [url for url in re.findall(r"https?://[^\s\"')]+", response.text) if url != "http://www.w3.org/2000/svg"]
    assert outside == []
    assert "innerHTML" not in response.text


@pytest.mark.parametrize("path", ["/health", "/", "/nope", "/v1/models"])
def test_every_answer_has_the_common_headers(send: Send, path: str) -> None:
    headers = send("GET", path).headers
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_request_id_is_echoed_if_it_is_harmless(send: Send) -> None:
    assert send("GET", "/health", headers={"x-request-id": "job-7.b_2"}).headers["x-request-id"] == "job-7.b_2"
    for bad in ("a b", "", "x" * 65, "é".encode("latin-1"), "a\tb"):
        assert re.fullmatch(
            "[0-9a-f]{32}", send("GET", "/health", headers={"x-request-id": bad}).headers["x-request-id"]
        )


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_loopback_names_are_this_server(send: Send, host: str) -> None:
    assert send("GET", "/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "a@localhost",
        "localhost:80:80",
        "192.168.0.1:8000",
        "localhost",
        "127.0.0.1:9000",
    ],
)
def test_other_hosts_are_a_421(send: Send, host: str) -> None:
    for path in ("/", "/health", "/v1/models", "/nope"):
        check_error(send("GET", path, headers={"host": host}), 421, "host_not_allowed", None)


def test_hosts_can_be_allowed(send: Send) -> None:
    config = ServerConfig(allowed_hosts=("chat.example",))
    headers = {"host": "chat.example", "origin": "https://chat.example"}
    assert send("GET", "/health", config=config, headers=headers).status_code == 200
    assert send("GET", "/health", config=config, headers={"host": "a.chat.example"}).status_code == 421


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "https://127.0.0.1:8000"])
def test_the_own_page_may_send_requests(send: Send, origin: str) -> None:
    assert send("POST", "/v1/chat/completions", json=GOOD, headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1:9000", "http://localhost:8000", "file://", "http://[", ""],
)
def test_pages_of_other_sites_may_not(send: Send, engine: FakeEngine, origin: str) -> None:
    response = send("POST", "/v1/chat/completions", json=GOOD, headers={"origin": origin})
    assert response.json()["error"]["type"] == "permission_error"
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert engine.opened == 0


def test_the_request_head_is_bounded(send: Send) -> None:
    check_error(send("GET", "/" + "x" * 9000), 414, "uri_too_long", None)
    check_error(send("GET", "/health?" + "x" * 9000), 414, "uri_too_long", None)
    check_error(send("GET", "/health", headers={f"x-{n}": "1" for n in range(110)}), 431, "headers_too_large", None)


# What the engine raises, and what the client may know of it.
ENGINE_ERRORS: list[tuple[Exception, int, str, str | None]] = [
    (RuntimeError("secret /root/weights at 0x7f"), 500, "internal_error", None),
    (MemoryError(), 503, "server_overloaded", None),
    (ConfigError("secret"), 500, "internal_error", None),
    (NumericalError("the logit of token 5 is nan (secret)"), 500, "numerical_error", None),
    (CapacityError("41 pages are needed, 40 exist", param="max_tokens"), 400, "context_length_exceeded", "max_tokens"),
    (RequestError("top_k is 7; expected 8", param="top_k"), 400, "invalid_value", "top_k"),
]


@pytest.mark.parametrize(("error", "status", "code", "param"), ENGINE_ERRORS)
@pytest.mark.parametrize("after", [0, 3])
def test_errors_of_the_engine(
    send: Send,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    code: str,
    param: str | None,
    after: int,
) -> None:
    engine.fails_after, engine.error = after, error
    for path, fields in (("/v1/chat/completions", GOOD), ("/v1/completions", {"model": "fake", "prompt": "x"})):
        engine.tokens = 0
        response = send("POST", path, json=fields)
        check_error(response, status, code, param)
        assert "secret" not in response.text
        engine.tokens = 0
        response = send("POST", path, json={**fields, "stream": True})
        assert response.status_code == 200
        stream = events(response)
        assert stream[-1]["error"]["code"] == code
        assert "secret" not in response.text
        assert "[DONE]" not in stream
        assert not [event for event in stream[:-1] if event["choices"][0]["finish_reason"]]
    assert engine.closed == engine.opened == 4
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == (4 if status >= 500 else 0)


def test_an_engine_that_ends_too_early_is_an_error(send: Send, engine: FakeEngine) -> None:
    engine.reply = engine.tokenizer.encode("no end")  # without an end token
    check_error(send("POST", "/v1/chat/completions", json=GOOD), 500, "internal_error", None)
    response = send("POST", "/v1/chat/completions", json={**GOOD, "stream": True})
    assert events(response)[-1]["error"]["code"] == "internal_error"


def test_a_failed_request_does_not_harm_the_next(send: Send, engine: FakeEngine) -> None:
    engine.fails_after = 2
    assert send("POST", "/v1/chat/completions", json=GOOD).status_code == 500
    engine.fails_after = None
    assert send("POST", "/v1/chat/completions", json=GOOD).status_code == 200


def test_a_stream_has_the_headers_of_a_stream(send: Send) -> None:
    headers = send("POST", "/v1/chat/completions", json={**GOOD, "stream": True, "seed": 3}).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-mixtral-seed"] == "3"
    assert "content-length" not in headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"host": "0.0.0.0"}, "host"),
        ({"host": "::"}, "host"),
        ({"host": "192.168.1.4"}, "host"),
        ({"host": "example.org"}, "host"),
        ({"port": -1}, "port"),
        ({"port": 70000}, "port"),
        ({"port": "80"}, "port"),
        ({"queue_size": 0}, "queue_size"),
        ({"queue_size": True}, "queue_size"),
        ({"queue_timeout_s": float("nan")}, "queue_timeout_s"),
        ({"request_timeout_s": float("inf")}, "request_timeout_s"),
        ({"body_limit_bytes": 2**40}, "body_limit_bytes"),
        ({"buffer_bytes": 1.5}, "buffer_bytes"),
    ],
)
def test_a_bad_setting_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**fields)
    assert caught.value.param == param


def test_loopback_addresses_are_accepted() -> None:
    assert [ServerConfig(host=host).port for host in ("localhost", "127.0.0.1", "::1", "127.8.9.1")] == [8000] * 4


def test_a_failure_while_it_serves_closes_everything(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    own = ThreadEngine(engine, ServerConfig())
    close = own.close

    async def closing() -> None:
        closed.append("engine")
        await close()

    monkeypatch.setattr(own, "close", closing)
    app = build(own, grammar=None)

    async def fail() -> None:
        async with app.router.lifespan_context(app):
            raise ConfigError("the output belongs to another run")

    with pytest.raises(ConfigError):
        asyncio.run(fail())
    assert closed == ["engine"]


def test_every_code_of_the_server_is_in_the_documents() -> None:
    root = Path(__file__).resolve().parents[2]
    given = re.compile(r'(?:ApiError\(\s*\d+,\s*|overloaded\(\s*|code=)"([a-z_]+)"')
    sources = [path.read_text(encoding="utf-8") for path in (root / "src/mixtral/server").glob("*.py")]
    codes = {code for text in sources for code in given.findall(text)} - {"invalid_request"}  # what no route reaches
    codes |= {kind.code for kind in (EngineError, NumericalError, CapacityError, RequestError, MessagesError)}
    assert len(codes) > 30
    listed = (root / "docs/serving.md").read_text(encoding="utf-8").split("## Errors")[1]
    assert {code for code in codes if f"`{code}`" not in listed} == set()
