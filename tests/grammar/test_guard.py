"""The guard against grammars that crash, hang or eat memory: each planted on purpose, and each survived."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mixtral.errors import BusyError, GrammarError
from mixtral.grammar import Guard, Limits, Source, calls_constraint, text_constraint
from mixtral.grammar.source import json_grammar, lark_grammar
from mixtral.tokenizer import Tokenizer

GOOD = Source(lark_grammar('start: "yes" | "no"'), "grammar", "here")


def planted(schema: dict[str, Any]) -> Source:
    """A schema that would not have been accepted: the limits of the guard are tried without those of the schema."""
    return Source(json_grammar(schema, space=" "), "schema", "here")


# The library builds a state for each remainder: this takes seconds and some 260 MiB.
SLOW = planted({"type": "integer", "multipleOf": 1_000_003})
# It follows references by recursion: this overflows the stack.
CRASH = planted(
    {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(2000)}
        | {"d2000": {}},
    }
)


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """This process has more open files than select() can take."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(2048, before[1])), before[1]))
    held: list[int] = []
    try:
        held += [os.dup(0) for _ in range(1100)]
        yield
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_with_many_open_files_tries_grammars() -> None:
    with many_files(), contextlib.closing(Guard(Tokenizer("v3"), workers=1)) as own:
        own.check(GOOD)


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    guard = Guard(Tokenizer("v3"), workers=1, limits=Limits(seconds=1.5))
    yield guard
    guard.close()


@pytest.fixture(scope="module")
def patient() -> Iterator[Guard]:
    """One that waits for the library's own verdict on a machine that is busy."""
    guard = Guard(Tokenizer("v3"), workers=1, limits=Limits(seconds=30))
    yield guard
    guard.close()


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def refusal(guard: Guard, source: Source) -> GrammarError:
    with pytest.raises(GrammarError) as error:
        guard.check(source)
    return error.value


def test_good_ones_pass_and_are_remembered(guard: Guard) -> None:
    sources = [GOOD, calls_constraint([{"type": "function", "function": {"name": "f"}}])]
    sources += [
        text
        for given in ({"type": "json_object"}, {"type": "regex", "regex": "a+"})
        if (text := text_constraint(given))
    ]
    for source in sources:
        guard.check(source)
    before = guard.cache_bytes
    for source in sources:
        guard.check(source)
    assert guard.cache_bytes == before > 0


@pytest.mark.parametrize(
    ("given", "code", "part"),
    [
        ({"type": "regex", "regex": r"(a)\1"}, "regex_invalid", "backreferences are not supported"),
        ({"type": "regex", "regex": "a(?=b)"}, "regex_invalid", "look-around"),
        ({"type": "regex", "regex": "(fuel limit"}, "regex_invalid", "unclosed group"),
        ({"type": "regex", "regex": r"[^\s\S]"}, "regex_invalid", "no text"),
        (
            {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: too_large"}},
            "grammar_invalid",
            "unknown name",
        ),
        (
            {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: start"}},
            "grammar_invalid",
            "no text",
        ),
        ({"type": "grammar", "grammar": {"syntax": "lark", "definition": "begin: /a/"}}, "grammar_invalid", "start"),
    ],
)
def test_wrong_ones_are_refused_with_their_code(guard: Guard, given: dict[str, Any], code: str, part: str) -> None:
    source = text_constraint(given)
    assert source is not None
    for _ in range(2):  # the second time from memory
        error = refusal(guard, source)
        assert (error.code, error.param) == (code, source.param)
        assert part in str(error)
        assert "llguidance" not in str(error)


def a_schema(schema: Any) -> Source:
    source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert source is not None
    return source


@pytest.mark.parametrize(
    ("schema", "code", "part"),
    [
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "schema_unsupported", "oneOf"),
        (
            {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2},
            "schema_unsupported",
            "maxProperties",
        ),
        ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, "schema_unsupported", "disjoint"),
        (
            {"type": "object", "properties": {f"property {n}": {} for n in range(1900)}},
            "grammar_too_complex",
            "max is 2000",
        ),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "schema_invalid", "minimum (5)"),
        ({"type": "string", "enum": [3]}, "schema_invalid", "incompatible types"),
        ({"$ref": "#"}, "schema_invalid", "no text"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "schema_invalid", ""),
    ],
)
def test_schemas_that_only_compiling_refuses(patient: Guard, schema: Any, code: str, part: str) -> None:
    error = refusal(patient, a_schema(schema))
    assert (error.code, error.param) == (code, "response_format.json_schema.schema")
    assert part in str(error)


def doubling(levels: int) -> dict[str, Any]:
    defs: dict[str, Any] = {
        f"d{n}": {
            "anyOf": [{"$ref": f"#/$defs/d{n + 1}", "minLength": n}, {"$ref": f"#/$defs/d{n + 1}", "maxLength": 99 + n}]
        }
        for n in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{levels}": {"type": "string"}}}


def chain(length: int, key: str) -> dict[str, Any]:
    defs: dict[str, Any] = {f"d{n}": {key: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "object"}}}


BOMBS: dict[str, Any] = {
    "nested quantifiers": {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100}){1,100}$"},
    "repeat products": {"type": "string", "pattern": "^(.{1,999}x){1,999}(.{1,999}y){1,999}$"},
    "wide alternation": {"type": "string", "pattern": "|".join(f"(a{n}.*b{n}.*)" for n in range(3000))},
    "huge enum": {"enum": [f"{n}{'x' * (n % 9)}" for n in range(4096)]},
    "deep": {"properties": {"a": {"items": {"properties": {"a": {"items": {"properties": {"a": True}}}}}}}},
    "cycle": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}},
    },
    "cycle with siblings": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"properties": {"x": {"$ref": "#/$defs/a", "minProperties": 1}}}},
    },
    "doubling anyOf": doubling(30),
    "doubling allOf": chain(100, "allOf"),
    "doubling oneOf": chain(100, "oneOf"),
    "long chain": chain(120, "anyOf"),
    "all patterns at once": {
        "allOf": [{"type": "string", "pattern": f"[ab]*{c}[ab]{{{n},20}}"} for n, c in enumerate("abcabcabc")]
    },
    "many optional properties": {"properties": {f"property {n}": {"maxLength": n} for n in range(1900)}},
    "counted": {"type": "array", "minItems": 2**30, "maxItems": 2**31 - 1, "items": {"minLength": 2**30}},
    "large remainders": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967, 9949, 9941)]},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_within_the_limits(guard: Guard, name: str) -> None:
    """Whether each is refused or not, its trial ends, and the next one is as good as ever."""
    try:
        guard.check(a_schema(BOMBS[name]))
    except GrammarError as error:
        assert error.code in {"grammar_too_complex", "schema_unsupported", "schema_invalid"}  # noqa: PT017
    guard.check(GOOD)


@pytest.mark.parametrize(("source", "part"), [(SLOW, "longer than 0.5 s"), (CRASH, "crashed")], ids=["hang", "crash"])
def test_hanging_and_crashing_are_survived(source: Source, part: str) -> None:
    guard = Guard(Tokenizer("v3"), workers=1, limits=Limits(seconds=0.5))
    try:
        for _ in range(2):
            error = refusal(guard, source)
            assert error.code == "grammar_too_complex"
            assert part in str(error)
            assert len(children()) >= 1  # the process that forks lives on
            guard.check(GOOD)
        assert not [each for each in children() if each.status() == psutil.STATUS_ZOMBIE]
    finally:
        guard.close()


def test_eating_memory_is_survived() -> None:
    limits = Limits(seconds=30, memory_bytes=220 * 1024 * 1024)
    guard = Guard(Tokenizer("v3"), workers=1, limits=limits)
    try:
        error = refusal(guard, SLOW)
        assert error.code == "grammar_too_complex"
        assert "memory" in str(error)
        guard.check(GOOD)
    finally:
        guard.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_process_is_replaced(how: signal.Signals) -> None:
    guard = Guard(Tokenizer("v3"), workers=1, limits=Limits(seconds=1.5, cache_bytes=0))
    try:
        guard.check(GOOD)
        before = guard.pids()
        os.kill(before[0], how)
        guard.check(Source(lark_grammar('start: "x" // ' + "x" * 200_000), "grammar", "more than a pipe holds"))
        guard.check(GOOD)
        assert guard.pids() != before
    finally:
        guard.close()
    assert guard.pids() == []


def test_valid_and_invalid_ones_do_not_disturb_each_other(guard: Guard) -> None:
    rng = random.Random(5)
    cases = [
        (GOOD, None),
        (a_schema({"type": "integer"}), None),
        (a_schema({"$ref": "#"}), "schema_invalid"),
        (CRASH, "grammar_too_complex"),
        (Source(lark_grammar("start: x"), "grammar", "here"), "grammar_invalid"),
    ]
    fresh = Guard(Tokenizer("v3"), workers=1, limits=Limits(cache_bytes=0))
    try:
        for _ in range(25):
            source, code = rng.choice(cases)
            for each in (guard, fresh):
                if code is None:
                    each.check(source)
                else:
                    assert refusal(each, source).code == code
    finally:
        fresh.close()


def test_threads_share_the_workers() -> None:
    guard = Guard(Tokenizer("v3"), workers=2)
    guard.start()
    assert len(guard.pids()) == 2
    done: list[int] = []

    def check(number: int) -> None:
        guard.check(Source(lark_grammar(f'start: "{number}"'), "grammar", "here"), wait_s=60)
        done.append(number)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(12)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(done) == list(range(12))
        assert len(guard.pids()) == 2
    finally:
        guard.close()


def test_waiting_for_a_worker_ends() -> None:
    guard = Guard(Tokenizer("v3"), workers=1, limits=Limits(seconds=1.5))
    try:
        guard.check(GOOD)
        busy = threading.Thread(target=lambda: refusal(guard, SLOW))
        busy.start()
        time.sleep(0.2)
        with pytest.raises(BusyError):
            guard.check(Source(lark_grammar('start: "other"'), "grammar", "here"), wait_s=0.05)
        guard.check(GOOD, wait_s=0.05)  # known: no process is needed
        busy.join()
    finally:
        guard.close()


def test_memory_of_what_was_found_is_bounded() -> None:
    guard = Guard(Tokenizer("v3"), workers=1, limits=Limits(cache_bytes=1000))
    try:
        for number in range(12):
            guard.check(Source(lark_grammar(f'start: "{number}"'), "grammar", "here"))
            assert guard.cache_bytes <= 1000
    finally:
        guard.close()


def test_no_process_outlives_the_server() -> None:
    code = (
        "import os, sys\nfrom mixtral.grammar import *\nfrom mixtral.tokenizer import Tokenizer\n"
        "from mixtral.grammar.source import lark_grammar\nguard = Guard(Tokenizer('v3'), workers=1)\n"
        "guard.check(Source(lark_grammar('start: \"a\"'), 'grammar', 'x'))\n"
        "print(*guard.pids(), flush=True)\nos.kill(os.getpid(), 9)"
    )
    source = Path(sys.modules["mixtral"].__file__ or "").parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False, timeout=60
    )
    worker = int(run.stdout)
    end = time.monotonic() + 10
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_child_cannot_write_files(guard: Guard) -> None:
    """Its limits are those that were asked for."""
    guard.check(GOOD)
    status = Path(f"/proc/{guard.pids()[0]}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    environment = Path(f"/proc/{guard.pids()[0]}/environ").read_bytes()
    assert b"PATH=" not in environment
