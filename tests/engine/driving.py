"""Driving an engine over the hash model: requests, steps, and what came of them."""

from __future__ import annotations

from typing import Any

from hash_model import HashModel, written

from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.wire import Failed, SamplingParams, Submit, TokenEvent, Tokens, Update

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, seed=1, stop_ids=())


class SteadyCosts:
    """Every step takes the same time, so that drafts always pay."""

    def observe(self, tokens: int, seconds: float) -> None:
        pass

    def of(self, tokens: int) -> float:
        return 1.0 + 0.001 * tokens


def engine_of(model: HashModel | None = None, *, grammar: Any = None, **fields: Any) -> Engine:
    config = EngineConfig(**{"pages": 64, **fields})
    found = Engine(model or HashModel(), config, grammar)  # type: ignore[arg-type]
    found._costs = SteadyCosts()  # type: ignore[assignment]
    return found


def text(length: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 31 + place * place // 7 + place) % 6 for place in range(length)]


def submit(name: str, *prompts: list[int], params: SamplingParams = GREEDY, **fields: Any) -> Submit:
    return Submit(request=name, prompts=list(prompts), params=params, **fields)


def finish(engine: Engine, limit: int = 10_000) -> list[Update]:
    """Step until nothing is left to do."""
    updates: list[Update] = []
    for _ in range(limit):
        if not engine.has_work:
            engine.scheduler.check_integrity()
            assert engine.stats().pages_used == 0
            return updates
        updates += engine.step()
        engine.scheduler.check_integrity()
    raise AssertionError(f"not done after {limit} steps")


def events_of(updates: list[Update], name: str) -> list[TokenEvent]:
    return [event for one in updates if isinstance(one, Tokens) and one.request == name for event in one.events]


def ids_of(updates: list[Update], name: str, sequence: int = 0) -> list[int]:
    return [event.id for event in events_of(updates, name) if event.sequence == sequence]


def expected(one: Submit, sequence: int = 0) -> list[int]:
    return [event.id for event in written(one, sequence)]


def kinds(updates: list[Update]) -> list[str]:
    return [type(update).__name__ for update in updates]


def failed(updates: list[Update]) -> Failed:
    (found,) = [update for update in updates if isinstance(update, Failed)]
    return found
