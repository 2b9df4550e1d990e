"""The embedded model behind the process boundary: the same bytes as in Python, also when things go wrong around it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from checks import check_error, events
from serving import engine_pid, serving, until
from test_storms import idle, sample

import mixtral
from mixtral.server import ServerConfig, process
from mixtral.wire import Start

pytestmark = pytest.mark.slow
TEXTS = [
    "When does breakfast start?",
    "Where is the castle?",
    "Ich suche ein Zimmer mit Balkon.",
    "À quelle heure ferme le musée ?",
    "Quanto costa il biglietto?",
    "¿Dónde está la estación?",
]
MARK = "Zebra"  # a word whose token no other text has


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What each text is answered when nothing else runs."""
    llm = mixtral.load("embedded")
    return {
        text: llm.chat([{"role": "user", "content": text}], temperature=0.0, max_tokens=40).content for text in TEXTS
    }


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=64) as found:
        yield found


def ask(address: str, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "embedded", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 40}
    return httpx.post(address + "/v1/chat/completions", json=body | fields, timeout=100)


def content(response: httpx.Response) -> str:
    if response.headers["content-type"].startswith("text/event-stream"):
        data = events(response)
        assert data[-1] == "[DONE]"
        return "".join(event["choices"][0]["delta"].get("content") or "" for event in data[:-1])
    return str(response.json()["choices"][0]["message"]["content"])


def test_many_at_once_get_what_each_gets_alone(alone: dict[str, str], pool: ThreadPoolExecutor) -> None:
    with serving(process(Start())) as (address, client, _):
        texts = TEXTS * 8
        asked = [pool.submit(ask, address, text, stream=n % 2 == 0) for n, text in enumerate(texts)]
        assert [content(each.result()) for each in asked] == [alone[text] for text in texts]
        until(lambda: idle(client))


def test_a_tiny_cache_only_makes_it_slower(alone: dict[str, str], pool: ThreadPoolExecutor) -> None:
    start = Start(cache_bytes=3 * 2**20, max_num_seqs=16, beat_s=0.1)
    config = ServerConfig(port=0, drain_s=1.0, queue_timeout_s=300)
    with serving(process(start), config) as (address, client, _):
        long = " ".join(TEXTS)
        llm = mixtral.load("embedded")
        messages = [{"role": "user", "content": long}]
        whole = llm.chat(messages, temperature=0.0, max_tokens=300, ignore_eos=True).content
        asked = [pool.submit(ask, address, long, max_tokens=300, ignore_eos=True) for _ in range(12)]
        assert {content(each.result()) for each in asked} == {whole}
        until(lambda: idle(client))
        assert sample(address, "mixtral_preemptions_total") > 0
        assert sample(address, 'mixtral_kv_pages{state="used"}') == 0


def test_a_killed_engine_comes_back_with_the_same_answers(alone: dict[str, str], pool: ThreadPoolExecutor) -> None:
    with serving(process(Start())) as (address, client, _):
        asked = [pool.submit(ask, address, text, max_tokens=400, ignore_eos=True, stream=True) for text in TEXTS]
        until(lambda: sum(run.started for run in client._runs.values()) == len(TEXTS))
        os.kill(engine_pid(client), signal.SIGKILL)
        for each in asked:
            response = each.result(timeout=60)
            if response.status_code == 200:
                assert events(response)[-1]["error"]["code"] == "engine_dead"
            else:
                check_error(response, 500, "engine_dead", None)
        until(lambda: client.state == "ready")
        assert content(ask(address, TEXTS[0])) == alone[TEXTS[0]]


def test_poisoned_logits_end_their_request_and_no_other(alone: dict[str, str], pool: ThreadPoolExecutor) -> None:
    tokenizer = mixtral.load("embedded").tokenizer
    mark = min({*tokenizer.encode(f"a {MARK}")} - {id for text in ["a", *TEXTS] for id in tokenizer.encode(text)})
    with serving(process(Start(faults=(f"logits:nan:{mark}",)))) as (address, client, _):
        asked = [pool.submit(ask, address, text) for text in TEXTS]
        check_error(ask(address, f"a {MARK}"), 500, "numerical_error", None)
        assert events(ask(address, f"a {MARK}", stream=True))[-1]["error"]["code"] == "numerical_error"
        assert [content(each.result()) for each in asked] == [alone[text] for text in TEXTS]
        assert content(ask(address, TEXTS[0])) == alone[TEXTS[0]]  # its pages were not left poisoned
        assert client.supervisor.restarts == 0
