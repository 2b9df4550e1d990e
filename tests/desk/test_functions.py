"""Functions that are made up: pairs that the desk does not have, slots that fit their verbs, and how often."""

import itertools

from written import training

from mixtral.desk.calls import MADE_UP_PERCENT, calls
from mixtral.desk.functions import FUNCTIONS, HELD_OUT, call_phrases, definition, made_up, slots
from mixtral.desk.source import Source

MADE = [made_up(Source("made", number)) for number in range(3000)]


def test_they_are_no_function_of_the_desk():
    assert not {function.name for function in MADE} & set(FUNCTIONS)
    pairs = {(FUNCTIONS[name].verb, FUNCTIONS[name].thing) for name in HELD_OUT}
    assert not {(function.verb, function.thing) for function in MADE} & pairs


def test_all_other_pairs_come():
    had = {(function.verb, function.thing) for function in FUNCTIONS.values()}
    things = ["bike", "boat", "bus", "car", "kayak", "locker", "massage", "sauna", "table", "taxi", "tent", "tour"]
    every = set(itertools.product(("book", "cancel", "change", "price", "find"), [*things, "train"])) - had
    assert {(function.verb, function.thing) for function in MADE} == every
    assert set(things) < set(call_phrases()["objects"])


def test_slots_fit_and_nothing_is_said_twice():
    for function in MADE:
        rows = [slots()[slot] for slot in function.slots]
        assert 1 <= len(rows) <= 3
        assert len({row["parameter"] for row in rows}) == len(rows)
        assert function.optional < set(function.slots)
        assert not {"date", "day"} <= set(function.slots)
        assert sum(slot in {"nights", "days", "hours"} for slot in function.slots) <= 1
        if function.verb == "change":
            assert [slot.startswith("new_") for slot in sorted(function.slots)] == [False, True]
            assert not function.optional


def test_one_name_has_many_shapes():
    """A model cannot know them by heart."""
    shapes = {}
    for function in MADE:
        shapes.setdefault(function.name, set()).add(function.slots)
    assert all(len(found) > 4 for found in shapes.values())
    assert sum(map(len, shapes.values())) > 900


def test_definitions_are_those_of_other_functions():
    for function in MADE[:300]:
        tool = definition(function)["function"]
        assert tool["name"] == function.name
        assert len(tool["parameters"]["properties"]) == len(function.slots)
        assert len(tool["parameters"]["required"]) == len(function.slots) - len(function.optional)
        assert tool["description"] == call_phrases()["verbs"][function.verb]["description"].format(function.thing)


def test_training_alone_asks_for_them_and_that_often():
    written = training(2000, made_up=MADE_UP_PERCENT, unheard=0, renamed=0)
    asked = [document for document in written if document.suite == "calls/values"]
    made = sum(document.answer["calls"][0]["name"] not in FUNCTIONS for document in asked)
    assert abs(100 * made / len(asked) - MADE_UP_PERCENT) < 4
    for document in asked:
        names = [tool["function"]["name"] for tool in document.tools]
        assert len(set(names)) == len(names)
        assert not set(names) & set(HELD_OUT)
        assert {call["name"] for call in document.answer["calls"]} <= set(names)
    for split in ("validation", "test"):
        for number in range(300):
            assert {tool["function"]["name"] for tool in calls(3, split, number).tools} <= set(FUNCTIONS)
