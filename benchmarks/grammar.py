"""Time to compile grammars, to try them in a child process, and to write one mask, with 32,768 tokens.

Run: python benchmarks/grammar.py
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import numpy as np

from mixtral.grammar import Grammar, Guard, Source, calls_constraint, text_constraint
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint

__all__ = ["main", "mask_times_us"]

STEPS = 400
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["new", "paid", "late"]}, "maxItems": 5},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WIDE = {"type": "object", "properties": {f"property {n}": {"type": "string", "maxLength": n + 1} for n in range(300)}}
LARGE = {"enum": [f"value {n} of many" for n in range(2000)]}


def mask_times_us(grammar: Grammar, text: str) -> list[float]:
    """Microseconds of each of STEPS masks along random answers."""
    random = np.random.default_rng(0)
    words = np.zeros(grammar.tokenizer.vocab_size // 32, dtype=np.uint32)
    times: list[float] = []
    while len(times) < STEPS:
        matcher = grammar.matcher(Constraint(text=text))
        for _ in range(100):
            start = time.perf_counter()
            matcher.mask(words)
            times.append((time.perf_counter() - start) * 1e6)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            matcher.advance(int(random.choice(allowed)))
            if matcher.finished:
                break
    return times[:STEPS]


def _schema(schema: dict[str, Any]) -> Source | None:
    return text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def main() -> None:
    """Print one line per grammar."""
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": PERSON}} for n in range(8)]
    sources = {
        "json_object": text_constraint({"type": "json_object"}),
        "schema, 4 members": _schema(PERSON),
        "schema, 300 members": _schema(WIDE),
        "enum of 2000": _schema(LARGE),
        "calls of 8 functions": calls_constraint(tools),
        "regex": text_constraint({"type": "regex", "regex": r"\d{4}-\d{2}-\d{2}( [a-z]+){1,20}"}),
    }
    tokenizer = Tokenizer("v3")
    start = time.perf_counter()
    grammar = Grammar(tokenizer)
    print(f"Python {platform.python_version()}, {platform.machine()}; vocabulary built in {_ms(start):.0f} ms")
    guard = Guard(tokenizer, workers=1)
    start = time.perf_counter()
    guard.start()
    print(f"process for trials started in {_ms(start):.0f} ms")
    for name, source in sources.items():
        if source is None:
            continue
        start = time.perf_counter()
        guard.check(source)
        trial = _ms(start)
        start = time.perf_counter()
        grammar.matcher(Constraint(text=source.text))
        compiled = _ms(start)
        start = time.perf_counter()
        grammar.matcher(Constraint(text=source.text))
        copied = _ms(start)
        times = sorted(mask_times_us(grammar, source.text))
        print(
            f"{name:22} trial {trial:6.1f} ms, compile {compiled:5.1f} ms, again {copied:5.2f} ms, "
            f"mask median {statistics.median(times):5.0f} us, 99 % {times[int(STEPS * 0.99)]:6.0f} us"
        )
    guard.close()


def _ms(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
