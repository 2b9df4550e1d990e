"""Sums: the working is right, stories say what it does, and held-out sums and sentences are never trained."""

from __future__ import annotations

import ast
import hashlib
import json
import operator
import re
import tomllib
from dataclasses import asdict
from importlib import resources

import pytest

from mixtral.desk.source import SPLITS, Document, split_of
from mixtral.desk.sums import SUITES, sums

COUNT = 400
SIGNS = {"plus": "+", "minus": "-", "times": "×", "over": "÷"}
STORIES = tomllib.loads(resources.files("mixtral.desk").joinpath("phrases/sums.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written() -> dict[str, list[Document]]:
    return {split: [sums(0, split, number) for number in range(COUNT)] for split in SPLITS}


def value(text: str) -> int:
    """An expression of integers, evaluated without the code under test; every division must come out even."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return int(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = walk(node.left), walk(node.right)
        if isinstance(node.op, ast.Div):
            assert left % right == 0
            return left // right
        return {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[type(node.op)](left, right)

    return walk(ast.parse(text.strip().replace("×", "*").replace("÷", "/"), mode="eval").body)


def steps_of(document: Document) -> list[tuple[int, str, int, int]]:
    lines = document.messages[-1]["content"].splitlines()[:-1]
    found = []
    for line in lines:
        left, operation, right = line.split(" = ")[0].split(" ")
        found.append((int(left), operation, int(right), int(line.split(" = ")[-1])))
    return found


def key(step: tuple[int, str, int, int]) -> tuple[int, str, int]:
    left, operation, right, _ = step
    return (right, operation, left) if operation in "+×" and left > right else (left, operation, right)


def one_digit(step: tuple[int, str, int, int]) -> bool:
    left, operation, right, result = step
    return max(right, result if operation == "÷" else left) < 10


@pytest.mark.parametrize(
    ("split", "golden"),
    [("train", "b5290dc6080e0c62"), ("validation", "f24a36723f05ee0e"), ("test", "260585c9de36a462")],
)
def test_first_200_documents_never_change(written: dict[str, list[Document]], split: str, golden: str) -> None:
    text = "\n".join(json.dumps(asdict(document), sort_keys=True) for document in written[split][:200])
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == golden


def test_another_seed_gives_other_documents(written: dict[str, list[Document]]) -> None:
    same = sum(sums(1, "train", number) == written["train"][number] for number in range(100))
    assert same < 5


def test_every_equation_holds_and_leads_to_the_answer(written: dict[str, list[Document]]) -> None:
    for document in (*written["train"], *written["validation"], *written["test"]):
        lines = document.messages[-1]["content"].splitlines()
        results = []
        for line in lines[:-1]:
            values = [value(part) for part in line.split(" = ")]
            assert len(values) >= 2
            assert len(set(values)) == 1, line
            results.append(values[0])
        steps = steps_of(document)
        assert [step[0] for step in steps[1:]] == results[:-1]
        assert lines[-1] == f"#### {results[-1]}"
        assert document.answer == {"number": results[-1]}
        assert all(0 <= number < 1000 for number in results)
        assert all(step[0] <= 99 and step[2] <= 9 for step in steps if step[1] == "×")


def test_plus_and_minus_take_one_digit_after_the_other(written: dict[str, list[Document]]) -> None:
    """``132 - 47 = 92 - 7 = 85``: what is left of the second number has fewer digits in every part."""
    parts_seen = set()
    for document in (*written["train"], *written["validation"], *written["test"]):
        for line in document.messages[-1]["content"].splitlines()[:-1]:
            *parts, _ = line.split(" = ")
            _, operation, right = parts[0].split(" ")
            if operation not in "+-":
                continue
            digits = [int(digit) * 10**place for place, digit in enumerate(reversed(right)) if digit != "0"]
            rest = [sum(digits[:count]) for count in range(len(digits), 0, -1)]
            assert [part.split(" ")[1:] for part in parts] == [[operation, str(number)] for number in rest], line
            parts_seen.add((operation, len(parts)))
    assert parts_seen == {(operation, count) for operation in "+-" for count in (1, 2, 3)}


def test_a_plain_sum_has_the_value_of_its_answer(written: dict[str, list[Document]]) -> None:
    plain = 0
    for document in written["train"]:
        question = document.messages[0]["content"]
        expression = re.search(r"[(\d][\d ()+*/×÷-]*[)\d]", question)
        if expression and re.search(r"[+*/×÷]| - ", question):
            assert value(expression.group()) == document.answer["number"], question
            plain += 1
    assert COUNT // 6 < plain < COUNT // 3


def test_a_story_says_the_numbers_and_operations_of_its_working(written: dict[str, list[Document]]) -> None:
    patterns = {
        language: [
            (re.compile(re.escape(sentence).replace(r"\{b\}", r"(\d+)")), sign)
            for slot, sign in SIGNS.items()
            for sentences in (table[f"any_{slot}"], *(story[slot] for story in table["story"]))
            for sentence in sentences
        ]
        for language, table in STORIES.items()
    }
    stories = 0
    for document in (*written["train"], *written["test"]):
        question = document.messages[0]["content"]
        if re.search(r"[+*/×÷]| - ", question):
            continue
        stories += 1
        steps = steps_of(document)
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        assert numbers == [steps[0][0], *(step[2] for step in steps)], question
        said = {
            found.start(1): sign
            for pattern, sign in patterns[document.language]
            for found in pattern.finditer(question)
        }
        assert [sign for _, sign in sorted(said.items())] == [step[1] for step in steps], question
    assert stories > COUNT


def test_suites_have_their_number_of_operations(written: dict[str, list[Document]]) -> None:
    allowed = {
        "sums/1-op": {1},
        "sums/2-op": {2},
        "sums/3-4-op": {3, 4},
        "sums/templates": {1, 2, 3, 4},
        "sums/5-6-op": {5, 6},
    }
    for split in SPLITS:
        for document in written[split]:
            assert len(steps_of(document)) in allowed[document.suite]
    assert {document.suite for document in written["test"]} == set(SUITES)
    assert {document.suite for document in written["train"]} == {"sums/1-op", "sums/2-op", "sums/3-4-op"}


def test_held_out_steps_are_in_their_split_alone() -> None:
    """Over more documents than the other tests: no step that makes a document held out is in another split."""
    steps = {split: [steps_of(sums(0, split, number)) for number in range(1500)] for split in SPLITS}
    trained = {key(step) for chain in steps["train"] for step in chain if not one_digit(step)}
    assert len(trained) > 1000
    # A held-out chain has a step that training lacks; a single step is such a step.
    for split in ("validation", "test"):
        for chain in steps[split]:
            assert any(key(step) not in trained for step in chain)
    single = {split: {key(chain[0]) for chain in steps[split] if len(chain) == 1} for split in SPLITS}
    assert single["validation"].isdisjoint(single["test"])
    assert single["train"].isdisjoint(single["validation"] | single["test"])


def test_held_out_sentences_are_in_their_split_alone(written: dict[str, list[Document]]) -> None:
    owners = {
        re.sub(r"\{[ab]\}", "#", sentence): split_of(
            "sums-sentence", language, place, slot, variant, held_out_percent=20
        )
        for language, table in STORIES.items()
        for place, story in enumerate(table["story"])
        for slot, sentences in story.items()
        for variant, sentence in enumerate(sentences)
    }
    assert 0.1 < sum(owner != "train" for owner in owners.values()) / len(owners) < 0.3
    anywhere = {
        sentence.replace("{b}", "#")
        for table in STORIES.values()
        for slot in SIGNS
        for sentence in table[f"any_{slot}"]
    }
    assert anywhere.isdisjoint(owners)

    def used(document: Document) -> set[str]:
        masked = re.sub(r"\d+", "#", document.messages[0]["content"])
        return {sentence for sentence in re.split(r"(?<=[.?]) ", masked) if not re.search(r"[+*/×÷]| - ", sentence)}

    trained = {sentence for document in written["train"] for sentence in used(document)}
    assert len(trained) > 200
    assert {owners[sentence] for sentence in trained - anywhere} == {"train"}
    assert len(trained & anywhere) > 100
    for split in ("validation", "test"):
        held_out = [document for document in written[split] if document.suite == "sums/templates"]
        assert len(held_out) > 40
        for document in held_out:
            assert used(document) - trained
            assert used(document).isdisjoint(anywhere)
            assert {owners[sentence] for sentence in used(document)} - {"train"} == {split}
        others = [document for document in written[split] if document.suite != "sums/templates"]
        assert {owners[sentence] for document in others for sentence in used(document)} == {"train"}


def test_every_language_has_templates_for_every_operation() -> None:
    assert set(STORIES) == {"en", "fr", "de", "es", "it"}
    for language, table in STORIES.items():
        for slot in SIGNS:
            assert sum(len(story[slot]) for story in table["story"]) >= 12, (language, slot)
            assert all(sentence.count("{b}") == 1 for story in table["story"] for sentence in story[slot])
        assert all(sentence.count("{a}") == 1 for story in table["story"] for sentence in story["open"])


def test_six_of_ten_documents_are_english(written: dict[str, list[Document]]) -> None:
    english = sum(document.language == "en" for document in written["train"])
    assert COUNT * 0.5 < english < COUNT * 0.7
