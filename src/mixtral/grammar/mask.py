"""Which tokens may come next: a matcher for each answer, and the grammars compiled for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from mixtral.errors import GrammarError, MatcherError, TokenizerError
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint

__all__ = ["Grammar", "Matcher"]

Mask = NDArray[np.uint32]

_CACHE_BYTES = 64 * 1024 * 1024
_SOURCE_FACTOR, _SOURCE_BYTES = 200, 64 * 1024  # memory of a compiled grammar: measured, per byte and at least
# What compiling and one step may cost. All are given, so that another version of the library changes none of them.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": True,
    "verbose_errors": False,
}


class Grammar:
    """Compiles grammars for one vocabulary, and keeps the last ones. May be shared between threads.

    Ids that may be sampled under a grammar are those that stand for text and were trained: no control id, not <unk>,
    and no id that the tokenizer respells. Compiling costs what the limits of the library allow: give it only grammars
    that a ``Guard`` has tried.

    Raises:
        TokenizerError: with the trained ids alone, some byte could not be written.
    """

    def __init__(self, tokenizer: Tokenizer, *, cache_bytes: int = _CACHE_BYTES) -> None:
        self.tokenizer = tokenizer
        size = tokenizer.vocab_size
        usable = [id for id in range(1, size) if not tokenizer.is_control(id) and id not in tokenizer.respell]
        self.every = _bits(range(size), size)
        self.usable = _bits(usable, size)
        surfaces = [b""] * size
        for id in usable:
            surfaces[id] = tokenizer.token_bytes(id)
        self.bytes_ids = _ids_of_bytes(surfaces, usable)
        self.spaces = frozenset(id for id in usable if surfaces[id].startswith(b" ") and not tokenizer.is_byte(id))
        self.lone_space = _bits([id for id in self.spaces if surfaces[id] == b" "], size)
        self.vocabulary = _vocabulary(surfaces, tokenizer.eos_id)
        at_start = [surface[1:] if id in self.spaces else surface for id, surface in enumerate(surfaces)]
        self.vocabulary_at_start = _vocabulary(at_start, tokenizer.eos_id)
        self._cache: OrderedDict[str, _Compiled] = OrderedDict()
        self._cache_bytes, self._cache_limit = 0, cache_bytes
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint, *, stop_ids: Collection[int] | None = None) -> Matcher:
        """A matcher at the start of an answer. ``stop_ids`` end an answer; None is the end token of the vocabulary.

        Raises:
            GrammarError: a grammar is wrong, too costly, or allows no text; ``param`` is "text" or "calls".
            MatcherError: the constraint contradicts itself: ``forced`` without ``calls``, ``calls`` without trigger.
        """
        if constraint.calls is not None and constraint.trigger is None:
            raise MatcherError("the constraint has a grammar of calls and no token that opens them")
        if constraint.forced and constraint.calls is None:
            raise MatcherError("the constraint asks for calls and has no grammar of them")
        text = None if constraint.text is None or constraint.forced else self.compile(constraint.text, "text")
        calls = None if constraint.calls is None else self.compile(constraint.calls, "calls")
        return Matcher(self, constraint, text, calls, (self.tokenizer.eos_id,) if stop_ids is None else stop_ids)

    def compile(self, text: str, param: str) -> _Compiled:
        """The compiled grammar, from the cache if it is there. Raises GrammarError."""
        with self._lock:
            if text in self._cache:
                self._cache.move_to_end(text)
                return self._cache[text]
        compiled = self._compile(text, param)
        with self._lock:
            if text not in self._cache:
                self._cache[text] = compiled
                self._cache_bytes += _cost(text)
            while self._cache_bytes > self._cache_limit and len(self._cache) > 1:
                self._cache_bytes -= _cost(self._cache.popitem(last=False)[0])
        return compiled

    @property
    def cache_bytes(self) -> int:
        """Memory of the kept grammars, estimated from the length of their sources."""
        return self._cache_bytes

    def _compile(self, text: str, param: str) -> _Compiled:
        limits = llguidance.LLParserLimits(**_LIMITS)
        matchers = [
            llguidance.LLMatcher(vocabulary, text, limits=limits, log_level=0)
            for vocabulary in (self.vocabulary, self.vocabulary_at_start)
        ]
        masks = [matcher.compute_bitmask() for matcher in matchers if not matcher.is_error()]
        if errors := [matcher.get_error() for matcher in matchers if matcher.is_error()]:
            raise GrammarError(errors[0], param=param)
        at_start = _words(masks[1], self.usable.size) & self.usable
        if (_words(masks[0], self.usable.size) & self.usable).any():
            at_start |= self.lone_space
        return _Compiled(matchers[0], at_start)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A matcher to copy, and the mask of a first token whose leading space does not count (end ids left out)."""

    prototype: llguidance.LLMatcher
    at_start: Mask


class Matcher:
    """The tokens that may come next in one answer, by the rules of ``Constraint``.

    Call ``mask`` before each token and ``advance`` after it, until ``finished``. End ids are allowed where the grammar
    can end, and nothing else is when it has. An answer without grammar may be anything but the trigger.
    """

    def __init__(
        self,
        grammar: Grammar,
        constraint: Constraint,
        text: _Compiled | None,
        calls: _Compiled | None,
        stop_ids: Collection[int],
    ) -> None:
        size = grammar.tokenizer.vocab_size
        ids = [*stop_ids, *([] if constraint.trigger is None else [constraint.trigger])]
        if not stop_ids or not all(0 <= id < size for id in ids) or constraint.trigger in stop_ids:
            raise MatcherError(f"end ids {sorted(stop_ids)} and trigger {constraint.trigger} do not fit {size} ids")
        self.finished = False
        self._grammar = grammar
        self._stops = frozenset(stop_ids)
        self._stop_bits = _bits(self._stops, size)
        self._other_bits = ~self._stop_bits
        self._trigger = constraint.trigger
        self._calls = calls
        self._forced = constraint.forced
        self._first = True
        self._keeps_space = constraint.continues
        self._run = None if text is None else _Run(grammar, text, keeps_space=constraint.continues)

    def mask(self, out: Mask) -> None:
        """Write the allowed ids into ``out``, uint32 [ceil(V / 32)], bit i % 32 of word i // 32 for id i.

        Raises:
            MatcherError: the library gave up, no token is left, the answer is finished, or ``out`` has another shape.
        """
        shape = self._stop_bits.shape
        if self.finished or out.dtype != np.uint32 or out.shape != shape or not out.flags.c_contiguous:
            state = "the answer is finished" if self.finished else f"{out.dtype} {list(out.shape)}"
            raise MatcherError(f"a mask is written before the end, as uint32 {list(shape)}; got: {state}")
        if self._first and self._forced:
            out[:] = 0
        elif self._run is None:
            out[:] = self._grammar.every
        else:
            self._run.mask(out)
            np.bitwise_and(out, self._other_bits, out=out)
            if self._run.can_end():
                np.bitwise_or(out, self._stop_bits, out=out)
        if self._trigger is not None:
            bit = np.uint32(1 << (self._trigger % 32))
            if self._first and self._calls is not None:
                out[self._trigger // 32] |= bit
            else:
                out[self._trigger // 32] &= ~bit
        if not out.any():
            raise MatcherError("the grammar allows no token here")

    def advance(self, id: int) -> None:
        """The answer goes on with ``id``.

        Raises:
            MatcherError: the grammar does not allow it, or the answer is finished.
        """
        if self.finished:
            raise MatcherError(f"token {id} comes after the end of the answer")
        first, self._first = self._first, False
        if first and self._calls is not None and id == self._trigger:
            self._run = _Run(self._grammar, self._calls, keeps_space=False)
            return
        if id == self._trigger or (first and self._forced):
            raise MatcherError(f"token {id} is not allowed here")
        if id in self._stops:
            if self._run is not None and not self._run.can_end():
                raise MatcherError(f"token {id} ends the answer before the grammar does")
            self.finished = True
        elif self._run is not None:
            self._run.advance(id)


class _Run:
    """One text under one grammar."""

    def __init__(self, grammar: Grammar, compiled: _Compiled, *, keeps_space: bool) -> None:
        self._grammar = grammar
        self._matcher = compiled.prototype.deep_copy()
        self._at_start = None if keeps_space else compiled.at_start

    def mask(self, out: Mask) -> None:
        if self._at_start is not None:
            out[:] = self._at_start
        elif self._matcher.is_stopped():
            out[:] = 0
        else:
            usable = self._grammar.usable
            np.bitwise_and(_words(self._matcher.compute_bitmask(), usable.size), usable, out=out)
        self._check()

    def can_end(self) -> bool:
        accepting = self._matcher.is_accepting()
        self._check()
        return accepting

    def advance(self, id: int) -> None:
        ids = [id]
        if self._at_start is not None:
            self._at_start = None
            if id in self._grammar.spaces:
                # Decoding drops this space, so the grammar does not see it.
                ids = [self._grammar.bytes_ids[byte] for byte in self._grammar.tokenizer.token_bytes(id)[1:]]
        if self._matcher.is_stopped() or (ids and not self._matcher.consume_tokens(ids)):
            self._check()
            raise MatcherError(f"token {id} is not allowed here")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MatcherError(f"the grammar failed: {self._matcher.get_error():.200}")


class _Vocabulary:
    """The tokens of a vocabulary in the form in which the library reads them."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, surfaces: list[bytes], eos_id: int) -> None:
        self.tokens = surfaces
        self.eos_token_id = eos_id

    def __call__(self, text: object) -> list[int]:
        raise TokenizerError("the grammar library asked for tokens of a text; grammars here forbid it to choose tokens")


def _vocabulary(surfaces: list[bytes], eos_id: int) -> llguidance.LLTokenizer:
    # A byte that is in no text: the end token has a name for the library, and no text can reach it.
    tokens = [b"\xffend" if id == eos_id else surface for id, surface in enumerate(surfaces)]
    return llguidance.LLTokenizer(_Vocabulary(tokens, eos_id))  # type: ignore[arg-type]


def _ids_of_bytes(surfaces: list[bytes], usable: list[int]) -> list[int]:
    """For each byte an id that stands for it alone: the byte piece where that was trained."""
    found: dict[bytes, int] = {}
    for id in usable:
        if len(surfaces[id]) == 1:
            found.setdefault(surfaces[id], id)
    missing = [byte for byte in range(256) if bytes([byte]) not in found]
    if missing:
        raise TokenizerError(f"no trained token stands for the byte {missing[0]:#04x} ({len(missing)} are missing)")
    return [found[bytes([byte])] for byte in range(256)]


def _bits(ids: Collection[int], size: int) -> Mask:
    """A mask of the given ids, uint32 [ceil(size / 32)]."""
    flags = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)


def _words(mask: bytes, count: int) -> Mask:
    """The library's mask as words; it may have more of them than the vocabulary needs."""
    return np.frombuffer(mask, dtype=np.uint32, count=count)


def _cost(text: str) -> int:
    return _SOURCE_BYTES + _SOURCE_FACTOR * len(text)
