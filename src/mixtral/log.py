"""Log lines of the serving processes: text or JSON, never more than one line each, and never in anybody's way."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Iterator
from typing import Literal, TextIO

__all__ = ["Format", "started"]

Format = Literal["text", "json"]
_WAITING = 10_000  # lines that may wait for a slow reader of the log; more are dropped
_END_S = 1.0
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


@contextlib.contextmanager
def started(format: Format, *, level: int = logging.INFO, stream: TextIO | None = None) -> Iterator[None]:
    """Write what is logged (by others: warnings and worse) to ``stream`` (default: standard error) during the block.

    Writing happens in a thread: a full disk, a closed pipe or one that nobody reads costs lines, and nothing else.
    Lines hold facts about requests, not their content. A record's ``facts`` are keys of its own in JSON.
    """
    lines: queue.Queue[logging.LogRecord | None] = queue.Queue(_WAITING)
    writer = _Writer(stream or sys.stderr)
    writer.setFormatter(_Json() if format == "json" else _Text())
    listener = _Listener(lines, writer)
    handler = _Handler(lines)
    log, root = logging.getLogger("mixtral"), logging.getLogger()
    before = log.level
    log.setLevel(level)
    root.addHandler(handler)  # what other packages have to say must hold up nobody either
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        log.setLevel(before)
        listener.stop()


class _Handler(logging.handlers.QueueHandler):
    """Puts records into the queue, if there is room."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        made = copy.copy(record)
        made.msg, made.args = record.getMessage(), None
        if record.exc_info:
            made.exc_text = logging.Formatter().formatException(record.exc_info)
            made.exc_info = None
        return made

    def handleError(self, record: logging.LogRecord) -> None:
        """The queue is full: the line is lost."""


class _Listener(logging.handlers.QueueListener):
    """Writes records in its thread; at the end it waits a moment for what is left, and no longer."""

    def stop(self) -> None:
        thread = self._thread
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self.enqueue_sentinel()
                thread.join(_END_S)
            self._thread = None


class _Writer(logging.StreamHandler[TextIO]):
    """Writes lines; one that cannot be written is lost."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nobody can be told."""


class _Text(logging.Formatter):
    """``TIME MESSAGE``; the lines of a traceback follow, each indented, so that no content can pose as a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.getMessage().translate(_CONTROL)}"
        more = (record.exc_text or "").splitlines()
        return "\n".join([line, *(f"  | {each.translate(_CONTROL)}" for each in more)])


class _Json(logging.Formatter):
    """One object per line."""

    def format(self, record: logging.LogRecord) -> str:
        data = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        facts = record.__dict__.get("facts")
        data |= facts if isinstance(facts, dict) else {"message": record.getMessage()}
        if record.exc_text:
            data["traceback"] = record.exc_text
        return json.dumps(data, default=str).translate(_CONTROL)


def _time(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
