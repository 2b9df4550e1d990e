"""Arithmetic at the desk: word problems and plain sums with worked steps, one equation per line, then ``#### answer``.

A story is a chain: a first number, then one sentence per operation that acts on the quantity so far. Two things belong
to splits before any text exists: sentences (20 % held out) and steps such as ``34 + 57`` (15 % held out; steps with
one-digit operands only are in every split). Training uses training sentences and training steps alone; a held-out
document has at least one step of its own split, in ``sums/templates`` also a sentence of its own split, and never
anything of the other held-out split.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from mixtral.desk.source import Document, Source, Split, split_of

__all__ = ["SUITES", "sums"]

SUITES: tuple[str, ...] = ("sums/1-op", "sums/2-op", "sums/3-4-op", "sums/templates", "sums/5-6-op")
_LANGUAGES = ("en",) * 6 + ("fr", "de", "es", "it")
_SENTENCE = {"+": "plus", "-": "minus", "×": "times", "÷": "over"}
_ANY_PERCENT = 40
"""How many sentences of training fit all stories: more ways to say a thing than the stories have of their own."""
_Step = tuple[int, str, int, int]  # left, operation, right, result


def sums(seed: int, split: Split, number: int) -> Document:
    """One arithmetic document; ``answer`` is ``{"number": n}``. Depends on the three arguments only."""
    source = Source("sums", seed, split, number)
    language = source.pick(_LANGUAGES)
    suite, count = _task(source, split)
    plain = suite != "sums/templates" and source.chance(25)
    for _ in range(100):
        steps = _chain(source, split, count)
        if plain:
            question = _plain(source, language, steps)
            break
        # A language may lack a held-out sentence for these operations: then other operations are drawn.
        if question := _story(source, split, language, steps, held_out=suite == "sums/templates"):
            break
    else:
        raise RuntimeError(f"no story of {count} steps in {language} for the split {split} in 100 draws")
    result = steps[-1][3]
    reply = "\n".join([*(_worked(step) for step in steps), f"#### {result}"])
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": reply})
    return Document("sums", suite, language, messages=messages, answer={"number": result})


def _task(source: Source, split: Split) -> tuple[str, int]:
    """The suite and the number of operations."""
    suite = "" if split == "train" else source.pick(SUITES)
    if suite == "sums/5-6-op":
        return suite, source.between(5, 6)
    if suite == "sums/templates":
        return suite, source.between(1, 4)
    if suite == "":
        count = source.pick((1,) * 8 + (2,) * 6 + (3,) * 4 + (4,) * 2)
    elif suite == "sums/3-4-op":
        count = source.between(3, 4)
    else:
        count = 1 if suite == "sums/1-op" else 2
    return ("sums/3-4-op" if count > 2 else f"sums/{count}-op"), count


def _step_split(step: _Step) -> Split:
    """The split that owns one step. Both orders of a commutative step, and steps of one digit, are treated alike."""
    left, operation, right, result = step
    if max(right, result if operation == "÷" else left) < 10:
        return "train"
    if operation in "+×" and left > right:
        left, right = right, left
    return split_of("sums-step", left, operation, right)


def _chain(source: Source, split: Split, count: int) -> list[_Step]:
    """``count`` steps, each starting from the result of the one before, owned by ``split`` as the module says."""
    for _ in range(5000):
        steps: list[_Step] = []
        while len(steps) < count:
            step = _step(source, steps[-1][3] if steps else None)
            if step is None:
                break
            steps.append(step)
        if len(steps) == count:
            owners = {_step_split(step) for step in steps}
            if owners <= {"train", split} and split in owners:
                return steps
    raise RuntimeError(f"no chain of {count} steps for the split {split} in 5000 draws")


def _step(source: Source, value: int | None) -> _Step | None:
    """One step from ``value`` (None: the first step, free to choose), or None where the operation does not fit."""
    operation = source.pick("++--×÷") if value is not None else source.pick("+-×÷")
    wide = source.chance(12)
    if operation == "+":
        left = source.between(2, 400 if wide else 99) if value is None else value
        right = source.between(100, 400) if wide and value is not None else source.between(2, 99)
        return (left, "+", right, left + right) if left + right < 1000 else None
    if operation == "-":
        left = (
            source.between(100, 500) if wide and value is None else source.between(10, 99) if value is None else value
        )
        if left < 4:
            return None
        right = source.between(2, min(left - 1, 400 if wide else 99))
        return left, "-", right, left - right
    if operation == "×":
        left = source.between(2, 99) if value is None else value
        right = source.between(2, 9)
        return (left, "×", right, left * right) if 2 <= left <= 99 else None
    if value is None:
        right = source.between(2, 9)
        result = source.between(2, 99 if wide else 30)
        return right * result, "÷", right, result
    fitting = [divisor for divisor in range(2, 10) if value % divisor == 0 and 2 <= value // divisor <= 99]
    if not fitting:
        return None
    right = source.pick(fitting)
    return value, "÷", right, value // right


def _worked(step: _Step) -> str:
    """The equation of a step, in parts that are easy: times and divide go through tens and units, ``47 × 6 = 240 + 42
    = 282``; plus and minus take the digits of the second number one by one, ``132 - 47 = 92 - 7 = 85``."""
    left, operation, right, result = step
    if operation in "+-":
        stages = [f"{left} {operation} {right}"]
        for unit in (100, 10):
            if right >= unit and right % unit:
                left = left + right // unit * unit if operation == "+" else left - right // unit * unit
                right %= unit
                stages.append(f"{left} {operation} {right}")
        return " = ".join([*stages, str(result)])
    whole = left if operation == "×" else result
    middle = ""
    if operation in "×÷" and whole > 10 and whole % 10:
        tens, units = whole - whole % 10, whole % 10
        middle = f"{tens * right} + {units * right} = " if operation == "×" else f"{tens} + {units} = "
    return f"{left} {operation} {right} = {middle}{result}"


def _plain(source: Source, language: str, steps: list[_Step]) -> str:
    """The chain as one expression, with brackets only where they are needed."""
    keyboard = source.chance(30)
    text = str(steps[0][0])
    previous = "×"
    for _, operation, right, _ in steps:
        if operation in "×÷" and previous in "+-":
            text = f"({text})"
        sign = {"×": "*", "÷": "/"}.get(operation, operation) if keyboard else operation
        text, previous = f"{text} {sign} {right}", operation
    return str(source.pick(_phrases()[language]["plain"])).replace("{x}", text)


def _story(source: Source, split: Split, language: str, steps: list[_Step], *, held_out: bool) -> str:
    """The chain as sentences, with ``held_out`` at least one of them owned by ``split``; empty if there is none."""
    stories: list[dict[str, list[str]]] = _phrases()[language]["story"]
    slots = ["open", *(_SENTENCE[step[1]] for step in steps), "ask"]
    for _ in range(200):
        place = source.below(len(stories))
        owners: list[Split] = []
        sentences = []
        for slot in slots:
            if split == "train" and slot in _SENTENCE.values() and source.chance(_ANY_PERCENT):
                sentences.append(source.pick(_phrases()[language][f"any_{slot}"]))
                continue
            variant = source.below(len(stories[place][slot]))
            owners.append(split_of("sums-sentence", language, place, slot, variant, held_out_percent=20))
            sentences.append(stories[place][slot][variant])
        wanted = {"train", split} if held_out else {"train"}
        if set(owners) <= wanted and (not held_out or split in owners):
            numbers = [steps[0][0], *(step[2] for step in steps), 0]
            filled = (
                sentence.replace("{a}", str(value)).replace("{b}", str(value))
                for sentence, value in zip(sentences, numbers, strict=True)
            )
            return " ".join(filled)
    return ""


@cache
def _phrases() -> dict[str, Any]:
    text = resources.files("mixtral.desk").joinpath("phrases/sums.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
