"""Function calls: determinism, splits, valid calls with values from the user's words, well-formed conversations."""

import hashlib
import json
import re

import pytest

import mixtral.desk.calls
from mixtral.desk import world
from mixtral.desk.calls import calls
from mixtral.desk.functions import FUNCTIONS, HELD_OUT, definition, functions_of
from mixtral.desk.source import SPLITS, split_of

GOLDEN = {"train": "c2ea7b1a38c96f47", "validation": "682d1c250bf179c5", "test": "161084af542af918"}
HELD_OUT_SPLITS = ("validation", "test")
TYPES = {"string": str, "integer": int, "boolean": bool}
SMALL_NUMBERS = {
    "en": "two three four five six seven eight nine",
    "fr": "deux trois quatre cinq six sept huit neuf",
    "de": "zwei drei vier fünf sechs sieben acht neun",
    "es": "dos tres cuatro cinco seis siete ocho nueve",
    "it": "due tre quattro cinque sei sette otto nove",
}
# No two functions have the same description.
ORIGINAL = {definition(function)["function"]["description"]: name for name, function in FUNCTIONS.items()}


@pytest.fixture
def no_renaming(monkeypatch):
    """Training documents as they are before their functions are renamed: with the same values, under known names."""
    monkeypatch.setattr(mixtral.desk.calls, "RENAMED_PERCENT", 0)
    monkeypatch.setattr(mixtral.desk.calls, "UNHEARD_PERCENT", 0)
    monkeypatch.setattr(mixtral.desk.calls, "MADE_UP_PERCENT", 0)


def documents(split, count=600, seed=3):
    return [calls(seed, split, number) for number in range(count)]


def made_calls(document):
    """(name, arguments as JSON text) of every call in the conversation."""
    return [
        (call["function"]["name"], call["function"]["arguments"])
        for message in document.messages
        for call in message.get("tool_calls", ())
    ]


def belongs(inventory, value, split):
    """Whether a split may use a value: held-out ones only what the town has, training also what is invented for it."""
    return str(value) in world.items(inventory, split) or split == split_of("value", inventory, value) == "train"


def problems(arguments, parameters):
    """What is wrong with the arguments under a function's schema."""
    properties = parameters["properties"]
    found = [f"missing {name}" for name in parameters["required"] if name not in arguments]
    for name, value in arguments.items():
        if name not in properties:
            found.append(f"unknown {name}")
        elif type(value) is not TYPES[properties[name]["type"]]:
            found.append(f"{name} is {value!r}")
        elif value not in properties[name].get("enum", [value]):
            found.append(f"{name} is {value!r}, not in the enum")
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_200_documents_are_frozen(split):
    text = json.dumps([[d.messages, d.tools, d.answer, d.suite] for d in documents(split, 200)], ensure_ascii=False)
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == GOLDEN[split]


def test_a_document_depends_on_all_its_keys():
    assert calls(1, "train", 5) == calls(1, "train", 5)
    assert calls(1, "train", 5) != calls(2, "train", 5)
    assert calls(1, "train", 5) != calls(1, "train", 6)
    assert calls(1, "train", 5).messages != calls(1, "test", 5).messages


def test_there_are_62_functions_and_12_are_held_out():
    assert len(FUNCTIONS) == 62
    assert len(functions_of("train")) == 50
    assert [list(HELD_OUT.values()).count(split) for split in HELD_OUT_SPLITS] == [6, 6]
    assert set(HELD_OUT) < set(FUNCTIONS)
    assert functions_of("train", unseen=True) == ()


def test_held_out_functions_consist_of_trained_parts():
    trained = [FUNCTIONS[name] for name in functions_of("train")]
    for name in HELD_OUT:
        assert FUNCTIONS[name].verb in {function.verb for function in trained}
        assert FUNCTIONS[name].thing in {function.thing for function in trained}
        assert set(FUNCTIONS[name].slots) <= {slot for function in trained for slot in function.slots} | {"at_street"}
        parameters = definition(FUNCTIONS[name])["function"]["parameters"]["properties"]
        known = {
            key
            for other in functions_of("train")
            for key in definition(FUNCTIONS[other])["function"]["parameters"]["properties"]
        }
        assert set(parameters) <= known


@pytest.mark.parametrize("split", SPLITS)
def test_functions_stay_in_their_split(split, monkeypatch):
    monkeypatch.setattr(mixtral.desk.calls, "UNHEARD_PERCENT", 0)
    monkeypatch.setattr(mixtral.desk.calls, "MADE_UP_PERCENT", 0)
    for document in documents(split):
        # A function that is renamed in training keeps its description, which tells what it is.
        originals = {tool["function"]["name"]: ORIGINAL[tool["function"]["description"]] for tool in document.tools}
        assert all(HELD_OUT.get(name, split) == split for name in (*originals, *originals.values()))
        called = {originals[name] for name, _ in made_calls(document)}
        assert (document.suite == "calls/unseen") == bool(called & set(HELD_OUT))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.usefixtures("no_renaming")
def test_values_stay_in_their_split(split):
    patterns = {"date": r"\b2026-(\d\d-\d\d)\b", "time": r"\b(\d\d:\d\d)\b", "code": r"\b([A-Z]{2}\d\d)\b"}
    checked = dict.fromkeys((*patterns, "city", "restaurant", "street", "room", "first_name", "last_name"), 0)
    for document in documents(split, 1200):
        text = " ".join(message.get("content") or "" for message in document.messages)
        for inventory, pattern in patterns.items():
            for value in re.findall(pattern, text):
                assert belongs(inventory, value, split)
                checked[inventory] += 1
        for _, arguments in made_calls(document):
            values = json.loads(arguments)
            for inventory in ("city", "restaurant", "street", "room", "code"):
                if inventory in values:
                    assert belongs(inventory, values[inventory], split)
                    checked[inventory] += 1
            for inventory, part in zip(("first_name", "last_name"), values.get("name", "").split(), strict=False):
                assert belongs(inventory, part, split)
                checked[inventory] += 1
    assert min(checked.values()) > 10, checked


def test_no_held_out_request_is_a_training_request():
    train = {document.messages[0]["content"] for document in documents("train", 3000)}
    for split in HELD_OUT_SPLITS:
        assert not [d for d in documents(split) if d.messages[0]["content"] in train]


@pytest.mark.parametrize("split", SPLITS)
def test_every_call_fits_the_schema_of_an_offered_function(split):
    for document in documents(split):
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in document.tools}
        assert len(offered) == len(document.tools)
        assert 1 <= len(offered) <= 3
        for name, text in made_calls(document):
            arguments = json.loads(text)
            assert problems(arguments, offered[name]) == []
            assert text == json.dumps(arguments, ensure_ascii=False)
            assert list(arguments) == [key for key in offered[name]["properties"] if key in arguments]


@pytest.mark.parametrize("split", SPLITS)
def test_every_value_comes_from_the_users_words(split):
    for document in documents(split):
        said = document.messages[0]["content"]
        numbers = SMALL_NUMBERS[document.language].split()
        enums = {
            (tool["function"]["name"], key)
            for tool in document.tools
            for key, value in tool["function"]["parameters"]["properties"].items()
            if "enum" in value
        }
        for name, text in made_calls(document):
            for key, value in json.loads(text).items():
                if isinstance(value, bool) or (name, key) in enums:
                    continue
                words = re.findall(r"\w+", said)
                spelled = isinstance(value, int) and 2 <= value <= 9 and numbers[value - 2] in words
                assert spelled or (str(value) in words if isinstance(value, int) else value in said), (said, key, value)


@pytest.mark.usefixtures("no_renaming")
def test_fixed_choices_are_said_in_the_users_language():
    words = {("en", True): "with breakfast", ("en", False): "without breakfast", ("de", False): "ohne Frühstück",
             ("fr", "outside"): "en terrasse", ("it", "German"): "in tedesco", ("es", "first"): "primera"}  # fmt: skip
    found = set()
    for document in documents("train", 6000):
        said = document.messages[0]["content"]
        for _, text in made_calls(document):
            for key, value in json.loads(text).items():
                if key in {"breakfast", "seat", "language", "class"} and (document.language, value) in words:
                    assert words[document.language, value] in said
                    found.add((document.language, value))
    assert found == set(words)


@pytest.mark.parametrize("split", SPLITS)
def test_conversations_are_well_formed(split):
    for document in documents(split):
        roles = [message["role"] for message in document.messages]
        if document.suite == "calls/answer":
            _, call, result, answer = document.messages
            call_id = call["tool_calls"][0]["id"]
            assert roles == ["user", "assistant", "tool", "assistant"]
            assert re.fullmatch(r"[a-zA-Z0-9]{9}", call_id)
            assert (call["weight"], result["tool_call_id"]) == (0, call_id)
            assert result["name"] == call["tool_calls"][0]["function"]["name"]
            assert isinstance(json.loads(result["content"]), dict)
            assert document.answer["contains"]
            assert all(part in answer["content"] for part in document.answer["contains"])
        else:
            assert roles == ["user", "assistant"]
            assert all("id" not in call for call in document.messages[1].get("tool_calls", ()))
            expected = [(call["name"], call["arguments"]) for call in document.answer["calls"]]
            assert expected == [(name, json.loads(text)) for name, text in made_calls(document)]
            assert bool(expected) != bool(document.messages[1].get("content"))
            assert (document.suite == "calls/none") == (not expected)


def test_names_are_allowed_and_definitions_are_plain():
    assert len(ORIGINAL) == len(FUNCTIONS)
    for name, function in FUNCTIONS.items():
        tool = definition(function)
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)
        assert list(tool) == ["type", "function"]
        assert list(tool["function"]) == ["name", "description", "parameters"]
        assert 1 <= len(tool["function"]["parameters"]["properties"]) <= 4
        assert "{" not in tool["function"]["description"]


def test_kinds_and_languages_have_their_shares():
    train = documents("train", 2000)
    suites = [document.suite for document in train]
    parallel = sum(len(document.answer.get("calls", ())) == 2 for document in train)
    assert abs(suites.count("calls/none") / 2000 - 0.20) < 0.03
    assert abs(suites.count("calls/answer") / 2000 - 0.20) < 0.03
    assert abs(suites.count("calls/values") / 2000 - 0.60) < 0.03
    assert abs(parallel / 2000 - 0.10) < 0.03
    assert abs(sum(document.language == "en" for document in train) / 2000 - 0.60) < 0.04
    assert {document.language for document in train} == set(world.LANGUAGES)
    for split in HELD_OUT_SPLITS:
        suites = [document.suite for document in documents(split, 2000)]
        shares = {"calls/none": 15, "calls/answer": 20, "calls/values": 33, "calls/unseen": 32}
        assert set(suites) == set(shares)
        assert all(abs(suites.count(suite) / 20 - percent) < 3 for suite, percent in shares.items())


def test_an_absent_function_is_refused_in_words():
    refused = [document for document in documents("test") if document.suite == "calls/none"]
    assert len(refused) > 40
    assert len({document.messages[1]["content"] for document in refused}) == 10
