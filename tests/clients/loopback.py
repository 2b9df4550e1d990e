"""Programs that may not leave this machine: every attempt is an error, also one that the program would swallow."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from collections.abc import Iterator
from typing import Any

_NAMES = {"127.0.0.1", "localhost", "::1", None, ""}
_tried: list[str] = []


def _outward(event: str, arguments: tuple[Any, ...]) -> str | None:
    """What a call of the socket module would reach outside, if anything."""
    if event == "socket.getaddrinfo" and arguments[0] not in _NAMES:
        return f"looked up {arguments[0]!r}"
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(arguments[1][0]).is_loopback:
                return None
        return f"sent to {arguments[1]}"
    return None


def watch() -> None:
    """From now on an attempt raises RuntimeError and is remembered; there is no way back."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith("socket.") and (what := _outward(event, arguments)) is not None:
            _tried.append(what)
            raise RuntimeError(what)

    sys.addaudithook(hook)


@contextlib.contextmanager
def only_this_machine() -> Iterator[None]:
    """The rest of the program; ends with exit code 3 if it tried to reach out."""
    yield
    sys.stdout.flush()
    if _tried:
        print("reached out:", *_tried, file=sys.stderr)
        sys.stderr.flush()
        os._exit(3)


watch()
