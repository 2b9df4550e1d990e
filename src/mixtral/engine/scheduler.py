"""What the next step computes: continuous batching as a state machine without tensors, threads or clock.

Every step feeds one token of each running sequence that is writing its answer, then pieces of prompts, oldest first,
up to a number of tokens (a lower one beside answers, if wanted); new sequences join as long as there is room. The
older of two sequences never waits for pages of the younger: the youngest is preempted, gives its pages back, and is
computed anew later. After three preemptions a sequence is pinned: it comes back only when all pages that it can ever
need are reserved for it.

Nothing waits for ever: the oldest running sequence always gets its pages, and the head of the queue is passed over at
most eight times by younger ones that fit where it does not.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

from mixtral.engine.config import EngineConfig
from mixtral.engine.pages import PAGE_SIZE, PageAllocator, pages_for
from mixtral.engine.request import Phase, Request, Sequence
from mixtral.errors import CapacityError
from mixtral.wire import FinishReason

__all__ = ["MOST_PASSED", "MOST_PREEMPTIONS", "Piece", "Plan", "Scheduler"]

MOST_PREEMPTIONS = 3
MOST_PASSED = 8


@dataclass(slots=True)
class Piece:
    """Tokens ``start .. start + count`` of a sequence, and ``drafts``, which may be the tokens after them."""

    sequence: Sequence
    start: int
    count: int
    drafts: list[int] = field(default_factory=list)

    @property
    def samples(self) -> bool:
        """Whether it ends where the next token is sampled."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(slots=True)
class Plan:
    """The pieces of a step, and the requests that leave the queue with it, with the tokens found for each prompt."""

    pieces: list[Piece] = field(default_factory=list)
    started: list[tuple[Request, tuple[int, ...]]] = field(default_factory=list)


class Scheduler:
    """Queues of sequences over one allocator. Whoever runs the plan reports what was computed and sampled."""

    def __init__(self, config: EngineConfig, pages: PageAllocator) -> None:
        self.config = config
        self.pages = pages
        self.waiting: list[Sequence] = []  # and preempted ones; both lists are in order
        self.running: list[Sequence] = []
        self.preemptions = 0

    def check(self, tokens: int) -> None:
        """Raise CapacityError for a sequence that could never run: one that stores more ``tokens`` than all pages."""
        if pages_for(tokens) > self.pages.total:
            raise CapacityError(
                f"a prompt and its answer store {tokens} tokens; the cache of this engine has room for "
                f"{self.pages.total * PAGE_SIZE}. Shorten the prompt, lower max_tokens, or give the cache more memory",
                param="prompt",
                code="request_exceeds_cache",
            )

    def add(self, request: Request) -> None:
        """Queue all sequences of a request, which must have passed ``check``."""
        for sequence in request.sequences:
            bisect.insort(self.waiting, sequence, key=_order)

    def pause(self, request: Request, *, on: bool) -> None:
        """Take the pages of a request away until it goes on. It is not counted as a preemption, so pins nothing."""
        request.paused = on
        for sequence in request.sequences:
            if on and sequence.phase is Phase.RUNNING:
                self._set_aside(sequence)

    def plan(self) -> Plan:
        """Choose what the next step computes, and take the pages for it. Empty only if there is nothing to work on."""
        plan = Plan()
        before = self.preemptions
        room = self.config.max_num_batched_tokens
        for sequence in tuple(self.running):
            if sequence.left == 1 and self._grow(sequence):
                plan.pieces.append(Piece(sequence, sequence.computed, 1))
                room -= 1
        most = self.config.max_tokens_beside_answers
        if plan.pieces and most is not None:
            room = min(room, max(most - len(plan.pieces), most // 2))
        for sequence in self.running:
            if sequence.left > 1 and room:
                plan.pieces.append(self._piece(sequence, room))
                room -= plan.pieces[-1].count
        if self.preemptions == before:
            self._admit(plan, room)
        return plan

    def draft(self, piece: Piece, tokens: list[int]) -> None:
        """Add drafts to a piece that samples, as far as pages are there for them without taking anybody else's."""
        sequence = piece.sequence
        table = self.pages.pages(sequence.number)
        spare = max(0, self.pages.available - self._reserved()) + self._own_reserve(sequence)
        most = min((len(table) + spare) * PAGE_SIZE, sequence.limit) - len(sequence.tokens)
        piece.drafts = tokens[: max(0, most)]
        self.pages.grow(sequence.number, len(sequence.tokens) + len(piece.drafts))

    def computed(self, piece: Piece, accepted: Iterable[int] = ()) -> None:
        """Note that a piece was stored, and the ``accepted`` of its drafts, which thereby become tokens."""
        sequence = piece.sequence
        sequence.tokens.extend(accepted)
        sequence.computed = len(sequence.tokens) if piece.drafts else piece.start + piece.count
        if piece.drafts:
            self.pages.trim(sequence.number, sequence.computed)
        if sequence.computed // PAGE_SIZE > piece.start // PAGE_SIZE:
            self.pages.publish(sequence.number, sequence.tokens, sequence.computed)
        if sequence.computed >= sequence.prompt_length:
            sequence.request.ready[sequence.prompt] = True

    def finish(self, sequence: Sequence, reason: FinishReason | None, *, damaged: bool = False) -> None:
        """End a sequence in whatever state and free its pages; one that is finished is left alone."""
        if not sequence.live:
            return
        (self.running if sequence.phase is Phase.RUNNING else self.waiting).remove(sequence)
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason
        self.pages.release(sequence.number, damaged=damaged)

    def _piece(self, sequence: Sequence, room: int) -> Piece:
        return Piece(sequence, sequence.computed, min(sequence.left, room))

    def _grow(self, sequence: Sequence) -> bool:
        """Get the page for the next token, from idle ones or from the youngest; False if it is itself preempted."""
        if sequence.phase is not Phase.RUNNING:
            return False
        missing = pages_for(len(sequence.tokens)) - len(self.pages.pages(sequence.number))
        if missing <= 0:
            return True
        while self.pages.available - self._reserved() + self._own_reserve(sequence) < missing:
            victim = next(one for one in reversed(self.running) if one is sequence or not _pinned(one))
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pages.grow(sequence.number, len(sequence.tokens))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.preemptions += 1
        self.preemptions += 1
        self._set_aside(sequence)

    def _set_aside(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.number)
        sequence.phase = Phase.PREEMPTED
        sequence.computed = 0
        bisect.insort(self.waiting, sequence, key=_order)

    def _reserved(self) -> int:
        """Available pages that pinned sequences will need."""
        return sum(self._own_reserve(one) for one in self.running)

    def _own_reserve(self, sequence: Sequence) -> int:
        return pages_for(sequence.limit) - len(self.pages.pages(sequence.number)) if _pinned(sequence) else 0

    def _admit(self, plan: Plan, room: int) -> None:
        head: Sequence | None = None
        refused = 0
        for sequence in tuple(self.waiting):
            if not room or len(self.running) >= self.config.max_num_seqs or refused > MOST_PASSED:
                return
            request = sequence.request
            leader = request.leader(sequence.prompt)
            if request.paused or (leader is not sequence and not request.ready[sequence.prompt]):
                continue
            shared = self._shared(sequence, leader)
            if not self._fits(sequence, shared):
                refused += 1
                if head is None:
                    head = sequence
                if head.passed >= MOST_PASSED:
                    return
                continue
            if head is not None:
                head.passed += 1
            if not request.started:
                request.started = True
                plan.started.append((request, self._found(request)))
            self._start(sequence, shared)
            plan.pieces.append(self._piece(sequence, room))
            room -= plan.pieces[-1].count

    def _shared(self, sequence: Sequence, leader: Sequence | None) -> list[int]:
        """Pages of others that begin a sequence: published ones, or those of the sequence that computed its prompt."""
        most = sequence.request.shareable(sequence)
        found = self.pages.find(sequence.tokens, most, sequence.request.scope)
        if leader is None or leader is sequence or leader.phase is not Phase.RUNNING:
            return found
        stored = min(most, sequence.prompt_length, leader.computed)
        forked = self.pages.fork(leader.number, stored)
        return forked if len(forked) > len(found) else found

    def _fits(self, sequence: Sequence, shared: list[int]) -> bool:
        tokens = sequence.limit if _pinned(sequence) else len(sequence.tokens)
        spare = self.pages.available - self._reserved() - self.pages.needed(shared, tokens)
        # Each that runs may soon need a page more. One alone always fits.
        return spare >= (0 if _pinned(sequence) or not self.running else len(self.running))

    def _start(self, sequence: Sequence, shared: list[int]) -> None:
        self.pages.open(sequence.number, shared, len(sequence.tokens), sequence.request.scope)
        sequence.computed = len(shared) * PAGE_SIZE
        sequence.phase = Phase.RUNNING
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_order)

    def _found(self, request: Request) -> tuple[int, ...]:
        """For each prompt, how many of its tokens are published at present."""
        submit = request.submit
        leaders = request.sequences[:: submit.n]
        pages = [self.pages.find(one.tokens, request.shareable(one), request.scope) for one in leaders]
        return tuple(len(found) * PAGE_SIZE for found in pages)

    def check_integrity(self) -> None:
        """Raise if queues, phases and pages contradict each other. For tests and for idle moments."""
        self.pages.check_integrity()
        for queue, phases in ((self.running, {Phase.RUNNING}), (self.waiting, {Phase.WAITING, Phase.PREEMPTED})):
            if [one.number for one in queue] != [one.number for one in sorted(queue, key=_order)]:
                raise RuntimeError("a queue is out of order")
            for sequence in queue:
                owned = len(self.pages.pages(sequence.number))
                if sequence.phase not in phases:
                    raise RuntimeError(f"sequence {sequence.number} is {sequence.phase} in the wrong queue")
                if sequence.phase is not Phase.RUNNING and (owned or sequence.computed):
                    raise RuntimeError(f"sequence {sequence.number} waits and has {owned} pages")
                if not pages_for(sequence.computed) <= owned <= pages_for(len(sequence.tokens)):
                    raise RuntimeError(
                        f"sequence {sequence.number} has {owned} pages for {len(sequence.tokens)} tokens"
                    )
        if len(self.running) > self.config.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} sequences run; at most {self.config.max_num_seqs} may")
        if self.pages.available < self._reserved():
            raise RuntimeError("pages that are reserved for pinned sequences are gone")


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _pinned(sequence: Sequence) -> bool:
    return sequence.preemptions >= MOST_PREEMPTIONS
