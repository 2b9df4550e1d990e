"""Formats of answers as grammars that are tried in child processes: what ``build`` takes as ``grammar``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral.grammar import Guard, Source, calls_constraint, text_constraint
from mixtral.server.engine import Engine

__all__ = ["Grammars"]


class Grammars:
    """A Grammar for the vocabulary of an engine, which is known once the engine is ready. ``check`` may be called from
    any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._guard: Guard | None = None

    def text_constraint(self, response_format: Mapping[str, Any]) -> Source | None:
        """See ``mixtral.grammar.text_constraint``."""
        return text_constraint(response_format)

    def calls_constraint(self, tools: Sequence[Mapping[str, Any]], *, name: str | None, parallel: bool) -> Source:
        """See ``mixtral.grammar.calls_constraint``."""
        return calls_constraint(tools, name=name, parallel=parallel)

    def check(self, source: Source) -> None:
        """See ``mixtral.grammar.Guard.check``."""
        with self._lock:
            if self._guard is None:
                self._guard = Guard(self._engine.tokenizer)
        self._guard.check(source)

    @property
    def cache_bytes(self) -> int:
        """Memory of what is known of grammars that were tried."""
        return 0 if self._guard is None else self._guard.cache_bytes

    def close(self) -> None:
        """End the child processes."""
        if self._guard is not None:
            self._guard.close()
