"""The grammar of function calls against the reader of calls and against the encoding of the chat format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from random_schemas import random_tools
from sampling import accepts, answer, validate

from mixtral.errors import GrammarError, MessagesError
from mixtral.grammar import Grammar, calls_constraint
from mixtral.tokenizer import parse_calls
from mixtral.wire import Constraint

TRIGGER = 5
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
"required": ["city"]}  # fmt: skip


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("weather", WEATHER), tool("now")]
ONE = '[{"name": "weather", "arguments": {"city": "Köln", "days": 2}}]'
TWO = '[{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "now", "arguments": {}}]'


def test_calls_as_they_are_trained(v3: Grammar) -> None:
    source = calls_constraint(TOOLS)
    assert (source.kind, source.param) == ("schema", "tools")
    for good in (ONE, TWO, ONE.replace(" ", ""), ONE.replace(": ", ":\n  ")):
        assert accepts(v3, source.text, good), good
    for bad in (
        "[]", "{}", ONE[:-1], ONE.replace("weather", "other"), ONE.replace("2", "0"), ONE.replace('"city"', '"City"'),
        ONE.replace("}}]", '}, "id": "abcdefghi"}]'), '[{"name": "now"}]', '[{"arguments": {}, "name": "now"}]',
        '[{"name": "now", "arguments": {"a": 1}}]', '[{"name": "now", "arguments": "{}"}]',
        ONE.replace(": ", ":         "),
    ):  # fmt: skip
        assert not accepts(v3, source.text, bad), bad


def test_the_reference_encoding_of_a_call_is_allowed(v3: Grammar) -> None:
    """Token for token what mistral-common writes for a call without id, as the model was trained to write it."""
    encoder = MistralTokenizer.v3().instruct_tokenizer
    call = ToolCall(function=FunctionCall(name="weather", arguments='{"city": "Köln", "days": 2}'))
    prepared = [encoder._prepare_function_call(call)]
    ids = encoder.tokenizer.encode(json.dumps(prepared, ensure_ascii=False), bos=False, eos=False)
    matcher = v3.matcher(Constraint(calls=calls_constraint(TOOLS).text, trigger=TRIGGER, forced=True))
    for id in [TRIGGER, *ids, v3.tokenizer.eos_id]:
        matcher.advance(id)
    assert matcher.finished
    assert parse_calls(v3.tokenizer, [TRIGGER, *ids])[1][0].arguments == '{"city": "Köln", "days": 2}'


def test_one_call_or_several(v3: Grammar) -> None:
    assert not accepts(v3, calls_constraint(TOOLS, parallel=False).text, TWO)
    assert accepts(v3, calls_constraint(TOOLS, parallel=False).text, ONE)
    named = calls_constraint(TOOLS, name="weather").text
    assert accepts(v3, named, ONE)
    assert not accepts(v3, named, TWO)
    assert not accepts(v3, named, '[{"name": "now", "arguments": {}}]')
    assert not accepts(v3, named, ONE[:-1] + ", " + ONE[1:])


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({}, {}, {"a": 1}),
        ({"type": "object"}, {"a": 1}, None),
        ({"properties": {"a": {"type": "null"}}}, {"a": None}, {"a": 1}),
        ({"type": ["object", "null"]}, {}, None),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"required": ["a"]}}}, {"a": 1}, {}),
        ({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
        {"next": {"next": {}}}, {"a": 1}),
        ({"properties": {"next": {"$ref": "#"}}, "additionalProperties": False}, {"next": {"next": 3}}, {"a": 1}),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"b": 1}, {"c": 1}),
    ],
)  # fmt: skip
def test_arguments_are_an_object_of_the_schema(v3: Grammar, parameters: Any, good: Any, bad: Any) -> None:
    source = calls_constraint([tool("f", parameters), tool("g", parameters)])
    written = '[{"name": "g", "arguments": %s}]'
    assert accepts(v3, source.text, written % json.dumps(good))
    for wrong in (bad, None, [], "x", 3):
        assert wrong == good or not accepts(v3, source.text, written % json.dumps(wrong))


def test_definitions_of_functions_do_not_meet(v3: Grammar) -> None:
    tools = [
        tool(name, {"type": "object", "properties": {"v": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"type": kind}}})
        for name, kind in (("f", "null"), ("g", "boolean"))
    ]
    source = calls_constraint(tools).text
    assert accepts(v3, source, '[{"name": "f", "arguments": {"v": null}}, {"name": "g", "arguments": {"v": true}}]')
    assert not accepts(v3, source, '[{"name": "f", "arguments": {"v": true}}]')


def test_an_unsupported_keyword_names_function_and_keyword() -> None:
    for name in (None, "now"):
        with pytest.raises(GrammarError, match=r"function f: .*'uniqueItems'") as error:
            calls_constraint([*TOOLS, tool("f", {"properties": {"a": {"uniqueItems": True}}})], name=name)
        assert error.value.code == "schema_unsupported"
        assert error.value.param == "tools[2].function.parameters.properties.a.uniqueItems"


def test_wrong_definitions() -> None:
    with pytest.raises(GrammarError, match="arguments are an object") as error:
        calls_constraint([tool("f", {"type": "string"})])
    assert (error.value.code, error.value.param) == ("schema_invalid", "tools[0].function.parameters.type")
    big = {"type": "object", "description": "x" * 40_000}
    many, heavy = [tool(f"f{n}") for n in range(129)], [tool(f"f{n}", big) for n in range(7)]
    for tools, name in (([], None), ([tool("f")] * 2, None), (many, None), (heavy, None), (TOOLS, "other")):
        with pytest.raises(MessagesError) as wrong:
            calls_constraint(tools, name=name)
        assert wrong.value.param is not None


def check_random_calls(grammar: Grammar, seeds: range) -> int:
    """Draw calls for each seed, read and validate them; how many there were."""
    count = 0
    for seed in seeds:
        tools = random_tools(seed)
        name = tools[0]["function"]["name"] if seed % 5 == 0 else None
        try:
            source = calls_constraint(tools, name=name, parallel=seed % 3 > 0)
            ids = answer(grammar, Constraint(calls=source.text, trigger=TRIGGER, forced=True), seed)
        except GrammarError as error:
            assert "min/maxProperties" in str(error)  # noqa: PT017
            continue
        if ids is None:
            continue
        content, calls = parse_calls(grammar.tokenizer, ids[:-1])
        assert content == ""
        assert calls
        assert len(calls) == 1 or (seed % 3 and seed % 5)
        schemas = {each["function"]["name"]: each["function"].get("parameters") for each in tools}
        for call in calls:
            assert name in (None, call.name)
            validate(schemas[call.name] or {"maxProperties": 0}, call.arguments)
        count += len(calls)
    return count


def test_random_calls_are_read_and_valid(v3: Grammar) -> None:
    assert check_random_calls(v3, range(40)) > 30


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_random_calls_are_read_and_valid(v3: Grammar) -> None:
    assert check_random_calls(v3, range(1000, 11_000)) > 10_000
