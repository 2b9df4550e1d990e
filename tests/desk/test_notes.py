"""Notes: the answer is in the notes, once; held-out values are new; stories tell the facts of the town."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections import Counter
from dataclasses import asdict
from importlib import resources

import pytest

from mixtral.desk import notes as module
from mixtral.desk.notes import SUITES, notes, story
from mixtral.desk.source import SPLITS, Document, split_of
from mixtral.desk.world import LANGUAGES, facts_of, items
from mixtral.tokenizer import Tokenizer, encode_chat

COUNT = 400
PHRASES = tomllib.loads(resources.files("mixtral.desk").joinpath("phrases/notes.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written() -> dict[str, list[Document]]:
    return {split: [notes(0, split, number) for number in range(COUNT)] for split in SPLITS}


def digest(documents: list[Document]) -> str:
    text = "\n".join(json.dumps(asdict(document), sort_keys=True) for document in documents)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def questions_of(document: Document) -> list[str]:
    """What is asked in every turn of notes."""
    return [message["content"].rpartition("\n\n")[2] for message in document.messages[::2]]


@pytest.mark.parametrize(
    ("split", "golden"),
    [("train", "ecfae36e296cedae"), ("validation", "55b27febcf6fe533"), ("test", "2b97586e119e9e42")],
)
def test_first_200_documents_never_change(written: dict[str, list[Document]], split: str, golden: str) -> None:
    assert digest(written[split][:200]) == golden


def test_first_200_stories_never_change() -> None:
    assert digest([story(0, "train", number) for number in range(200)]) == "5d41bc5e92833fd6"


def test_the_answer_is_copied_from_the_notes(written: dict[str, list[Document]]) -> None:
    for document in (*written["train"], *written["validation"], *written["test"]):
        said = [message["content"] for message in document.messages]
        assert [message["role"] for message in document.messages] == ["user", "assistant"] * (len(said) // 2)
        assert said[-1] == ", ".join(document.answer["contains"])
        assert all(part in said[0] for part in document.answer["contains"])
        if document.suite != "notes/copy":  # lists are one value
            assert all(value in said[0] for reply in said[1::2] for value in reply.split(", "))
        assert not any("{" in text for text in said)


def test_long_notes_of_training_are_asked_about_more_often_and_held_out_ones_once(
    written: dict[str, list[Document]],
) -> None:
    assert {len(document.messages) for split in ("validation", "test") for document in written[split]} == {2}
    turns: dict[str, set[int]] = {}
    for document in written["train"]:
        turns.setdefault(document.suite, set()).add(len(document.messages) // 2)
        questions = questions_of(document)
        assert len(set(questions)) == len(questions), document
    assert turns["notes/copy"] == {1}
    assert turns["notes/short"] == {1, 2}
    assert turns["notes/512"] == {1, 2, 3}
    assert turns["notes/2048"] >= set(range(1, 11))


@pytest.fixture(scope="module")
def asked() -> dict[str, list[re.Pattern[str]]]:
    """By language, what matches a question about a guest: the group is the name."""
    return {
        language: [
            re.compile(re.escape(question).replace(r"\{name\}", r"(\w+ \w+)"))
            for _, *rest in table["facts"]
            for question in rest[::2]
            if "{name}" in question
        ]
        for language, table in PHRASES.items()
    }


def test_a_name_or_locker_that_is_asked_about_is_in_one_note(
    written: dict[str, list[Document]], asked: dict[str, list[re.Pattern[str]]]
) -> None:
    checked = 0
    for document in (*written["train"], *written["test"]):
        if document.suite == "notes/copy":
            continue
        body = document.messages[0]["content"].rpartition("\n\n")[0]
        question = " ".join(questions_of(document))
        for name in (found[1] for pattern in asked[document.language] for found in pattern.finditer(question)):
            assert len(re.findall(rf"(?<!\w){name}(?!\w)", body)) == 1, (name, document)
            checked += 1
        for locker in re.findall(r"(?:locker|Schließfach|casier|taquilla|armadietto) (\d+)", question):
            pattern = rf"(?:Locker|Schließfach|Casier|Taquilla|Armadietto) {locker} ?:"
            assert len(re.findall(pattern, body)) == 1, (locker, document)
            checked += 1
    assert checked > COUNT


def test_what_is_asked_about_in_held_out_notes_is_held_out_and_not_invented(
    written: dict[str, list[Document]], asked: dict[str, list[re.Pattern[str]]]
) -> None:
    for split in ("validation", "test"):
        inventories = ("time", "city", "phone", "restaurant", "price", "room", "first_name", "last_name")
        owned = {item for inventory in inventories for item in items(inventory, split)}
        names = 0
        for document in written[split]:
            question = document.messages[0]["content"].rpartition("\n\n")[2]
            for name in (found[1] for pattern in asked[document.language] for found in pattern.finditer(question)):
                first, last = name.split()
                assert first in items("first_name", split)
                assert last in items("last_name", split)
                names += 1
            for part in document.answer["contains"]:
                for value in part.split(", "):  # a list to copy is one part
                    is_code = re.fullmatch(r"\d{4}", value)
                    assert split_of("notes-code", value) == split if is_code else value in owned
        assert names > COUNT / 2


def test_an_entry_after_another_one_is_the_next(written: dict[str, list[Document]]) -> None:
    asked = 0
    for document in written["train"]:
        if document.suite != "notes/copy":
            continue
        question, reply = (message["content"] for message in document.messages)
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
    bounds = {
        "notes/short": (100, 580),
        "notes/512": (600, 1080),
        "notes/1024": (1300, 2080),
        "notes/2048": (3200, 4200),
        "notes/4096": (6300, 8250),
        "notes/copy": (0, 300),
    }
    for split in SPLITS:
        for document in written[split]:
            low, high = bounds[document.suite]
            assert low <= len(document.messages[0]["content"]) <= high, document.suite
    assert {document.suite for document in written["test"]} == set(SUITES)
    assert {document.suite for document in written["train"]} == set(SUITES) - {"notes/4096"}


@pytest.mark.parametrize(("suite", "low", "high"), [("notes/2048", 1450, 2150), ("notes/4096", 2700, 4200)])
def test_long_suites_have_about_as_many_tokens_as_they_say(
    written: dict[str, list[Document]], suite: str, low: int, high: int
) -> None:
    tokenizer = Tokenizer.from_version("v3")
    found = [document for split in SPLITS for document in written[split] if document.suite == suite][:60]
    assert len(found) == 60
    assert all(
        low <= len(encode_chat(tokenizer, document.messages[:2], for_training=True).ids) <= high for document in found
    )


def test_notes_of_training_have_every_length_but_the_longest() -> None:
    counts = Counter(notes(2, "train", number).suite for number in range(3000))
    shares = {"notes/copy": 20, "notes/short": 32, "notes/512": 19.2, "notes/1024": 15.2, "notes/2048": 13.6}
    assert set(counts) == set(shares)
    for suite, percent in shares.items():
        assert abs(counts[suite] / 30 - percent) < 2, suite


def test_people_of_half_of_the_training_documents_share_first_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def share() -> float:
        """Of the English documents: those in which two people have one first name."""
        shared = []
        for number in range(1500):
            document = notes(2, "train", number)
            if document.language == "en" and document.suite == "notes/512":
                people = set(re.findall(r"(?:Phone|Bill|arrival) of (\w+) (\w+)", document.messages[0]["content"]))
                shared.append(Counter(first for first, _ in people).most_common(1)[0][1] > 1)
        return sum(shared) / len(shared)

    with_crowds = share()
    monkeypatch.setattr(module, "_crowd", lambda source, split: None)
    assert with_crowds > 0.2
    assert share() < 0.1


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
