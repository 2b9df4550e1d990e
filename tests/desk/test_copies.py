"""Copies: the answer stands in the question, word for word; keys and words are distinct."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict

import pytest

from mixtral.desk.copies import SUITES, copies
from mixtral.desk.source import SPLITS, Split, split_of
from mixtral.desk.verify import check
from mixtral.desk.world import INVENTORIES, LANGUAGES, items

GOLDEN = {"train": "9fde606cc443478a", "validation": "b9d8b4c4f1786bc6", "test": "89a70d0068fbb9bd"}


@pytest.mark.parametrize("split", SPLITS)
def test_first_200_documents_never_change(split: Split) -> None:
    text = "\n".join(json.dumps(asdict(copies(0, split, number)), sort_keys=True) for number in range(200))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == GOLDEN[split]


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_stands_in_the_question(split: Split) -> None:
    kinds, languages = set(), set()
    for number in range(300):
        document = copies(1, split, number)
        question, reply = (message["content"] for message in document.messages)
        assert check(document, reply)
        assert document.answer == {"contains": [reply]}
        languages.add(document.language)
        read = {"copies/lists": list_words, "copies/pairs": table_words, "copies/letters": spelled_words}
        kind, given, answered = read[document.suite](question, reply)
        kinds.add((document.suite, kind))
        assert given == answered
    plain_or_json = {(suite, kind) for suite in SUITES[:2] for kind in ("plain", "as_json")}
    letters = {("copies/letters", kind) for kind in ("spell", "spell_json", "join", "join_json")}
    assert kinds == plain_or_json | letters | {("copies/lists", "no_json")}
    assert languages == set(LANGUAGES)


def list_words(question: str, reply: str) -> tuple[str, list[str], list[str]]:
    """The kind of a list, and its words in the question and in the reply."""
    if question.endswith(f" {reply}"):
        words = re.split(r", |; | / |\n| ", reply)
        assert 3 <= len(words) == len(set(words)) <= 24
        return "plain", words, words
    if reply.startswith("["):
        words = json.loads(reply)
        return "as_json", re.split(r", |; | / |\n| ", question)[-len(words) :], words
    return "no_json", json.loads(question[question.index("[") :]), reply.split(", ")


def table_words(question: str, reply: str) -> tuple[str, list[str], list[str]]:
    """The kind of a table, and the values that are asked for by the table and by the reply."""
    first, second = question.split("\n\n")
    asked, table = (first, second) if first.endswith("?") else (second, first)
    entries = dict(re.split(": | = | - ", line) for line in re.split("\n|; |, ", table))
    assert 3 <= len(entries) <= 14
    assert len({*entries, *entries.values()}) == 2 * len(entries)
    if asked.endswith(": JSON?"):
        found = json.loads(reply)
        assert list(found) == asked.removesuffix(": JSON?").split(", ")
        return "as_json", [entries[key] for key in found], list(found.values())
    return "plain", [entries[key] for key in asked[:-1].split(", ")], reply.split(", ")


def spelled_words(question: str, reply: str) -> tuple[str, list[str], list[str]]:
    """The kind of a spelling, and its words in the question and in the reply, put together from their letters."""
    head = r"[:?] "  # the end of what is asked; a Spanish question begins with another sign
    if reply.startswith("["):
        spelled = re.split(head, question, maxsplit=2)[-1]
        return "join_json", spelled.replace("-", "").split(", "), json.loads(reply)
    if "[" in question:
        return "spell_json", json.loads(question[question.index("[") :]), reply.replace("-", "").split(", ")
    given = re.split(head, question)[-1]
    kind = "spell" if len(reply) > len(given) or reply == given else "join"
    letters = reply if kind == "spell" else given
    assert all(len(letter) == 1 for word in letters.split(", ") for letter in word.split("-"))
    return kind, given.replace("-", "").split(", "), reply.replace("-", "").split(", ")


def test_names_are_of_their_split() -> None:
    """A held-out list of known names has held-out ones alone."""
    for split in ("validation", "test"):
        for number in range(300):
            for word in re.split(r"[^\w]+", copies(1, split, number).messages[1]["content"]):
                for inventory in ("first_name", "last_name", "city"):
                    assert word not in INVENTORIES[inventory] or split_of("value", inventory, word) == split


def test_training_words_are_no_held_out_values() -> None:
    splits: tuple[Split, ...] = ("validation", "test")
    held_out = {item for name in ("first_name", "last_name", "city") for split in splits for item in items(name, split)}
    words = {
        word for number in range(2000) for word in re.split(r"\W+", copies(1, "train", number).messages[0]["content"])
    }
    assert words.isdisjoint(held_out)
