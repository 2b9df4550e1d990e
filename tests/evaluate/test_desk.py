"""Scores of suites: counting, interval, baselines, table."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from mixtral.desk.source import Document
from mixtral.desk.write import suite_documents
from mixtral.errors import ConfigError
from mixtral.evaluate.desk import Answer, SuiteScore, score, to_json, to_markdown, wilson


def reference(documents: Sequence[Document]) -> list[Answer]:
    last = [document.messages[-1] for document in documents]
    return [Answer(message.get("content") or "", message.get("tool_calls") or ()) for message in last]


def half(documents: Sequence[Document]) -> list[Answer]:
    return [answer if place % 2 else Answer("") for place, answer in enumerate(reference(documents))]


def test_reference_answers_are_all_correct_and_empty_ones_are_not() -> None:
    suites = ["sums/1-op", "records/values", "calls/values", "notes/short"]
    best = score(reference, suites, 20, seed=0, split="validation", sample=50)
    assert [(row.suite, row.n, row.correct) for row in best] == [(suite, 20, 20) for suite in suites]
    none = score(lambda found: [Answer("")] * len(found), suites, 20, seed=0, split="validation", sample=50)
    assert [row.correct for row in none] == [0, 0, 0, 0]
    some = score(half, suites, 20, seed=0, split="validation", sample=50)
    assert [row.correct for row in some] == [10, 10, 10, 10]
    assert (some[0].low, some[0].high) == wilson(10, 20)


def test_forms_and_languages_are_counted() -> None:
    def answerer(documents: Sequence[Document]) -> list[Answer]:
        """Half of the answers right; of the others a third of the right form."""
        right = reference(documents)
        wrong = [Answer("{}"), Answer("{"), Answer("Non lo so, mi dispiace.")]
        return [answer if place % 2 else wrong[place // 2 % 3] for place, answer in enumerate(right)]

    (records,) = score(answerer, ["records/values"], 30, seed=0, split="validation", sample=10)
    assert (records.correct, records.formed) == (15, 20)
    (calls,) = score(reference, ["calls/values"], 30, seed=0, split="validation", sample=10)
    assert (calls.correct, calls.formed) == (30, 30)
    (broken,) = score(
        lambda found: [Answer("", ({"name": "other", "arguments": "{}"},))] * len(found),
        ["calls/values"], 30, seed=0, split="validation", sample=10,
    )  # fmt: skip
    assert broken.formed == 0
    (chat,) = score(
        lambda found: [Answer("Non è nella camera degli ospiti, che peccato.")] * len(found),
        ["chat/values"], 40, seed=0, split="validation", sample=10,
    )  # fmt: skip
    assert chat.formed is None
    assert sum(n for _, _, n in chat.languages.values()) == 40
    assert {name: heard == n for name, (_, heard, n) in chat.languages.items()} == {
        name: name == "it" for name in chat.languages
    }


def test_the_answerer_gets_the_documents_of_the_suite() -> None:
    seen: list[Document] = []

    def answerer(documents: Sequence[Document]) -> list[Answer]:
        seen.extend(documents)
        return reference(documents)

    score(answerer, ["sums/2-op"], 7, seed=4, split="test", sample=10)
    assert seen == suite_documents("sums/2-op", 7, seed=4, split="test")


def test_the_nearest_training_question_is_a_baseline() -> None:
    """Scored on training documents that the baseline has seen, it is right about nearly all of them."""
    (seen,) = score(reference, ["notes/short"], 20, seed=0, split="train", sample=100)
    assert (seen.baseline_name, seen.baseline_correct) == ("nearest", 20)
    (new,) = score(reference, ["notes/short"], 20, seed=0, split="test", sample=100)
    assert new.baseline_correct <= 1


def test_the_most_frequent_reply_is_a_baseline() -> None:
    (row,) = score(reference, ["calls/none"], 20, seed=0, split="test", sample=300)
    assert (row.baseline_name, row.baseline_correct) == ("majority", 20)


def test_scores_do_not_depend_on_the_run() -> None:
    first, second = (score(half, ["chat/values"], 10, seed=1, split="test", sample=60) for _ in range(2))
    assert first == second


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ConfigError, match="1 answers to 3 documents"):
        score(lambda found: [Answer("")], ["sums/1-op"], 3, seed=0, split="test", sample=5)
    with pytest.raises(ConfigError, match="count is 0"):
        score(reference, ["sums/1-op"], 0, seed=0, split="test")
    with pytest.raises(ConfigError, match="unknown suite"):
        score(reference, ["sums"], 3, seed=0, split="test")


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_share(correct: int, n: int) -> None:
    with pytest.raises(ConfigError, match=f"{correct} correct of {n}"):
        wilson(correct, n)


def test_table_and_json() -> None:
    rows = [
        SuiteScore("sums/1-op", 200, 150, *wilson(150, 200), "majority", 3),
        SuiteScore("records/values", 200, 150, *wilson(150, 200), "nearest", 0, formed=199),
    ]
    assert to_markdown(rows).splitlines() == [
        "| suite | n | correct % | 95 % interval | form % | baseline % | baseline |",
        "|---|---:|---:|---:|---:|---:|---|",
        "| sums/1-op | 200 | 75.0 | 68.6 - 80.5 |  | 1.5 | majority |",
        "| records/values | 200 | 75.0 | 68.6 - 80.5 | 99.5 | 0.0 | nearest |",
    ]
    made = json.loads(to_json(rows, split="test", seed=7))
    assert (made["split"], made["seed"], made["decoding"]) == ("test", 7, "greedy")
    row = made["scores"][0]
    assert SuiteScore(**row) == SuiteScore("sums/1-op", 200, 150, 0.685659, 0.804918, "majority", 3)
