"""Conversations at the desk: determinism, splits, wording, and replies that hold what they must."""

import hashlib
import json
import re
import tomllib
from importlib import resources

import pytest

from mixtral.desk import world
from mixtral.desk.source import SPLITS, split_of
from mixtral.desk.speech import FACT_KINDS, INTENTS, chat, fact_question, phrasings, replies

GOLDEN = {
    "train": "d2ad344fde46a1a6",
    "validation": "d2e6d4facba6deb3",
    "test": "05ae20496e27985e",
}
HELD_OUT = ("validation", "test")


def documents(split, count=600, seed=3):
    return [chat(seed, split, number) for number in range(count)]


def tables(language):
    text = resources.files("mixtral.desk").joinpath("phrases", f"{language}.toml").read_text(encoding="utf-8")
    return {
        name: {side: lines.split("\n")[:-1] for side, lines in sides.items()}
        for name, sides in tomllib.loads(text).items()
    }


def pattern(template):
    """A phrasing as an expression that matches every filling of it."""
    parts = re.split(r"\{\w+\}", template)
    return re.compile(".+?".join(re.escape(part) for part in parts), re.IGNORECASE)


@pytest.mark.parametrize("split", SPLITS)
def test_documents_never_change(split):
    digest = hashlib.blake2b(digest_size=8)
    for document in documents(split, 200, seed=1):
        record = [document.suite, document.language, document.messages, document.answer]
        digest.update(json.dumps(record, sort_keys=True).encode())
    assert digest.hexdigest() == GOLDEN[split]


def test_a_document_depends_on_its_seed_split_and_number():
    assert chat(1, "train", 5) == chat(1, "train", 5)
    assert len({json.dumps(chat(*key).messages) for key in ((1, "train", 5), (2, "train", 5), (1, "train", 6))}) == 3


@pytest.mark.parametrize("split", SPLITS)
def test_turns_alternate_slots_are_filled_and_required_strings_are_in_the_reply(split):
    for document in documents(split):
        turns = [message["role"] for message in document.messages if message["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(turns) // 2 <= 4
        assert document.messages[0]["role"] in {"system", "user"}
        assert not any(set("{}") & set(message["content"]) for message in document.messages)
        assert not any("  " in message["content"] for message in document.messages)
        reply = document.messages[-1]["content"].casefold()
        assert document.answer["contains"]
        assert all(part.casefold() in reply for part in document.answer["contains"])
        assert document.answer["language"] == document.language
        assert document.skill == "chat"


def test_all_languages_and_intents_occur():
    found = {(document.language, document.answer["intent"]) for document in documents("train", 6000)}
    assert found == {(language, intent) for language in world.LANGUAGES for intent in (*INTENTS, "follow")}


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_phrasings_are_complete(language):
    table = tables(language)
    assert set(table) == set(tables("en"))
    for intent, sides in table.items():
        for side, lines in sides.items():
            assert len(lines) >= (8 if side == "user" else 2)
            assert len(set(lines)) == len(lines)
            assert all(line == line.strip() and line for line in lines)
            if side == "user":
                assert sum(len(phrasings(intent, language, split)) for split in SPLITS) == len(lines)
                assert len(phrasings(intent, language, "train")) >= 3
            else:
                assert replies(intent, language) == tuple(lines)


@pytest.mark.parametrize("language", world.LANGUAGES)
@pytest.mark.parametrize("split", HELD_OUT)
def test_enough_intents_have_held_out_phrasings(language, split):
    assert sum(bool(phrasings(intent, language, split)) for intent in INTENTS) >= 8


def test_train_documents_use_train_phrasings_only():
    allowed = {
        language: [pattern(line) for intent in tables(language) if intent != "system"
                   for line in phrasings(intent, language, "train")]
        for language in world.LANGUAGES
    }  # fmt: skip
    for document in documents("train"):
        for message in document.messages:
            if message["role"] == "user":
                assert any(one.fullmatch(message["content"]) for one in allowed[document.language]), message


def test_train_documents_hold_no_held_out_value():
    slotted = [document.answer for document in documents("train", 3000) if document.answer["intent"] not in FACT_KINDS]
    text = "\n".join(part for answer in slotted if answer["intent"] != "follow" for part in answer["contains"])
    assert len(text) > 10_000
    for inventory in ("first_name", "last_name", "street", "restaurant", "code", "time"):
        for split in HELD_OUT:
            for item in world.items(inventory, split):
                assert not re.search(rf"(?<!Via )\b{re.escape(item)}\b", text), item
    for split in HELD_OUT:
        for key in world.keys("item", split):
            assert not any(
                world.word("item", key, language) in answer["contains"]
                for answer in slotted
                for language in [answer["language"]]
            )


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_documents_are_new_in_wording_or_in_values(split):
    found = {"chat/values": 0, "chat/templates": 0}
    for document in documents(split):
        found[document.suite] += 1
        last, intent, language = document.messages[-2]["content"], document.answer["intent"], document.language
        if document.suite == "chat/templates":
            assert any(pattern(line).fullmatch(last) for line in phrasings(intent, language, split))
            assert all(split_of("template", intent, language, line) == split
                       for line in phrasings(intent, language, split))  # fmt: skip
        else:
            assert intent not in FACT_KINDS
    assert min(found.values()) > 200


@pytest.mark.parametrize(
    ("language", "letters"), [("fr", "éèàêçù"), ("de", "äöüß"), ("es", "áéíóúñ¿¡"), ("it", "èàìòù")]
)
def test_accents_are_there(language, letters):
    text = "".join(m["content"] for d in documents("train", 3000) if d.language == language for m in d.messages)
    assert set(letters) <= set(text)


def test_french_does_not_miss_an_elision():
    texts = [m["content"] for d in documents("train", 2000) if d.language == "fr" for m in d.messages[-2:]]
    assert len(texts) > 500
    for text in texts:
        assert not re.search(r"\b(le|la|de|du|au|que|ma|ne) [aeiouéèê]", text), text


def test_every_fact_has_a_question_and_an_answer_in_every_language():
    questions = set()
    for key in world.FACTS:
        for language in world.LANGUAGES:
            question, required = fact_question(key, language)
            assert "{" not in question
            assert required
            questions.add((language, question))
    assert len(questions) == len(world.FACTS) * len(world.LANGUAGES)
    assert fact_question("hours/maritime_museum", "en") == ("When does the Maritime Museum open?", ["10:00", "17:00"])
    assert fact_question("closed/castle", "de")[1] == ["Montag"]
