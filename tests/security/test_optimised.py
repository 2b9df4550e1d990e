"""Attacks on a server that runs as it is and on one that runs under ``-OO``: each is refused, and nothing breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import httpx
import pytest
from attacks import CHAT, NEEDED, Attack, all_attacks
from watching import Watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LEAKS = ("Traceback", "site-packages", ".py", "0x7f", "sk-town-desk", "AssertionError")


def send(client: httpx.Client, attack: Attack) -> httpx.Response:
    headers = {"content-type": "application/json"} | attack.headers
    request = client.build_request(attack.method, attack.path, content=attack.body, headers=headers)
    if attack.headers.get("content-type") == "":
        del request.headers["content-type"]
    return client.send(request)


def complaint(attack: Attack, response: httpx.Response) -> str:
    """What is wrong with the answer to an attack; empty if nothing is."""
    what = f"{attack.method} {attack.path[:60]} {attack.body[:120]!r} {attack.headers}: {response.status_code}"
    if attack.status == 0 and response.status_code in (200, 400):
        return ""
    if response.status_code != attack.status:
        return f"{what}, expected {attack.status}: {response.text[:200]}"
    error = json.loads(response.content)["error"]
    if sorted(error) != ["code", "message", "param", "type"]:
        return f"{what}: members {sorted(error)}"
    if attack.codes and error["code"] not in attack.codes:
        return f"{what}: code {error['code']}, expected one of {sorted(attack.codes)}"
    if attack.param != "*" and error["param"] != attack.param:
        return f"{what}: param {error['param']!r}, expected {attack.param!r}"
    leaked = [word for word in LEAKS if word in error["message"]]
    return f"{what}: {leaked} in the message" if leaked else ""


def test_every_attack_is_refused(watched: Watched) -> None:
    before = watched.client.post(CHAT, json=NEEDED[CHAT] | {"temperature": 0, "max_tokens": 8}).json()["choices"]
    found, counts = [], Counter[int]()
    for attack in all_attacks():
        response = send(watched.client, attack)
        counts[response.status_code] += 1
        found += filter(None, [complaint(attack, response)])
    assert not found, "\n".join(found)
    assert sum(counts.values()) >= 1000
    assert counts[500] == counts[503] == 0
    assert watched.client.get("/health").json() == {"status": "ok"}
    after = watched.client.post(CHAT, json=NEEDED[CHAT] | {"temperature": 0, "max_tokens": 8}).json()["choices"]
    assert after == before
    metrics = watched.client.get("/metrics").text
    assert "\nmixtral_engine_restarts_total 0.0" in metrics
    assert "Traceback" not in watched.server.log


def test_a_wrong_expectation_is_found_out(watched: Watched) -> None:
    good = Attack(CHAT, json.dumps(NEEDED[CHAT] | {"max_tokens": 1}).encode())
    assert "200, expected 400" in complaint(good, send(watched.client, good))
    other = Attack(CHAT, b"{", codes=frozenset({"route_not_found"}))
    assert "expected one of" in complaint(other, send(watched.client, other))
    named = Attack(CHAT, json.dumps(NEEDED[CHAT] | {"top_p": 2}).encode(), param="top_k")
    assert "'top_p', expected 'top_k'" in complaint(named, send(watched.client, named))


@pytest.mark.parametrize("flags", [[], ["-OO"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "there are no API keys"),
        (["--host", "::"], "there are no API keys"),
        (["--allowed-origin", "chat.example"], "expected a site"),
        (["--queue-size", "0"], "queue_size"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--max-num-batched-tokens", "0"], "max_num_batched_tokens"),
        (["--tls-cert", "nothing.pem"], "and its key"),
        (["--api-key-file", "nothing.toml"], "nothing.toml"),
        (["--api-key", ""], "key"),
        (["--trust-remote-code"], "no code of a model folder"),
    ],
)
def test_a_careless_start_is_refused(flags: list[str], options: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, *flags, "-m", "mixtral", "serve", "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
