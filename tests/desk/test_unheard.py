"""Invented words for things: the same in the functions and in what the guest says, and everything else stays."""

import json
import re

import pytest
from written import functions, training

import mixtral.desk.calls
from mixtral.desk.calls import UNHEARD_PERCENT, calls
from mixtral.desk.functions import FUNCTIONS, call_phrases, definition
from mixtral.desk.source import Document, Source
from mixtral.desk.unheard import unheard

COUNT = 1500
THINGS = set(call_phrases()["objects"])


def changed(percent):
    """Training documents, in so many percent of which things have invented words; nothing else differs."""
    return training(COUNT, made_up=0, unheard=percent, renamed=0)


@pytest.fixture(scope="module")
def pairs():
    """(as it was, with invented words) of every training document."""
    return list(zip(changed(0), changed(100), strict=True))


def words_of(before, after):
    """The invented word of each thing, from the names of the functions: word by word, since nothing else changes."""
    words = {}
    for old, new in zip(functions(before), functions(after), strict=True):
        for a, b in zip(old["name"].split("_"), new["name"].split("_"), strict=True):
            if a != b:
                assert words.setdefault(a, b) == b
    return words


def said(document):
    return next(message["content"] for message in document.messages if message["role"] == "user")


def test_so_many_training_documents_have_invented_words():
    assert UNHEARD_PERCENT == 40
    written, before = changed(UNHEARD_PERCENT), changed(0)
    differ = sum(a != b for a, b in zip(written, before, strict=True))
    # Some have no thing at all (weather, money), or none whose turn it was.
    assert 0.25 < differ / COUNT < 0.4


def test_names_change_in_their_things_alone_and_most_things_do(pairs):
    seen = there = 0
    for before, after in pairs:
        words = words_of(before, after)
        assert words.keys() <= THINGS - {"museum", "restaurant"}
        assert len(set(words.values())) == len(words)
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words.values())
        things = {part for function in functions(before) for part in function["name"].split("_")} & THINGS
        there += len(things - {"museum", "restaurant"})
        seen += len(words)
    assert abs(seen / there - 0.75) < 0.03


def test_names_descriptions_calls_and_words_go_together(pairs):
    """Put the things back and the document is what it was: nothing else differs."""
    for before, after in pairs:
        nouns = {name: row[before.language][-1] for name, row in call_phrases()["objects"].items()}
        words = words_of(before, after)
        names = {new["name"]: old["name"] for old, new in zip(functions(before), functions(after), strict=True)}
        for old, new in zip(functions(before), functions(after), strict=True):
            assert old["parameters"] == new["parameters"]
            text = new["description"]
            for thing, word in words.items():
                text = re.sub(rf"\b{word}\b", thing, text)
            assert text == old["description"]
        calls_of = [call["name"] for call in after.answer.get("calls", ())]
        assert [names[name] for name in calls_of] == [call["name"] for call in before.answer.get("calls", ())]
        assert [c["arguments"] for c in after.answer.get("calls", ())] == [
            c["arguments"] for c in before.answer.get("calls", ())
        ]
        text = said(after)
        for thing, word in words.items():
            text = re.sub(rf"\b{word}\b", nouns[thing], text, flags=re.IGNORECASE)
        if set(words) >= asked(before, nouns):
            assert text == said(before)
        for old, new in zip(before.messages, after.messages, strict=True):
            if "tool_calls" in old:
                made = [call["function"] for call in new["tool_calls"]]
                assert [names[call["name"]] for call in made] == [c["function"]["name"] for c in old["tool_calls"]]
                assert [call["arguments"] for call in made] == [c["function"]["arguments"] for c in old["tool_calls"]]
            elif old["role"] == "tool":
                assert names[new["name"]] == old["name"]
                assert new["content"] == old["content"]
            elif old["role"] == "assistant":
                assert new == old


def asked(document, nouns):
    """The things that the guest speaks of."""
    return {thing for thing, noun in nouns.items() if re.search(rf"\b{noun}\b(?! [0-9])", said(document))}


def test_the_guest_says_the_word_of_the_function_that_is_called(pairs):
    seen = 0
    for before, after in pairs:
        if before.suite != "calls/values":
            continue
        words = words_of(before, after)
        for call in before.answer["calls"]:
            thing = FUNCTIONS[call["name"]].thing
            if thing in words:
                seen += 1
                assert re.search(rf"\b{words[thing]}\b", said(after), re.IGNORECASE), said(after)
    assert seen > 400


def test_a_room_with_a_number_stays_a_room():
    tool = definition(FUNCTIONS["order_food"])
    other = definition(FUNCTIONS["book_room"])
    document = Document(
        "calls", "calls/values", "en", tools=(tool, other), answer={"calls": []},
        messages=({"role": "user", "content": "Bring 2 x soup to room 12, and book a room for 3 nights."},),
    )  # fmt: skip
    for number in range(20):
        after = unheard(document, Source(number), {"room": "room", "museum": "museum"})
        word = functions(after)[1]["name"].removeprefix("book_")
        assert said(after) == f"Bring 2 x soup to room 12, and book a {word} for 3 nights."
        assert functions(after)[0] == tool["function"]
        assert functions(after)[1]["description"] == f"Book a {word}"


def test_german_nouns_keep_their_capitals():
    tool = definition(FUNCTIONS["book_boat"])
    document = Document(
        "calls", "calls/values", "de", tools=(tool,), answer={"calls": []},
        messages=({"role": "user", "content": "Ich möchte ein Boot für 3 Stunden buchen."},),
    )  # fmt: skip
    after = [unheard(document, Source(number), {"boat": "Boot"}) for number in range(20)]
    words = {functions(item)[0]["name"].removeprefix("book_") for item in after} - {"boat"}
    assert len(words) > 10
    for item in after:
        word = functions(item)[0]["name"].removeprefix("book_")
        if word != "boat":
            assert said(item) == f"Ich möchte ein {word.capitalize()} für 3 Stunden buchen."


def test_held_out_documents_have_the_words_of_the_desk(monkeypatch):
    monkeypatch.setattr(mixtral.desk.calls, "unheard", lambda *_: pytest.fail("invented"))
    for split in ("validation", "test"):
        for number in range(300):
            names = {function["name"] for function in functions(calls(3, split, number))}
            assert names <= set(FUNCTIONS)


def test_a_document_depends_on_its_number_alone():
    first = [calls(3, "train", number) for number in range(50)]
    again = [calls(3, "train", number) for number in reversed(range(50))][::-1]
    assert first == again
    assert all(json.loads(json.dumps(document.messages)) == list(document.messages) for document in first)
