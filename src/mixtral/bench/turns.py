"""The sides take turns: ours, the peer, ours, the peer; the first turn of each warms up and is not counted.

The present machine may be half as fast a minute later, so its limits are measured before and after each piece of work,
and only the ratio of neighbouring turns means much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from mixtral.bench.limits import Limits
from mixtral.bench.others import Watch
from mixtral.bench.sides import Side
from mixtral.bench.work import Work
from mixtral.config import MixtralConfig
from mixtral.errors import BenchError, CapacityError

__all__ = ["OURS", "Command", "Measured", "check", "settings_of", "started", "take_turns"]

OURS = "mixtral"


@dataclass(frozen=True, slots=True)
class Command:
    """How a side is started."""

    name: str
    command: Sequence[str]


@dataclass(frozen=True, slots=True)
class Measured:
    """One piece of work: by side the seconds of each turn's steps (one number, where only the whole is timed); how many
    experts of each layer a unit used, on average; the limits of the machine meanwhile; by side what others took of its
    processors while that side worked, 0 to 1, None where nobody knows."""

    work: Work
    seconds: Mapping[str, list[list[float]]]
    experts: list[float]
    limits: Limits
    others: Mapping[str, float | None]


@dataclass(slots=True)
class _Turns:
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    experts: list[list[float]] = field(default_factory=list)
    others: dict[str, list[float | None]] = field(default_factory=dict)


def check(config: MixtralConfig, work: Sequence[Work], turns: int) -> None:
    """Raise before anything runs, if the model cannot hold what a sequence becomes.

    Raises:
        CapacityError: the context of the model is too short.
    """
    for one in work:
        if one.cells(turns) > config.max_position_embeddings:
            raise CapacityError(
                f"{one.name} with {turns} turns needs {one.cells(turns):,} tokens in a sequence; the context of this "
                f"model is {config.max_position_embeddings:,}. Lower --depth, --tokens, --steps or --turns"
            )


def settings_of(model: str, config: MixtralConfig, work: Sequence[Work], *, threads: int, turns: int) -> dict[str, Any]:
    """What a side is told before it loads the model: the path, the threads, the longest sequence and the most of them
    (``context``, ``sequences``), GiB that hold twice their cache (``cache_gib``), and whether a prompt is returned to
    (``reuse``)."""
    per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    most = max(one.sequences * one.cells(turns) for one in work)
    return {
        "model": model,
        "threads": threads,
        "context": max(one.cells(turns) for one in work),
        "sequences": max(one.sequences for one in work),
        "cache_gib": math.ceil(2 * most * per_token / 2**30),
        "reuse": any(one.kind == "context" for one in work),
    }


@contextmanager
def started(
    sides: Sequence[Command], settings: Mapping[str, Any], *, timeout_s: float, told: Callable[[str], None]
) -> Iterator[list[Side]]:
    """All sides with the model loaded, one after the other; ``told`` is told which. Leaving the context ends them.

    Raises:
        BenchError: one cannot start.
    """
    with ExitStack() as stack:
        running: list[Side] = []
        for side in sides:
            told(f"{side.name}: loading the model")
            running.append(stack.enter_context(Side(side.name, side.command, settings, timeout_s=timeout_s)))
        yield running


def take_turns(
    running: Sequence[Side],
    work: Work,
    *,
    turns: int,
    vocab_size: int,
    limits: Callable[[], Limits],
    told: Callable[[str], None],
) -> Measured:
    """Let the sides, ours first, do a piece of work in turns; ``told`` is told what is going on.

    Raises:
        BenchError: a side fails.
    """
    before = limits()
    fills = work.kind == "context"
    for side in running:
        if fills:
            told(f"{work.name}: {side.name} reads its prompt")
        request = {"do": "prepare", "work": {**work.to_json(), "cells": work.cells(turns)}}
        side.ask({**request, "prompts": work.prompts(0, vocab_size) if fills else []})
    found = _Turns({side.name: [] for side in running}, others={side.name: [] for side in running})
    for turn in range(turns + 1):
        told(f"{work.name}: " + (f"turn {turn} of {turns}" if turn else "warm-up"))
        _turn(running, work, turn, vocab_size, found)
    experts = [sum(counts) / len(counts) for counts in zip(*found.experts, strict=True)]
    others = {side: _mean(shares) for side, shares in found.others.items()}
    return Measured(work, found.seconds, experts, before.best(limits()), others)


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _turn(running: Sequence[Side], work: Work, turn: int, vocab_size: int, found: _Turns) -> None:
    """One turn of every side, in order. The first one decides which tokens the others read."""
    prompts = [] if work.kind == "context" else work.prompts(turn, vocab_size)
    fed: list[list[int]] = []
    for side in running:
        watch = Watch(side.group)
        answer = side.ask({"do": "run", "prompts": prompts, "fed": fed})
        share = watch.share()
        seconds = _seconds(answer.get("seconds"), work, side.name)
        if side.name == OURS:
            fed, experts = answer["fed"], answer["experts"]
            found.experts += [experts] if turn else []
        if turn:
            found.seconds[side.name].append(seconds)
            found.others[side.name].append(share)


def _seconds(given: Any, work: Work, side: str) -> list[float]:
    """The times in an answer, if they are times: of every step, or of the whole."""
    listed = given if isinstance(given, list) and len(given) in {1, work.steps or 1} else []
    times = [float(one) for one in listed if isinstance(one, int | float) and math.isfinite(one) and one > 0]
    if not times or len(times) != len(listed):
        raise BenchError(f"{side}: gave the times {str(given)[:80]} for {work.name}; expected seconds above 0")
    return times
