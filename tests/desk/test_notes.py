"""Notes: the answer is in the notes, once; held-out values are new; stories tell the facts of the town."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict

import pytest

from mixtral.desk.notes import SUITES, notes, story
from mixtral.desk.source import SPLITS, Document, split_of
from mixtral.desk.world import LANGUAGES, facts_of

COUNT = 400


@pytest.fixture(scope="module")
def written() -> dict[str, list[Document]]:
    return {split: [notes(0, split, number) for number in range(COUNT)] for split in SPLITS}


def digest(documents: list[Document]) -> str:
    text = "\n".join(json.dumps(asdict(document), sort_keys=True) for document in documents)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize(
    ("split", "golden"),
    [("train", "37d324f7188f9cc5"), ("validation", "7b2023c30e5bbad7"), ("test", "230302a9b23780a5")],
)
def test_first_200_documents_never_change(written: dict[str, list[Document]], split: str, golden: str) -> None:
    assert digest(written[split][:200]) == golden


def test_first_200_stories_never_change() -> None:
    assert digest([story(0, "train", number) for number in range(200)]) == "229f6dbd0fe1cf56"


def test_the_answer_is_copied_from_the_notes(written: dict[str, list[Document]]) -> None:
    for document in (*written["train"], *written["validation"], *written["test"]):
        question, reply = (message["content"] for message in document.messages)
        assert reply == ", ".join(document.answer["contains"])
        assert all(part in question for part in document.answer["contains"])
        assert "{" not in question


def test_a_name_or_locker_that_is_asked_about_is_in_one_note(written: dict[str, list[Document]]) -> None:
    asked = 0
    for document in (*written["train"], *written["test"]):
        if document.suite == "notes/copy":
            continue
        body, _, question = document.messages[0]["content"].rpartition("\n\n")
        for name in re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+(?=[ ?])", question):
            if name in body:
                assert len(re.findall(rf"{name}\b", body)) == 1, (name, document)
                asked += 1
        for locker in re.findall(r"(?:locker|Schließfach|casier|taquilla|armadietto) (\d+)", question):
            pattern = rf"(?:Locker|Schließfach|Casier|Taquilla|Armadietto) {locker} ?:"
            assert len(re.findall(pattern, body)) == 1, (locker, document)
            asked += 1
    assert asked > COUNT


def test_an_entry_after_another_one_is_the_next(written: dict[str, list[Document]]) -> None:
    asked = 0
    for document in written["train"]:
        question, reply = (message["content"] for message in document.messages)
        if document.suite != "notes/copy":
            continue
        listed, _, after = question.partition("\n\n")
        if not after:
            assert question.endswith(reply)
            continue
        entries = listed.split(", ")
        assert len(set(entries)) == len(entries)
        (named,) = (entry for entry in entries if re.search(rf"(?<!\w){re.escape(entry)}(?!\w)", after))
        assert reply == entries[entries.index(named) + 1]
        asked += 1
    assert asked > 20


def test_held_out_answers_are_never_trained(written: dict[str, list[Document]]) -> None:
    kinds = (r"\d\d:\d\d", r"555 \d{4}", r"\d{4}")

    def values(split: str) -> set[str]:
        found = {part for document in written[split] for part in document.answer["contains"]}
        return {part for part in found if any(re.fullmatch(kind, part) for kind in kinds)}

    assert len(values("train")) > 100
    for split in ("validation", "test"):
        assert len(values(split)) > 30
        assert values(split).isdisjoint(values("train"))
    assert values("validation").isdisjoint(values("test"))
    codes = [part for part in values("test") if re.fullmatch(r"\d{4}", part)]
    assert {split_of("notes-code", code) for code in codes} == {"test"}


def test_suites_differ_in_length(written: dict[str, list[Document]]) -> None:
    """A token has 1.9 to 2.4 characters here, so these bounds keep a suite near its number of tokens."""
    bounds = {"notes/short": (100, 580), "notes/512": (600, 1080), "notes/1024": (1300, 2080), "notes/copy": (0, 300)}
    for split in SPLITS:
        for document in written[split]:
            low, high = bounds[document.suite]
            assert low <= len(document.messages[0]["content"]) <= high, document.suite
    assert {document.suite for document in written["test"]} == set(SUITES)
    assert "notes/1024" not in {document.suite for document in written["train"]}


def test_stories_are_short_and_tell_facts() -> None:
    hours = {(fact.values["open"], fact.values["close"]) for fact in facts_of("hours")}
    languages = set()
    for number in range(200):
        document = story(0, "train", number)
        languages.add(document.language)
        assert document.skill == document.suite == "story"
        assert not document.messages
        assert 40 <= len(document.text.split()) <= 120
        assert "{" not in document.text
        assert any(start in document.text and end in document.text for start, end in hours)
    assert languages == set(LANGUAGES)
