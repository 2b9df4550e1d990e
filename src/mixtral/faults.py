"""Named failpoints for tests: places where a process fails on purpose. Nothing fails unless a list is installed.

The list comes with the first message to an engine process, which only tests write; no option, variable or request of
``mixtral serve`` reaches it.

==================  ====================================================================================================
``step:N:ACTION``   in the N-th step of the engine, from 1: ``raise``, ``exit`` (at once, without a word) or ``hang``
``prompt:ID:...``   the same, in the first step that works on a prompt with the token ID
``logits:nan:ID``   the logits of sequences whose prompt holds the token ID are NaN
``alloc:fail:N``    the N-th allocation of a buffer fails
``page:fail:N``     the N-th request for more cache pages is refused
``matcher:error``   grammar matchers are in their error state
``ipc:KIND``        the first tokens are followed by half a frame and the end (``short``), by bytes that are no frame
                    (``garbage``), or by the end alone (``close``)
==================  ====================================================================================================
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from mixtral.errors import ConfigError

__all__ = ["FaultError", "act", "channel_fault", "fails", "install", "installed", "matchers_fail", "poisons"]

_ACTIONS = ("raise", "exit", "hang")
_CHANNEL = ("short", "garbage", "close")
_EXIT_CODE = 86

_points: list[list[str]] = []
_calls: Counter[str] = Counter()


class FaultError(Exception):
    """What a failpoint raises. No code expects it."""


def install(points: Iterable[str]) -> None:
    """Set the failpoints of this process, in place of earlier ones; counting starts anew.

    Raises:
        ConfigError: there is no such failpoint.
    """
    found = []
    for point in points:
        words = point.split(":")
        if not _is_known(words):
            raise ConfigError(f"there is no failpoint {point!r}; see mixtral/faults.py for those there are")
        found.append(words)
    _points[:] = found
    _calls.clear()


def installed() -> list[str]:
    """The failpoints of this process."""
    return [":".join(words) for words in _points]


def act(step: int, prompts: Iterable[Sequence[int]] = ()) -> None:
    """In a step: raise, end the process or hang, if a point for this step or one of these new prompts says so."""
    if not _points:
        return
    given = list(prompts)
    for kind, where, action in (words for words in _points if words[0] in ("step", "prompt")):
        number = int(where)
        if number == step if kind == "step" else any(number in prompt for prompt in given):
            _do(action, f"{kind}:{where}:{action}")


def poisons(prompt: Collection[int]) -> bool:
    """Whether the logits of a sequence with this prompt are to be NaN."""
    return any(words[0] == "logits" and int(words[2]) in prompt for words in _points)


def fails(kind: str) -> bool:
    """Count one attempt of ``kind`` ("alloc" or "page"); whether it is the one that fails."""
    if not _points:
        return False
    _calls[kind] += 1
    return [kind, "fail", str(_calls[kind])] in _points


def matchers_fail() -> bool:
    """Whether grammar matchers are to be in their error state."""
    return ["matcher", "error"] in _points


def channel_fault() -> str | None:
    """How the channel is to break after the first tokens, if it is to."""
    return next((words[1] for words in _points if words[0] == "ipc"), None)


def _is_known(words: list[str]) -> bool:
    match words:
        case ["step" | "prompt", number, action]:
            return number.isdecimal() and action in _ACTIONS
        case ["logits", "nan", number] | ["alloc" | "page", "fail", number]:
            return number.isdecimal()
        case ["ipc", kind]:
            return kind in _CHANNEL
        case _:
            return words == ["matcher", "error"]


def _do(action: str, name: str) -> None:
    if action == "raise":
        raise FaultError(name)
    if action == "exit":
        os._exit(_EXIT_CODE)
    while True:
        time.sleep(3600)
