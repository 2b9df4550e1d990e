"""Log lines: one each, whatever they hold; and a log that cannot be written holds up nobody."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest

from mixtral import log

logger = logging.getLogger("mixtral.server")
HOSTILE = "a\nb\r\x1b[31m\x00\x85\u2028c\x7f"


def written(format: Any, act: Callable[[], None]) -> list[str]:
    stream = io.StringIO()
    with log.started(format, stream=stream):
        act()
    return stream.getvalue().splitlines()


def fail() -> None:
    try:
        raise ValueError(f"secret{HOSTILE}\n2026-01-01T00:00:00.000Z forged")
    except ValueError:
        logger.exception("request %s failed", HOSTILE)


def test_text_lines_hold_no_control_characters() -> None:
    (line,) = written("text", lambda: logger.info("%s", HOSTILE))
    assert line.endswith(r" a\x0ab\x0d\x1b[31m\x00\x85\x2028c\x7f")
    assert line[:4].isdigit()
    assert line[23] == "Z"


def test_a_traceback_cannot_pose_as_a_line() -> None:
    first, *more = written("text", fail)
    assert r"request a\x0ab" in first
    assert len(more) > 3
    assert all(line.startswith("  | ") for line in more)


def test_json_lines_are_objects() -> None:
    facts = {"request": "x", "status": 200, "path": HOSTILE}

    def act() -> None:
        logger.info("as text: %s", "y", extra={"facts": facts})
        logger.warning("%s", HOSTILE)
        fail()

    lines = [json.loads(line) for line in written("json", act)]
    assert len(lines) == 3
    assert {key: lines[0][key] for key in facts} == facts
    assert lines[0]["level"] == "info"
    assert lines[1]["message"] == HOSTILE
    assert "ValueError" in lines[2]["traceback"]
    assert all(line["time"].endswith("Z") and line["logger"] == "mixtral.server" for line in lines)


@pytest.mark.parametrize("format", get_args(log.Format))
def test_lines_below_the_level_are_left_out(format: Any) -> None:
    stream, before = io.StringIO(), list(logging.getLogger().handlers)
    with log.started(format, level=logging.WARNING, stream=stream):
        logger.info("no")
        logger.error("yes")
    assert "yes" in stream.getvalue()
    assert "no\n" not in stream.getvalue()
    assert logging.getLogger().handlers == before


def test_other_packages_are_heard_when_it_matters() -> None:
    other = logging.getLogger("asyncio")
    lines = written("text", lambda: (other.info("no"), other.warning("yes"))[0])
    assert [line[25:] for line in lines] == ["yes"]


def test_a_full_device_is_nobodys_problem(capsys: pytest.CaptureFixture[str]) -> None:
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - its end fails, and that is the point
    with log.started("text", stream=full):
        for _ in range(100):
            logger.info("x" * 1000)
    with contextlib.suppress(OSError):
        full.close()
    assert capsys.readouterr().err == ""


def test_a_pipe_that_nobody_reads_delays_nobody() -> None:
    read, write = os.pipe()
    stream = os.fdopen(write, "w", encoding="utf-8")
    began = time.monotonic()
    with log.started("text", stream=stream):
        for _ in range(12_000):  # more than the pipe and the queue hold
            logger.info("x" * 100)
    assert time.monotonic() - began < 20
    os.close(read)  # the thread that writes gets an error now
    with contextlib.suppress(OSError):
        stream.close()
