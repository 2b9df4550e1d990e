"""The names of metrics, what their labels may hold, and a dashboard that uses no other names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import complete, serving, spawn, until

from mixtral.server.metrics import Metrics, Times
from mixtral.wire import Done, Heartbeat, Started, Stats, TokenEvent, Tokens

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"
# name -> labels
NAMES = {
    "mixtral_requests": {"route", "status", "code"},
    "mixtral_aborted": {"reason"},
    "mixtral_queue_requests": set(),
    "mixtral_queue_tokens": set(),
    "mixtral_running": set(),
    "mixtral_preemptions": set(),
    "mixtral_kv_pages": {"state"},
    "mixtral_tokens": {"kind"},
    "mixtral_expert_tokens": {"layer", "expert"},
    "mixtral_engine_up": set(),
    "mixtral_engine_restarts": set(),
    "mixtral_grammar_cache_bytes": set(),
    **{
        f"mixtral_{name}_seconds": {"le"}
        for name in ("queue", "ttft", "itl", "request", "grammar_compile", "step", "loop_lag")
    },
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def filled() -> Metrics:
    """One of everything."""
    metrics = Metrics()
    metrics.answered("/v1/models", 200, "")
    metrics.aborted("disconnect")
    metrics.engine(up=True, restarts=2)
    metrics.requests(waiting=3, waiting_tokens=40, running=5)
    stats = Stats(
        pages_total=10,
        pages_used=4,
        pages_cached=1,
        preemptions=7,
        prompt_tokens=11,
        cached_tokens=12,
        output_tokens=13,
        expert_tokens=[[1, 2], [3, 4]],
    )
    metrics.beat(Heartbeat(step=1, step_age=0.0, stats=stats, seconds=[0.2, 0.02]))
    metrics.grammar(0.1, 1000)
    metrics.loop_lag(0.001)
    times = Times()
    metrics.progress(times, Started(request="a", cached=(0,)), sequences=1)
    for _ in range(3):
        metrics.progress(times, Tokens(request="a", events=[TokenEvent(sequence=0, id=1)]), sequences=1)
    metrics.progress(times, Done(request="a"), sequences=1)
    metrics.finished(times)
    return metrics


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(text).values()
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def test_the_names_and_labels_are_the_documented_ones() -> None:
    found = families(filled().text().decode())
    assert found.keys() == NAMES.keys()
    for name, family in found.items():
        labels = set().union(*(sample.labels for sample in family.samples))
        assert labels == NAMES[name], name
        assert family.documentation


def test_the_values_are_what_was_counted() -> None:
    text = filled().text().decode()
    assert value(text, "mixtral_requests_total", route="/v1/models", status="200", code="") == 1
    assert value(text, "mixtral_engine_restarts_total") == 2
    assert [value(text, "mixtral_kv_pages", state=state) for state in ("used", "cached", "free")] == [4, 1, 5]
    assert [value(text, "mixtral_tokens_total", kind=kind) for kind in ("prompt", "cached", "output")] == [11, 12, 13]
    assert value(text, "mixtral_expert_tokens_total", layer="1", expert="0") == 3
    assert value(text, "mixtral_step_seconds_count") == 2
    assert value(text, "mixtral_step_seconds_sum") == pytest.approx(0.22)
    assert value(text, "mixtral_queue_seconds_count") == 1
    assert value(text, "mixtral_ttft_seconds_count") == 1
    assert value(text, "mixtral_itl_seconds_count") == 2
    assert value(text, "mixtral_request_seconds_count") == 1


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.aborted("x")
    assert "mixtral_aborted_total{" not in second.text().decode()


def test_tokens_that_come_together_share_the_time_between() -> None:
    metrics, times = Metrics(), Times()
    events = [TokenEvent(sequence=0, id=id) for id in range(4)]
    for _ in range(2):
        metrics.progress(times, Tokens(request="a", events=events), sequences=1)
        times.last = (times.last or 0) - 1.0  # a second passed
    metrics.progress(times, Tokens(request="a", events=events), sequences=1)
    total = value(metrics.text().decode(), "mixtral_itl_seconds_sum")
    assert 0.45 <= total <= 0.6  # a quarter of a second, twice


def test_labels_never_come_from_a_request() -> None:
    with serving(spawn()) as (address, client, _):
        complete(address, [1], 3)
        complete(address, [1], 3, **{"evil-field": 1})
        complete(address, [1], 0)
        for path in ("/evil-path", "/v1/models/evil-name", "/v1/evil/../models", "/static/evil.js"):
            httpx.get(address + path, headers={"x-evil-header": "evil", "user-agent": "evil"})
        httpx.request("EVIL", address + "/v1/models")
        httpx.post(address + "/v1/completions", content=b'{"model": "evil", "prompt": "evil"}')
        until(lambda: not client.busy)
        response = httpx.get(address + "/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "evil" not in response.text.lower()
        found = families(response.text)
        assert found.keys() == NAMES.keys()
        routes = {sample.labels["route"] for sample in found["mixtral_requests"].samples}
        assert {"/v1/completions", "none"} <= routes
        assert value(response.text, "mixtral_requests_total", route="/v1/completions", status="200", code="") == 1


def test_the_dashboard_uses_no_other_names_and_all_of_them() -> None:
    exported = {key[0] for key in samples(filled().text().decode())}
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    used = set()
    for panel in board["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = set(re.findall(r"mixtral_\w+", target["expr"]))
            assert names, target
            used |= names
            labels = set(re.findall(r"[{,]\s*(\w+)\s*(?:=|!=|=~)", target["expr"]))
            by = re.search(r"sum by \(([\w, ]+)\)", target["expr"])
            labels |= set(re.split(r",\s*", by[1])) if by else set()
            for name in names:
                family = re.sub(r"_(total|bucket|sum|count)$", "", name)
                assert labels <= NAMES[family] | {"le"}, target["expr"]
    assert used <= exported
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in used}
    assert shown == NAMES.keys()


def test_the_dashboard_is_well_formed() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        own = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not own & cells, panel["title"]
        cells |= own
