"""Requests and their sequences as the scheduler sees them: tokens, pages, states. No tensors, no clock."""

from __future__ import annotations

from enum import Enum

from mixtral.wire import FinishReason, Submit

__all__ = ["Phase", "Request", "Sequence"]


class Phase(Enum):
    """Where a sequence is. Only running ones own pages."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again, after its pages were taken away
    FINISHED = "finished"


class Sequence:
    """One answer to one prompt. The first ``computed`` of its ``tokens`` are stored in its pages.

    The tokens after those are fed next: what is left of the prompt, or the one that was sampled last.
    """

    __slots__ = (
        "computed",
        "finish_reason",
        "index",
        "limit",
        "number",
        "order",
        "passed",
        "phase",
        "preemptions",
        "prompt",
        "prompt_length",
        "request",
        "routed",
        "tokens",
    )

    def __init__(self, request: Request, index: int, number: int) -> None:
        submit = request.submit
        self.request = request
        self.index = index  # within the request
        self.number = number  # unique in the engine; names its pages
        self.prompt = index // submit.n
        self.tokens = list(submit.prompts[self.prompt])
        self.prompt_length = len(self.tokens)
        # Tokens that are ever stored: the last one of an answer is not.
        self.limit = self.prompt_length + max(submit.params.max_tokens - 1, 0)
        self.order = (submit.priority, number)  # of two sequences, the one with the lower order goes first
        self.computed = 0
        self.phase = Phase.WAITING
        self.finish_reason: FinishReason | None = None
        self.preemptions = 0
        self.passed = 0  # how often another one was admitted while this one was at the head of the queue
        self.routed = 0 if submit.routing_prompt else self.prompt_length  # first token whose experts are not told yet

    @property
    def left(self) -> int:
        """Tokens that must be fed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def sampled(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def live(self) -> bool:
        """Whether it is not finished."""
        return self.phase is not Phase.FINISHED


class Request:
    """A submission and its sequences, in order of their index."""

    __slots__ = ("paused", "ready", "scored", "sequences", "started", "submit")

    def __init__(self, submit: Submit, first_number: int) -> None:
        self.submit = submit
        self.started = False  # whether a sequence of it ever ran
        self.paused = False  # its sequences wait, whatever is free, until it goes on
        self.ready = [False] * len(submit.prompts)  # prompts that were computed once: others may share them
        self.scored = [1] * len(submit.prompts)  # tokens of each prompt whose scores are known; the first has none
        count = submit.n * len(submit.prompts)
        self.sequences = [Sequence(self, index, first_number + index) for index in range(count)]

    @property
    def scope(self) -> str:
        """What separates its cached pages from others: keys and values of another adapter, or of none, are others."""
        return f"{self.submit.adapter or ''}\0{self.submit.scope}"

    @property
    def finished(self) -> bool:
        """Whether all of its sequences are."""
        return not any(sequence.live for sequence in self.sequences)

    def leader(self, prompt: int) -> Sequence | None:
        """The unfinished sequence that computes a prompt for all of its sequences."""
        n = self.submit.n
        return next((one for one in self.sequences[prompt * n : (prompt + 1) * n] if one.live), None)

    def shareable(self, sequence: Sequence) -> int:
        """How many tokens of a sequence may come from pages of others: not those that are still to be told about."""
        most = len(sequence.tokens) - 1  # the last one is computed in any case, for what follows it
        submit = self.submit
        if submit.routing:
            most = min(most, sequence.routed)
        if (
            submit.params.prompt_logprobs is not None
            and (scored := self.scored[sequence.prompt]) < sequence.prompt_length
        ):
            most = min(most, scored - 1)
        return most
