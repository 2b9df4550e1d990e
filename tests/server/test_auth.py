"""Keys: the file, denial by default on the raw path, scopes, limits per key, pages of other sites."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from checks import check_error
from fake import MESSAGES, FakeEngine, listening, wait_until
from threaded import ThreadEngine

from mixtral.errors import ConfigError
from mixtral.limits import ROUTES
from mixtral.server import ServerConfig, build
from mixtral.server.keys import Key, KeyRing, Quota

Send = Callable[..., httpx.Response]
SECRET = "sk-town-desk"
GOOD = {"model": "fake", "messages": MESSAGES}
CHAT = "/v1/chat/completions"


def bearer(secret: str = SECRET) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def ring(**limits: Any) -> KeyRing:
    return KeyRing([Key(name="ann", sha256=hashlib.sha256(SECRET.encode()).hexdigest(), **limits)])


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(keys=ring())


def paths() -> list[str]:
    app = build(ThreadEngine(FakeEngine(), ServerConfig()))
    return sorted({route.path.replace("{name:path}", "fake") for route in app.routes})  # type: ignore[attr-defined]


OPEN = {"/", "/static/app.js", "/static/style.css", "/static/icon.svg", "/health", "/ready"}


@pytest.mark.parametrize("path", [*paths(), "/nope", "/metrics", "/v1/embeddings"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE", "TRACE"])
def test_every_route_needs_a_key_but_the_open_ones(send: Send, config: ServerConfig, path: str, method: str) -> None:
    response = send(method, path, config=config)
    if path in OPEN or path.startswith("/static/"):
        assert response.status_code in (200, 405)
        return
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        check_error(response, 401, "invalid_api_key", None)
    assert send(method, path, config=config, headers=bearer()).status_code != 401


def test_the_document_lists_the_routes_that_exist(send: Send, config: ServerConfig) -> None:
    document = send("GET", "/openapi.json", config=config, headers=bearer()).json()
    listed = {path.replace("{name}", "fake") for path in document["paths"]}
    assert listed | OPEN | {path for path in paths() if path.startswith("/static/")} >= set(paths())
    assert set(ROUTES) <= set(document["paths"])
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == (path not in OPEN)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": SECRET},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {SECRET}x"},
        {"authorization": f"Bearer {SECRET[:-1]}"},
        {"authorization": f"Bearer {SECRET.upper()}"},
        {"authorization": f"Bearer {hashlib.sha256(SECRET.encode()).hexdigest()}"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": SECRET},
        [("authorization", f"Bearer {SECRET}"), ("authorization", f"Bearer {SECRET}")],
    ],
)
def test_wrong_keys_all_get_the_same_answer(send: Send, config: ServerConfig, headers: Any) -> None:
    response = send("POST", CHAT, config=config, json=GOOD, headers=headers)
    check_error(response, 401, "invalid_api_key", None)
    plain = send("POST", CHAT, config=config, json=GOOD)
    assert response.json() == plain.json()


def test_a_good_key(send: Send, config: ServerConfig) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"authorization": f"{scheme} {SECRET}"}
        assert send("POST", CHAT, config=config, json=GOOD, headers=headers).status_code == 200


# Targets that other programs have taken for an open route.
SPELLINGS = [
    "/v1/models/",
    "//v1/models",
    "/static/../v1/models",
    "/static/%2e%2e/v1/models",
    "/static/..%2fv1%2fmodels",
    "/health/../v1/models",
    "/health%2f..%2fv1/models",
    "/%76%31/models",
    "/v1/models?/health",
    "/v1/models#/health",
    "/v1/models;/health",
    "/health;/../v1/models",
    "/health%00/v1/models",
    "http://127.0.0.1/v1/models",
    "http://127.0.0.1/health",
    "//health",
    "/health/",
    "/HEALTH",
    "/./health",
    "/static/app.js/",
    "/static/",
    "/static",
    "*",
]


@pytest.mark.parametrize("target", SPELLINGS)
def test_odd_spellings_of_a_path_are_denied(target: str) -> None:
    with listening(FakeEngine(), ServerConfig(port=0, keys=ring())) as address:
        place = urlsplit(address)
        for method in ("GET", "POST", "OPTIONS"):
            for host in (place.netloc, f"localhost:{place.port}"):
                lines = f"{method} {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                with socket.create_connection((place.hostname, place.port or 80), timeout=60) as connection:
                    connection.sendall(lines.encode())
                    found = b""
                    while part := connection.recv(65536):
                        found += part
                assert found.split()[1] in (b"401", b"400"), found[:200]
                assert b"max_model_len" not in found


def test_scopes(send: Send) -> None:
    config = ServerConfig(keys=ring(scopes=frozenset({"metrics"})))
    for path in ("/v1/models", "/openapi.json", "/nope", "/metrics/", "/metrics/x", "/Metrics"):
        check_error(send("GET", path, config=config, headers=bearer()), 403, "insufficient_scope", None)
    assert send("GET", "/metrics", config=config, headers=bearer()).status_code not in (401, 403)
    assert send("GET", "/health", config=config).status_code == 200


def test_requests_per_minute() -> None:
    with listening(FakeEngine(), ServerConfig(port=0, keys=ring(requests_per_minute=3))) as address:
        answers = [httpx.get(address + "/v1/models", headers=bearer()) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        check_error(answers[4], 429, "rate_limit_exceeded", None)
        assert 15 <= int(answers[4].headers["retry-after"]) <= 20
        assert httpx.get(address + "/health").status_code == 200
        assert httpx.get(address + "/v1/models").status_code == 401


def test_tokens_per_minute() -> None:
    engine = FakeEngine("one two three four five six seven eight")
    with listening(engine, ServerConfig(port=0, keys=ring(tokens_per_minute=12))) as address:
        answers = [httpx.post(address + CHAT, json=GOOD, headers=bearer()) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 429, 429]
    usage = answers[0].json()["usage"]["total_tokens"]
    assert abs(int(answers[1].headers["retry-after"]) - (usage - 11) * 5) <= 5


def test_concurrent_requests() -> None:
    engine = FakeEngine()
    engine.hold = threading.Event()
    keys = ring(concurrent=2)
    holder = keys.find(SECRET)
    assert holder is not None
    with listening(engine, ServerConfig(port=0, keys=keys)) as address:
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(httpx.post(address + CHAT, json=GOOD, headers=bearer(), timeout=60))
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: holder._running == 2)
        check_error(httpx.post(address + CHAT, json=GOOD, headers=bearer()), 429, "rate_limit_exceeded", None)
        engine.hold.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert httpx.post(address + CHAT, json=GOOD, headers=bearer()).status_code == 200


def test_a_quota_fills_up_within_a_minute() -> None:
    now = 0.0
    quota = Quota(60, clock=lambda: now)
    assert quota.wait_s() == 0
    quota.take(90)
    assert quota.wait_s() == pytest.approx(31)
    now += 30.5
    assert quota.wait_s() == pytest.approx(0.5)
    now += 0.6
    assert quota.wait_s() == 0
    now += 1000
    quota.take(60)
    assert quota.wait_s() == pytest.approx(1)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def entry(name: str, secret: str, more: str = "") -> str:
    return f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n{more}\n'


def test_a_key_file(tmp_path: Path) -> None:
    text = entry("ann", "first", 'scopes = ["metrics"]\nconcurrent = 2') + entry("bob", "second")
    keys = KeyRing.load(write(tmp_path / "keys.toml", text), more=["third-key"])
    found = [keys.find(secret) for secret in ("first", "second", "third-key", "fourth")]
    assert [holder and holder.name for holder in found] == ["ann", "bob", "key-1", None]
    assert found[0] is not None
    assert (found[0].key.scopes, found[0].key.concurrent) == (frozenset({"metrics"}), 2)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("", 0o600, r"\[\[key\]\]"),
        ("[[key]", 0o600, "not TOML"),
        ("\xff", 0o600, "unknown|not TOML"),
        ("key = 5", 0o600, r"\[\[key\]\]"),
        ("other = 5\n" + entry("a", "b"), 0o600, r"\[\[key\]\]"),
        (entry("a", "b"), 0o640, "chmod 600"),
        (entry("a", "b"), 0o604, "chmod 600"),
        (entry("a", "b") * 2, 0o600, "two API keys"),
        (entry("a", "b", 'scopes = ["admin"]'), 0o600, "scopes"),
        (entry("a", "b", "scopes = []"), 0o600, "scopes"),
        (entry("a", "b", "limit = 5"), 0o600, "unknown entry 'limit'"),
        (entry("a", "b", "concurrent = 0"), 0o600, "positive"),
        (entry("a", "b", "concurrent = true"), 0o600, "positive"),
        (entry("", "b"), 0o600, "name"),
        ('[[key]]\nname = "a"\nsha256 = "b"', 0o600, "64 hexadecimal"),
        ('[[key]]\nname = "a"', 0o600, "64 hexadecimal"),
    ],
)
def test_a_bad_key_file_is_refused(tmp_path: Path, text: str, mode: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KeyRing.load(write(tmp_path / "keys.toml", text, mode))
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing.load(tmp_path / "nothing.toml")


def test_the_file_can_be_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", entry("ann", "first", "requests_per_minute = 5") + entry("bob", "second"))
    keys = KeyRing.load(path, more=["third-key"])
    ann = keys.find("first")
    write(path, entry("ann", "changed", "requests_per_minute = 5") + entry("eve", "fourth"))
    keys.reload()
    assert keys.find("first") is keys.find("second") is None
    assert keys.find("changed") is ann  # what she used still counts
    assert keys.find("fourth") is not None
    assert keys.find("third-key") is not None
    write(path, "nonsense")
    with pytest.raises(ConfigError):
        keys.reload()
    assert keys.find("changed") is ann


@pytest.mark.parametrize("secret", ["", "short", "with space", "bäd-characters", "tab\tinside"])
def test_odd_keys_are_refused(secret: str) -> None:
    with pytest.raises(ConfigError, match="8 or more"):
        KeyRing.of([secret])
    with pytest.raises(ConfigError, match="no API key"):
        KeyRing.of([])


def test_others_may_reach_the_server_only_with_keys() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        with pytest.raises(ConfigError, match="no API keys"):
            ServerConfig(host=host)
        assert ServerConfig(host=host, keys=ring()).host == host


def test_a_server_that_others_reach_goes_by_any_name(send: Send) -> None:
    config = ServerConfig(host="0.0.0.0", keys=ring())
    for host in ("gpu-box:8000", "10.0.0.7:8000", "127.0.0.1:8000"):
        headers = bearer() | {"host": host}
        assert send("GET", "/v1/models", config=config, headers=headers).status_code == 200
    named = ServerConfig(host="0.0.0.0", keys=ring(), allowed_hosts=("gpu-box",))
    assert send("GET", "/health", config=named, headers={"host": "gpu-box:8000"}).status_code == 200
    assert send("GET", "/health", config=named, headers={"host": "other:8000"}).status_code == 421


def test_the_openai_client_with_keys() -> None:
    with listening(FakeEngine("Yes."), ServerConfig(port=0, keys=ring())) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=SECRET, max_retries=0) as client:
            answer = client.chat.completions.create(model="fake", messages=MESSAGES)  # type: ignore[arg-type]
            assert answer.choices[0].message.content == "Yes."
        wrong = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
        with wrong as client, pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.models.list()


ORIGIN = "https://chat.example"


def test_allowed_pages(send: Send, engine: FakeEngine) -> None:
    config = ServerConfig(keys=ring(), allowed_origins=(ORIGIN,))
    asking = {"origin": ORIGIN, "access-control-request-method": "POST"}
    asked = send("OPTIONS", CHAT, config=config, headers=asking)
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert engine.opened == 0
    for headers, status in (({"origin": ORIGIN}, 401), ({"origin": ORIGIN, **bearer()}, 200)):
        response = send("POST", CHAT, config=config, json=GOOD, headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "x-mixtral-seed" in response.headers["access-control-expose-headers"]
        assert response.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in response.headers
    for origin in ("https://chat.example.evil", "https://chat.example:444", "http://chat.example", "null"):
        response = send("POST", CHAT, config=config, json=GOOD, headers={"origin": origin, **bearer()})
        check_error(response, 403, "origin_not_allowed", None)
        assert not [name for name in response.headers if name.startswith("access-control")]
        asked = send("OPTIONS", CHAT, config=config, headers=asking | {"origin": origin})
        assert asked.status_code == 403


@pytest.mark.parametrize(
    "origin", ["*", "chat.example", "https://chat.example/", "https://", "file://x", "https://a/b"]
)
def test_bad_origins_are_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="allowed origin"):
        ServerConfig(allowed_origins=(origin,))


def test_bare_options_without_a_page_are_denied(send: Send, config: ServerConfig) -> None:
    headers = {"access-control-request-method": "POST"}
    check_error(send("OPTIONS", CHAT, config=config, headers=headers), 401, "invalid_api_key", None)


RELOADING = """
import sys
sys.path[:0] = [{tests!r}]
import logging
from pathlib import Path
from fake import FakeEngine
from threaded import ThreadEngine
from mixtral.server import ServerConfig, serve
from mixtral.server.keys import KeyRing
log = logging.getLogger("mixtral.server")
log.addHandler(logging.StreamHandler(sys.stdout))
log.setLevel("INFO")
config = ServerConfig(port=0, keys=KeyRing.load(Path({path!r})))
serve(ThreadEngine(FakeEngine(), config), config, on_ready=lambda url: print(url, flush=True))
"""


@pytest.mark.slow
def test_sighup_reads_the_keys_again(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = write(tmp_path / "keys.toml", entry("ann", "first-key"))
    code = RELOADING.format(tests=str(Path(__file__).parent), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()

            def status(secret: str) -> int:
                return httpx.get(address + "/v1/models", headers=bearer(secret)).status_code

            assert (status("first-key"), status("second-key")) == (200, 401)
            write(path, entry("ann", "second-key"))
            os.kill(process.pid, signal.SIGHUP)
            wait_until(lambda: (status("first-key"), status("second-key")) == (401, 200))
            write(path, "broken")
            os.kill(process.pid, signal.SIGHUP)
            time.sleep(0.2)
            assert status("second-key") == 200
        finally:
            process.terminate()
        log = process.stdout.read()
    assert "read again" in log
    assert "stay as they were" in log
    assert "second-key" not in log


def test_keys_never_reach_the_log(send: Send, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        send("POST", CHAT, config=ServerConfig(keys=ring()), json=GOOD, headers=bearer())
        send("POST", CHAT, config=ServerConfig(keys=ring()), json=GOOD, headers=bearer("wrong-secret"))
    assert SECRET not in caplog.text
    assert "wrong-secret" not in caplog.text
    assert json.dumps(repr(ring().find(SECRET))).find(SECRET) < 0
