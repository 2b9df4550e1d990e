"""Renamed functions: names are other ones and allowed, everything else stays, held-out documents keep their names."""

import copy
import json
import re

import pytest
from written import functions, training

import mixtral.desk.calls
import mixtral.desk.renamed
from mixtral.desk.calls import MADE_UP_PERCENT, RENAMED_PERCENT, UNHEARD_PERCENT, calls
from mixtral.desk.functions import FUNCTIONS, HELD_OUT
from mixtral.desk.renamed import renamed
from mixtral.desk.source import Source
from mixtral.desk.verify import check

COUNT = 1500
TYPES = {"string": str, "integer": int, "boolean": bool}
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def changed(percent):
    """Training documents of which so many percent are renamed; they do not differ in anything else."""
    return training(COUNT, made_up=MADE_UP_PERCENT, unheard=UNHEARD_PERCENT, renamed=percent)


@pytest.fixture(scope="module")
def pairs():
    """(as it was, renamed) of every training document."""
    return list(zip(changed(0), changed(100), strict=True))


def names(document):
    return [function["name"] for function in functions(document)]


def keys(function):
    return list(function["parameters"]["properties"])


def made_calls(document):
    return [call["function"] for message in document.messages for call in message.get("tool_calls", ())]


def without_names(document):
    """A document with its names left out, and arguments as a list of values."""
    messages = []
    for message in document.messages:
        kept = {key: value for key, value in message.items() if key != "name"}
        if "tool_calls" in kept:
            kept["tool_calls"] = [
                {**call, "function": list(json.loads(call["function"]["arguments"]).values())}
                for call in kept["tool_calls"]
            ]
        messages.append((kept, "name" in message))
    tools = []
    for tool in document.tools:
        function = tool["function"]
        parameters = function["parameters"]
        places = [keys(function).index(key) for key in parameters["required"]]
        schema = {**parameters, "properties": list(parameters["properties"].values()), "required": places}
        tools.append({**tool, "function": {**function, "name": "", "parameters": schema}})
    answer = dict(document.answer)
    if "calls" in answer:
        answer["calls"] = [list(call["arguments"].values()) for call in answer["calls"]]
    return [document.skill, document.suite, document.language, document.text, messages, tools, answer]


def test_40_percent_of_the_training_documents_are_renamed(pairs):
    assert RENAMED_PERCENT == 40
    written = [calls(3, "train", number) for number in range(COUNT)]
    assert all(document in pair for document, pair in zip(written, pairs, strict=True))
    differ = sum(document != before for document, (before, _) in zip(written, pairs, strict=True))
    # Now and then every name happens to stay.
    assert abs(differ / COUNT - 0.39) < 0.04


def test_held_out_documents_are_never_renamed(monkeypatch):
    def refuse(*_):
        raise AssertionError("renamed")

    monkeypatch.setattr(mixtral.desk.calls, "renamed", refuse)
    for split in ("validation", "test"):
        for number in range(COUNT):
            assert set(names(calls(3, split, number))) <= set(FUNCTIONS)
    with pytest.raises(AssertionError, match="renamed"):
        assert [calls(3, "train", number) for number in range(20)]


def test_values_words_and_the_order_of_keys_stay(pairs):
    for before, after in pairs:
        assert without_names(after) == without_names(before)


def test_most_names_change(pairs):
    functions_seen, functions_changed, keys_seen, keys_changed = 0, 0, 0, 0
    for before, after in pairs:
        for old, new in zip(functions(before), functions(after), strict=True):
            functions_seen += 1
            functions_changed += old["name"] != new["name"]
            keys_seen += len(keys(old))
            keys_changed += sum(a != b for a, b in zip(keys(old), keys(new), strict=True))
    # Three of four; of those that the desk does not have, some come out as they went in.
    assert abs(functions_changed / functions_seen - 0.72) < 0.03
    assert abs(keys_changed / keys_seen - 0.50) < 0.03


def test_names_are_allowed_and_distinct(pairs):
    for before, after in pairs:
        assert len(set(names(after))) == len(after.tools)
        for old, new in zip(functions(before), functions(after), strict=True):
            assert len(keys(new)) == len(keys(old))
            assert all(NAME.fullmatch(name) for name in (new["name"], *keys(new)))
            assert not new["name"][0].isdigit()
            # A parameter does not take the old name of another one: both would be misread.
            assert all(b == a or b not in keys(old) for a, b in zip(keys(old), keys(new), strict=True))


def test_names_are_written_in_several_styles(pairs):
    found = {name for _, after in pairs for name in names(after) if name not in FUNCTIONS}
    for style in (r"[a-z]+(_[a-z]+)+", r"[a-z]+([A-Z][a-z]+)+", r"([A-Z][a-z]+){2,}", r"[a-z]+(-[a-z]+)+"):
        assert sum(re.fullmatch(style, name) is not None for name in found) > 100, style
    assert len(found) > 1000


def test_no_function_gets_the_name_of_another_one(pairs):
    def plain(name):
        return re.sub("[_-]", "", name).lower()

    held_out = {plain(name) for name in HELD_OUT}
    for before, after in pairs:
        for old, new in zip(names(before), names(after), strict=True):
            assert new == old or new not in FUNCTIONS
            assert plain(new) not in held_out


def test_calls_and_answers_are_valid_under_the_new_definitions(pairs):
    made = 0
    for _, after in pairs:
        offered = {function["name"]: function["parameters"] for function in functions(after)}
        for call in made_calls(after):
            arguments, schema = json.loads(call["arguments"]), offered[call["name"]]
            assert call["arguments"] == json.dumps(arguments, ensure_ascii=False)
            assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
            assert list(arguments) == [key for key in schema["properties"] if key in arguments]
            for key, value in arguments.items():
                assert type(value) is TYPES[schema["properties"][key]["type"]]
                assert value in schema["properties"][key].get("enum", [value])
            made += 1
        if "calls" in after.answer:
            last = after.messages[-1]
            assert check(after, last.get("content") or "", last.get("tool_calls", ()))
    assert made > COUNT / 2


def test_a_result_names_the_function_that_was_called(pairs):
    found = set()
    for before, after in pairs:
        for call, result in zip(after.messages, after.messages[1:], strict=False):
            if result["role"] == "tool":
                assert result["name"] == call["tool_calls"][0]["function"]["name"]
                assert result["name"] in names(after)
                found.add(result["name"] in names(before))
    assert found == {True, False}


def test_a_call_of_an_old_name_is_wrong(pairs):
    """The answer itself is renamed, not only what the model is shown."""
    told = 0
    for before, after in pairs:
        if after.answer.get("calls", []) != before.answer.get("calls", []):
            assert not check(after, "", before.answer["calls"])
            told += 1
    assert told > COUNT / 4


def test_the_source_decides_alone_and_the_document_stays_as_it_was(pairs):
    document = next(before for before, _ in pairs if before.suite == "calls/answer" and len(before.tools) > 1)
    kept = copy.deepcopy(document)
    made = [renamed(document, Source("rename", number), frozenset(FUNCTIONS)) for number in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert document == kept


def test_a_name_that_is_taken_is_not_given(pairs, monkeypatch):
    document = next(before for before, _ in pairs if len(before.tools) == 3)
    monkeypatch.setattr(mixtral.desk.renamed, "_function", lambda name, source: "book_boat")
    monkeypatch.setattr(mixtral.desk.renamed, "_parameter", lambda name, source: "same")
    for number in range(20):
        assert names(renamed(document, Source(number), frozenset(FUNCTIONS))) == names(document)
        new = renamed(document, Source(number), frozenset())
        assert len(set(names(new))) == 3
        assert all(len(keys(a)) == len(keys(b)) for a, b in zip(functions(document), functions(new), strict=True))
        assert names(new).count("book_boat") <= 1
