"""Prompts of a call of the Python API, and what it asks of an answer's form, as the constraint of an engine."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtral.errors import MatcherError, RequestError
from mixtral.grammar import Grammar, Guard, Matcher, Source, calls_constraint, text_constraint
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint, SamplingParams

__all__ = ["Forms", "is_single", "read_stop", "wrong_prompt"]

_CHOICES = ("auto", "none", "required", "any")


class Forms:
    """Forms for one tokenizer; also the grammars of its engine. What they need is made when the first is asked for.

    Each grammar is tried in a child process first, as the server does it; the process ends with this object, or by
    ``close``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._guard = Guard(tokenizer, workers=1)
        self._end = weakref.finalize(self, self._guard.close)

    def close(self) -> None:
        """End the child process. A later call starts it anew."""
        self._guard.close()

    def matcher(self, constraint: Constraint) -> Matcher | _WithoutCalls:
        """See ``mixtral.grammar.Grammar.matcher``: what an engine asks for."""
        if constraint.text is None and constraint.calls is None and constraint.trigger is not None:
            return _WithoutCalls(self._tokenizer.vocab_size, constraint.trigger)
        return self._grammar.matcher(constraint)

    def of_text(self, response_format: object, params: SamplingParams, stop: Sequence[str]) -> Constraint | None:
        """The constraint of a text that goes on with its prompt; None where anything may follow.

        Raises:
            RequestError: the ``response_format`` is wrong, or does not go together with another option.
            GrammarError: its schema, regex or grammar cannot be used.
        """
        source = self._text(response_format, params, stop)
        return None if source is None else Constraint(text=source.text, continues=True)

    def of_turn(
        self,
        params: SamplingParams,
        stop: Sequence[str],
        *,
        response_format: object,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: object,
        parallel: bool,
        continues: bool,
    ) -> Constraint | None:
        """The constraint of an assistant turn. Calls are valid by construction; without tools there are none.

        Raises:
            RequestError, MessagesError: an option is wrong, or does not go together with another one.
            GrammarError: a schema, regex or grammar cannot be used.
        """
        forced, name = _choice(tool_choice, tools)
        offered = bool(tools) and tool_choice != "none" and not continues
        if forced and response_format is not None:
            raise _combination("tool_choice", "a function call has no response_format; use tool_choice auto or none")
        if forced and continues:
            raise _combination("tool_choice", "a message that is continued cannot become a function call")
        text = self._text(response_format, params, stop)
        if text is not None and continues:
            message = "a message that is continued has no response_format: its beginning would not count"
            raise _combination("response_format", message)
        calls = None
        if offered:
            _check_ends("tools", params)
            calls = calls_constraint(tools, name=name, parallel=parallel)
            self._guard.check(calls)
        trigger = None if self._tokenizer.version == "v1" else self._tokenizer.control_id("[TOOL_CALLS]")
        if text is None and (trigger is None or trigger in (params.stop_ids or ())):
            return None
        return Constraint(
            text=None if text is None else text.text,
            calls=None if calls is None else calls.text,
            trigger=trigger,
            forced=forced,
            continues=continues,
        )

    @functools.cached_property
    def _grammar(self) -> Grammar:
        return Grammar(self._tokenizer)

    def _text(self, response_format: object, params: SamplingParams, stop: Sequence[str]) -> Source | None:
        source = None if response_format is None else text_constraint(response_format)
        if source is not None:
            if stop:
                raise _combination("stop", "a stop string could cut the response_format; leave one of them out")
            _check_ends("response_format", params)
            self._guard.check(source)
        return source


class _WithoutCalls:
    """The matcher of an answer that may be anything but calls: needs no grammar, which takes a while to be made."""

    finished = False  # only its end token ends it

    def __init__(self, vocab_size: int, trigger: int) -> None:
        flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
        flags[:vocab_size] = 1
        flags[trigger] = 0
        self._words = np.packbits(flags, bitorder="little").view(np.uint32)
        self._trigger = trigger

    def mask(self, out: NDArray[np.uint32]) -> None:
        out[:] = self._words

    def advance(self, id: int) -> None:
        if id == self._trigger:
            raise MatcherError(f"token {id} is not allowed here")


def read_stop(stop: Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings from an option that may be one text, several, or nothing. Raises RequestError."""
    if stop is not None and not isinstance(stop, Sequence):
        raise RequestError(f"stop is {stop!r}; expected text or a list of texts", param="stop")
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for place, text in enumerate(found):
        if not isinstance(text, str):
            raise RequestError(f"stop[{place}] is {text!r}; expected text", param=f"stop[{place}]")
    return found


def is_single(prompt: Any) -> bool:
    """Whether a prompt is one, not a list of several. Raises RequestError for what is neither."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise wrong_prompt(prompt)
    return not prompt or isinstance(prompt[0], int)


def wrong_prompt(prompt: object) -> RequestError:
    """The error for what is no prompt."""
    kind = type(prompt).__name__
    return RequestError(f"a prompt is of type {kind}; expected text, token ids, or a list of either", param="prompt")


def _choice(given: object, tools: Sequence[Mapping[str, Any]]) -> tuple[bool, str | None]:
    """Whether there must be a call, and of which function."""
    if isinstance(given, Mapping):
        function = given.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if given.get("type") != "function" or not isinstance(name, str):
            raise RequestError(
                f'tool_choice is {given!r:.200}; expected {{"type": "function", "function": {{"name": ...}}}}',
                param="tool_choice",
            )
    elif given in _CHOICES:
        name = None
    else:
        raise RequestError(
            f"tool_choice is {given!r:.64}; expected {', '.join(_CHOICES)}, or a function", param="tool_choice"
        )
    forced = name is not None or given in ("required", "any")
    if forced and not tools:
        raise _combination("tool_choice", "tool_choice asks for a function call, and there are no tools")
    return forced, name


def _check_ends(what: str, params: SamplingParams) -> None:
    """Raise for options that move the end of an answer."""
    for name, asked in (
        ("min_tokens", params.min_tokens > 0),
        ("ignore_eos", params.ignore_eos),
        ("stop_ids", params.stop_ids is not None),
    ):
        if asked:
            raise _combination(name, f"{name} cannot be kept with {what}; leave one of them out")


def _combination(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="unsupported_combination")
