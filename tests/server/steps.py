"""A deterministic engine behind the loop, without a model; as a program, an engine process that runs it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mixtral import faults
from mixtral.errors import CapacityError, ConfigError
from mixtral.wire import (
    Candidate,
    Done,
    Failed,
    Hello,
    Start,
    Started,
    Stats,
    Submit,
    TokenEvent,
    Tokens,
    Update,
)
from mixtral.worker import main

MARK = 31_999  # a token id that tests put into prompts which are to fail
CONTEXT = 4096


def token(prompt: Sequence[int], sequence: int, position: int) -> int:
    """The token at a position of an answer: it depends on the prompt alone."""
    state = (sum((place + 1) * id for place, id in enumerate(prompt)) * 31 + sequence * 17 + position * 7919) % 9973
    return 1000 + state


def answer(prompt: Sequence[int], count: int, sequence: int = 0) -> list[int]:
    """The ids of an answer."""
    return [token(prompt, sequence, position) for position in range(count)]


@dataclass
class Running:
    """One request in the engine."""

    submit: Submit
    made: int = 0
    started: bool = False
    paused: bool = False
    dropped: set[int] = field(default_factory=set)  # sequences that were aborted
    params_top: tuple[Candidate, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.params_top = tuple(Candidate(n, -1.0) for n in range(self.submit.params.logprobs or 0))


class StepEngine:
    """Makes one token of every running request per step. At most ``slots`` run; others wait in order of arrival."""

    def __init__(self, *, slots: int = 8, delay_s: float = 0.0) -> None:
        self.slots = slots
        self.delay_s = delay_s
        self.requests: dict[str, Running] = {}
        self.counts = {"steps": 0, "output": 0, "prompt": 0}

    @property
    def has_work(self) -> bool:
        return not all(running.paused for running in self.requests.values())

    def submit(self, submit: Submit) -> None:
        need = max(map(len, submit.prompts)) + submit.params.max_tokens
        if need > CONTEXT:
            raise CapacityError(f"{need} tokens; the limit is {CONTEXT}", code="request_exceeds_cache", param="prompt")
        self.requests[submit.request] = Running(submit)

    def abort(self, request: str, sequence: int | None = None) -> None:
        if sequence is None:
            self.requests.pop(request, None)
        elif request in self.requests:
            self.requests[request].dropped.add(sequence)

    def pause(self, request: str, *, on: bool) -> None:
        if request in self.requests:
            self.requests[request].paused = on

    def step(self, begin: Callable[[set[str]], None] | None = None) -> list[Update]:
        chosen = [running for running in self.requests.values() if not running.paused][: self.slots]
        if begin is not None:
            begin({running.submit.request for running in chosen})
        time.sleep(self.delay_s)
        self.counts["steps"] += 1
        updates: list[Update] = []
        for running in chosen:
            updates += self._advance(running)
        return updates

    def _advance(self, running: Running) -> list[Update]:
        submit = running.submit
        updates: list[Update] = []
        if not running.started:
            running.started = True
            self.counts["prompt"] += sum(map(len, submit.prompts))
            updates.append(Started(request=submit.request, cached=(0,) * len(submit.prompts)))
        if any(faults.poisons(prompt) for prompt in submit.prompts):
            del self.requests[submit.request]
            return [*updates, Failed(request=submit.request, code="numerical_error", message="a number is not finite")]
        position, running.made = running.made, running.made + 1
        last = running.made >= submit.params.max_tokens
        events = [
            TokenEvent(
                sequence=index * submit.n + choice,
                id=token(prompt, choice, position),
                logprob=None if submit.params.logprobs is None else -1.0,
                top=running.params_top,
                finish_reason="length" if last else None,
            )
            for index, prompt in enumerate(submit.prompts)
            for choice in range(submit.n)
            if index * submit.n + choice not in running.dropped
        ]
        self.counts["output"] += len(events)
        updates.append(Tokens(request=submit.request, events=events))
        if last:
            del self.requests[submit.request]
            updates.append(Done(request=submit.request))
        return updates

    def stats(self) -> Stats:
        running = min(len(self.requests), self.slots)
        return Stats(
            steps=self.counts["steps"],
            waiting=len(self.requests) - running,
            running=running,
            pages_total=64,
            pages_used=running,
            prompt_tokens=self.counts["prompt"],
            output_tokens=self.counts["output"],
            expert_tokens=[[self.counts["output"]] * 4] * 2,
        )


HELLO = Hello(
    name="steps",
    context=CONTEXT,
    vocab_size=32768,
    layers=2,
    experts=4,
    tokenizer="v3",
    cache_tokens=8192,
    fingerprint="fp_steps",
)


def build(start: Start) -> tuple[StepEngine, Hello]:
    """``start.model`` is ``steps:SECONDS per step:SECONDS to load``; any other cannot be built."""
    kind, delay, load = [*start.model.split(":"), "0", "0"][:3]
    if kind != "steps":
        raise ConfigError(f"there is no model {start.model!r}", param="model")
    time.sleep(float(load))
    return StepEngine(slots=start.max_num_seqs or 8, delay_s=float(delay)), HELLO


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], build))
