"""What the server counts, in Prometheus's text format. Names are fixed; no label comes from a request's text."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mixtral.wire import Heartbeat, Started, Stats, Tokens, Update

__all__ = ["CONTENT_TYPE", "Metrics", "Times"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


@dataclass(slots=True)
class Times:
    """When a request came, and when its last tokens did."""

    began: float = field(default_factory=time.monotonic)
    last: float | None = None


class Metrics:
    """All metrics of one server. Lives in the event loop; nothing in it waits."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a series per counter that says when it began
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Answers by route, status and error code", "route", "status", "code")
        self._aborted = self._counter("aborted", "Requests that ended before their answer did", "reason")
        self._waiting = self._gauge("queue_requests", "Requests that wait for the engine")
        self._waiting_tokens = self._gauge("queue_tokens", "Prompt tokens of the requests that wait")
        self._running = self._gauge("running", "Requests that the engine works on")
        self._up = self._gauge("engine_up", "1 while the engine takes requests")
        self._restarts = self._counter("engine_restarts", "Times that the engine was started again")
        self._restarted = 0
        self._grammar_bytes = self._gauge("grammar_cache_bytes", "Memory of compiled grammars that are kept")
        self._queue = self._histogram("queue", "Time in the queue", _LONG_S)
        self._ttft = self._histogram("ttft", "Time from a request to its first token", _LONG_S)
        self._itl = self._tally("itl", "Time between tokens of one answer", _SHORT_S)
        self._request = self._histogram("request", "Time from a request to the end of its answer", _LONG_S)
        self._grammar = self._histogram("grammar_compile", "Time to compile a grammar", _SHORT_S)
        self._step = self._tally("step", "Time of one step of the engine", _SHORT_S)
        self._lag = self._histogram("loop_lag", "How late the event loop was", _SHORT_S)
        self._engine = _EngineStats()
        self._registry.register(self._engine)

    def text(self) -> bytes:
        """All of them, as ``GET /metrics`` answers."""
        return generate_latest(self._registry)

    def answered(self, route: str, status: int, code: str) -> None:
        """A request was answered. ``route`` is one of the server's own, ``code`` an error code or empty."""
        self._requests.labels(route, str(status), code).inc()

    def aborted(self, reason: str) -> None:
        """A request was ended before its answer was."""
        self._aborted.labels(reason).inc()

    def progress(self, times: Times, update: Update, *, sequences: int) -> None:
        """Something came for a request that makes ``sequences`` answers."""
        now = time.monotonic()
        if isinstance(update, Started):
            self._queue.observe(now - times.began)
        elif isinstance(update, Tokens):
            if times.last is None:
                self._ttft.observe(now - times.began)
            else:
                # Several tokens of one answer may come together.
                self._itl.observe((now - times.last) * sequences / max(len(update.events), sequences))
            times.last = now

    def finished(self, times: Times) -> None:
        """A request is done with, well or not."""
        self._request.observe(time.monotonic() - times.began)

    def requests(self, *, waiting: int, waiting_tokens: int, running: int) -> None:
        """What the engine has now."""
        self._waiting.set(waiting)
        self._waiting_tokens.set(waiting_tokens)
        self._running.set(running)

    def engine(self, *, up: bool, restarts: int) -> None:
        """Whether the engine is there, and how often it was started again."""
        self._up.set(up)
        self._restarts.inc(restarts - self._restarted)
        self._restarted = restarts

    def beat(self, beat: Heartbeat) -> None:
        """What the engine counted."""
        self._engine.stats = beat.stats
        for seconds in beat.seconds:
            self._step.observe(seconds)

    def grammar(self, seconds: float, cache_bytes: int) -> None:
        """A grammar was compiled, and all that are kept take ``cache_bytes``."""
        self._grammar.observe(seconds)
        self._grammar_bytes.set(cache_bytes)

    def loop_lag(self, seconds: float) -> None:
        """The event loop came to its work this much too late."""
        self._lag.observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mixtral_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"mixtral_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"mixtral_{name}_seconds", text, registry=self._registry, buckets=buckets)

    def _tally(self, name: str, text: str, buckets: tuple[float, ...]) -> _Tally:
        made = _Tally(f"mixtral_{name}_seconds", text, buckets)
        self._registry.register(made)
        return made


class _Tally(Collector):
    """A histogram of what happens for every token, so without locks: only the event loop counts in it."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Family]:
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(ends, itertools.accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class _EngineStats(Collector):
    """The engine's own counters, as they were last heard. They begin anew with each engine process."""

    def __init__(self) -> None:
        self.stats = Stats()

    def collect(self) -> Iterator[Family]:
        stats = self.stats
        yield CounterMetricFamily(
            "mixtral_preemptions", "Sequences that gave their pages to others", value=stats.preemptions
        )
        pages = GaugeMetricFamily("mixtral_kv_pages", "Pages of the key-value cache", labels=["state"])
        for state, count in (
            ("used", stats.pages_used),
            ("cached", stats.pages_cached),
            ("free", stats.pages_total - stats.pages_used - stats.pages_cached),
        ):
            pages.add_metric([state], count)
        yield pages
        tokens = CounterMetricFamily("mixtral_tokens", "Tokens by kind", labels=["kind"])
        for kind, count in (
            ("prompt", stats.prompt_tokens),
            ("cached", stats.cached_tokens),
            ("output", stats.output_tokens),
        ):
            tokens.add_metric([kind], count)
        yield tokens
        experts = CounterMetricFamily("mixtral_expert_tokens", "Tokens by expert", labels=["layer", "expert"])
        for layer, row in enumerate(stats.expert_tokens):
            for expert, count in enumerate(row):
                experts.add_metric([str(layer), str(expert)], count)
        yield experts
