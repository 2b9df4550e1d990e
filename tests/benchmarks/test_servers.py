"""Servers under test: started, asked, stopped, ended with what they started; or an error that says why."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest
from servers import Kind, Server, ServerError, llama_server, ours
from streams import prompts, request, wave

# Ready after a moment, with a child that never ends.
FAKE = """
import http.server, json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": "fake"}], "child": child.pid}).encode()
        self.send_response(200 if time.monotonic() - began > 0.2 else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
began = time.monotonic()
http.server.HTTPServer((sys.argv[2], int(sys.argv[4])), Handler).serve_forever()
"""


def fake(code: str = FAKE) -> Kind:
    return Kind("fake", [sys.executable, "-c", code], "/ready", {"more": 1})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_is_ready_asked_stopped_and_ended() -> None:
    with Server(fake()) as server:
        assert server.model == "fake"
        child = server._get("/any")["child"]
        assert alive(child)
        assert set(server.cpu()) == {"http", "engine"}
        assert server.cpu()["http"] > 0
        server.pause()
        with pytest.raises(OSError):
            __import__("urllib.request").request.urlopen(f"http://{server.host}/any", timeout=0.2)
        server.resume()
        assert server._get("/any")["child"] == child
        body = server.body([1, 2], 3, 1.0)
        assert (body["prompt"], body["max_tokens"], body["ignore_eos"], body["more"]) == ([1, 2], 3, True, 1)
        group = server.group
    assert not alive(group)
    end = time.monotonic() + 5.0
    while alive(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(child)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (fake("import sys; sys.stderr.write('no such model'); sys.exit(3)"), "exit code 3; its last lines:\nno such"),
        (fake("import time; print('loading', flush=True); time.sleep(60)"), "not ready in time; its last lines:\nload"),
        (Kind("none", ["/no/such/program"], "/ready"), "/no/such/program cannot be started"),
    ],
)
def test_a_server_that_does_not_get_ready(kind: Kind, told: str) -> None:
    with pytest.raises(ServerError, match=told):
        Server(kind, timeout_s=1.0)


def test_commands() -> None:
    mine = ours("m.gguf", 2, ["--max-num-seqs", "8"])
    assert mine.command[1:] == ["-m", "mixtral", "serve", "--model", "m.gguf", "--threads", "2", "--max-num-seqs", "8"]
    theirs = llama_server(Path("/x/llama-server"), "m.gguf", 2, slots=32, context=256, options=[])
    assert " ".join(theirs.command).startswith("/x/llama-server -m m.gguf -t 2 -tb 2 -np 32 -c 8192 ")


@pytest.mark.slow
def test_our_server_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).resolve().parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with Server(ours("embedded", 1, [])) as server:
        before = server.cpu()
        data = [request(server.host, server.body(one, 12, 1.0)) for one in prompts(3, 30, vocab_size=32000, seed=1)]
        found = asyncio.run(wave(server.address, [[one] for one in data]))
        assert [(answer.tokens, answer.prompt_tokens) for answer in found.answers] == [(12, 30)] * 3
        assert server.cpu()["engine"] > before["engine"]
