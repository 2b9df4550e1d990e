"""Every pair of values of any two fields through a real engine: an answer that keeps its promises, or a clear 400."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from checks import check_error, events
from pairs import CHOICES, PATTERN, RULES, TABLES, TOOLS, Body, bad_bodies, bodies, good_rows, missing_pairs
from serving import engine_pid, serving

from mixtral import limits
from mixtral.server import Client, ServerConfig, process
from mixtral.wire import Start

CHAT, COMPLETIONS = TABLES
NAMES = {tool["function"]["name"] for tool in TOOLS}


@pytest.mark.parametrize("path", TABLES)
def test_every_field_is_in_the_table(path: str) -> None:
    found = {name for column in TABLES[path].values() for part in column for name in part}
    assert found == limits.ROUTES[path].keys() - {"model"}


@pytest.mark.parametrize("path", TABLES)
def test_every_pair_is_in_a_row(path: str) -> None:
    rows = good_rows(TABLES[path])
    assert missing_pairs(TABLES[path], rows) == []
    assert missing_pairs(TABLES[path], rows[: len(rows) // 2])
    assert len(rows) < 200


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Client]]:
    config = ServerConfig(port=0, drain_s=1.0, queue_timeout_s=600)
    with serving(process(Start(max_num_seqs=8)), config, grammars=True) as (address, client, _):
        yield address, client


def check_choice(body: Body, choice: dict[str, Any], path: str) -> None:
    """What was asked for is there: form, calls, log-probabilities."""
    assert choice["finish_reason"] in ("stop", "length", "tool_calls")
    message = choice["message"] if path == CHAT else {"content": choice["text"]}
    calls = message.get("tool_calls") or []
    assert bool(calls) >= (choice["finish_reason"] == "tool_calls")
    for call in calls:
        assert call["function"]["name"] in NAMES
        if choice["finish_reason"] == "tool_calls":
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    form = (body.get("response_format") or {}).get("type", "text")
    text = message["content"]
    if choice["finish_reason"] == "stop" and not body.get("echo") and not calls:
        if form.startswith("json"):
            json.loads(text)
        elif form == "regex":
            assert re.fullmatch(PATTERN, text)
        elif form == "choice":
            assert text in CHOICES
        elif form == "grammar":
            assert re.fullmatch("b*a", text)
    asked = body.get("logprobs") is not None and body.get("logprobs") is not False
    assert (choice["logprobs"] is not None) == asked


def check_answer(path: str, body: Body, answer: httpx.Response) -> None:
    count = body.get("n", 1)
    if path == COMPLETIONS and isinstance(body["prompt"], list) and isinstance(body["prompt"][0], str | list):
        count *= len(body["prompt"])
    asked = body.get("mixtral") or {}
    # Of the last token of an answer nothing is told: it was not put through the model.
    surely = asked.get("prompt") or asked.get("routing") == "counts"
    most = body.get("max_tokens", body.get("max_completion_tokens"))
    if body.get("stream"):
        data = events(answer)
        assert data[-1] == "[DONE]", data[-1]
        choices = [choice for event in data[:-1] for choice in event["choices"]]
        ends = [choice["index"] for choice in choices if choice["finish_reason"]]
        assert sorted(ends) == list(range(count))
        assert bool(surely) <= any("mixtral" in event for event in data[:-1]) <= bool(asked)
        assert any(event.get("usage") for event in data[:-1]) == bool(body.get("stream_options"))
        return
    found = answer.json()
    assert [choice["index"] for choice in found["choices"]] == list(range(count))
    for choice in found["choices"]:
        check_choice(body, choice, path)
    assert found["usage"]["completion_tokens"] <= count * most
    several = bool(asked) and found["usage"]["completion_tokens"] > count
    assert bool(surely or several) <= ("mixtral" in found) <= bool(asked)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", TABLES)
def test_what_goes_together_is_answered(served: tuple[str, Client], path: str) -> None:
    address, client = served
    engine = engine_pid(client)
    with httpx.Client(base_url=address, timeout=600) as http, ThreadPoolExecutor(max_workers=6) as pool:

        def ask(body: Body) -> httpx.Response:
            while True:  # too many grammars at once are a 503, as they should be
                answer = http.post(path, json={"model": "embedded"} | body)
                if answer.status_code != 503:
                    return answer
                time.sleep(int(answer.headers["retry-after"]))

        plain = {"model": "embedded", "temperature": 0, "max_tokens": 8, "prompt": "The castle"}
        before = http.post(COMPLETIONS, json=plain).json()["choices"]
        asked = list(bodies(TABLES[path]))
        wrong = []
        for body, answer in zip(asked, pool.map(ask, asked), strict=True):
            try:
                assert answer.status_code == 200
                check_answer(path, body, answer)
            except (AssertionError, ValueError) as error:
                wrong.append(f"{error}\n{json.dumps(body)}\n{answer.status_code} {answer.text}")
        assert not wrong, "\n\n".join(wrong)
        assert http.post(COMPLETIONS, json=plain).json()["choices"] == before
    assert engine_pid(client) == engine
    assert client.supervisor.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES)
def test_what_does_not_go_together_is_a_400_that_says_so(served: tuple[str, Client], path: str) -> None:
    address, client = served
    seen = set()
    with httpx.Client(base_url=address, timeout=60) as http:
        for body, rule in bad_bodies(TABLES[path]):
            answer = http.post(path, json={"model": "embedded"} | body)
            check_error(answer, 400, "unsupported_combination", rule.param)
            assert rule.param.split(".")[0] in answer.json()["error"]["message"] or "function call" in answer.text
            seen.add(rule)
    assert seen | {rule for rule in RULES if rule in _elsewhere(path)} == set(RULES)
    assert client.supervisor.restarts == 0


def _elsewhere(path: str) -> list[Any]:
    """Rules that no request of this route can break."""
    broken = {rule for _, rule in bad_bodies(TABLES[path])}
    others = {rule for other in TABLES if other != path for _, rule in bad_bodies(TABLES[other])}
    return [rule for rule in RULES if rule not in broken and rule in others]
