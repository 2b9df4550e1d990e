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
from mixtral.desk.world import INVENTORIES, LANGUAGES

GOLDEN = {"train": "1729789a8ed7ad80", "validation": "57c2025f61847862", "test": "11d9b26906400e6a"}


@pytest.mark.parametrize("split", SPLITS)
def test_first_200_documents_never_change(split: Split) -> None:
    text = "\n".join(json.dumps(asdict(copies(0, split, number)), sort_keys=True) for number in range(200))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == GOLDEN[split]


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_stands_in_the_question(split: Split) -> None:
    suites, languages = set(), set()
    for number in range(300):
        document = copies(1, split, number)
        question, reply = (message["content"] for message in document.messages)
        assert check(document, reply)
        assert document.answer == {"contains": [reply]}
        suites.add(document.suite)
        languages.add(document.language)
        if document.suite == "copies/lists":
            assert question.endswith(f" {reply}")
            words = re.split(r", |; | / |\n| ", reply)
            assert 3 <= len(words) == len(set(words)) <= 24
            continue
        first, second = question.split("\n\n")
        asked, table = (first, second) if first.endswith("?") else (second, first)
        entries = dict(re.split(": | = | - ", line) for line in re.split("\n|; |, ", table))
        assert [entries[key] for key in asked[:-1].split(", ")] == reply.split(", ")
        assert 3 <= len(entries) <= 14
        assert len({*entries, *entries.values()}) == 2 * len(entries)
    assert suites == set(SUITES)
    assert languages == set(LANGUAGES)


def test_names_are_of_their_split() -> None:
    """A held-out list of known names has held-out ones alone."""
    for split in ("validation", "test"):
        for number in range(300):
            for word in copies(1, split, number).messages[1]["content"].split(", "):
                for inventory in ("first_name", "last_name", "city"):
                    assert word not in INVENTORIES[inventory] or split_of("value", inventory, word) == split
