"""``response_format`` as a grammar: each type, and each way to get it wrong."""

from __future__ import annotations

from typing import Any

import pytest
from sampling import accepts

from mixtral.errors import GrammarError, RequestError
from mixtral.grammar import Grammar, text_constraint


def grammar_of(kind: str, value: Any) -> str:
    source = text_constraint({"type": kind, kind: value})
    assert source is not None
    return source.text


def test_text_needs_no_grammar() -> None:
    assert text_constraint({"type": "text"}) is None


def test_a_json_object(v3: Grammar) -> None:
    source = text_constraint({"type": "json_object"})
    assert source is not None
    assert (source.kind, source.param) == ("schema", "response_format")
    for good in ("{}", '{"a": [1, {"b": null}], "é": "x\\n"}', '{\n  "a": {\n    "b": 1\n  }\n}', '{"a":1}'):
        assert accepts(v3, source.text, good), good
    for bad in (
        "[]",
        "1",
        '"a"',
        "{} ",
        "{",
        '{"a": 1,}',
        "{'a': 1}",
        '{"a": 01}',
        '{"a": NaN}',
        '{"a":\n\n1}',
        '{"a":         1}',
    ):
        assert not accepts(v3, source.text, bad), bad


def test_white_space_has_bounds(v3: Grammar) -> None:
    source = grammar_of("json_schema", {"name": "x", "schema": {"type": "array"}})
    for good in ("[        1]", "[\n\t1]", "[\n" + " " * 64 + "1]"):
        assert accepts(v3, source, good), good
    for bad in ("[         1]", "[\t1]", "[\r\n1]", "[\n\n1]", "[\n" + " " * 65 + "1]", "\n[1]"):
        assert not accepts(v3, source, bad), bad


def test_a_schema(v3: Grammar) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": None}})
    assert source is not None
    assert (source.kind, source.param) == ("schema", "response_format.json_schema.schema")
    assert accepts(v3, source.text, '{"a": 1}')
    assert not accepts(v3, source.text, "{}")
    assert accepts(v3, grammar_of("json_schema", {"name": "x", "schema": True}), "[1]")


CHOICES = [
    "ab",
    "a",
    " b",
    "  c",
    'q"',
    "back\\slash",
    "line\nbreak",
    "\x00\x7f",
    "é😀",
    "</s>",
    "[INST]",
    "%json {}",
    "/x/",
    "i",
]


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_are_written_as_they_are(v3: Grammar, v1: Grammar, choice: str) -> None:
    for grammar in (v3, v1):
        source = grammar_of("choice", CHOICES)
        assert accepts(grammar, source, choice)
        assert accepts(grammar, source, choice, by_bytes=True)
        assert not accepts(grammar, source, choice + "x")
        assert not accepts(grammar, grammar_of("choice", [each for each in CHOICES if each != choice]), choice)


def test_regex_and_grammar(v3: Grammar) -> None:
    assert accepts(v3, grammar_of("regex", "a{2}"), "aa")
    assert accepts(v3, grammar_of("grammar", {"syntax": "lark", "definition": 'start: "a"+'}), "aaa")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, ""), ("text", ""), ([], ""), ({}, ".type"), ({"type": "xml"}, ".type"), ({"type": 3}, ".type"),
        ({"type": []}, ".type"),
        ({"type": "text", "regex": "a"}, ""), ({"type": "json_object", "schema": {}}, ""),
        ({"type": "regex", "choice": []}, ""),
        ({"type": "json_schema"}, ".json_schema"), ({"type": "json_schema", "json_schema": []}, ".json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, ".json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, ".json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a\n", "schema": {}}}, ".json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, ".json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}}, ".json_schema.strict"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "description": 1}},
        ".json_schema.description"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "x": 1}}, ".json_schema"),
        ({"type": "grammar"}, ".grammar"),
        ({"type": "grammar", "grammar": {"syntax": "gbnf", "definition": ""}}, ".grammar.syntax"),
        ({"type": "choice"}, ".choice"), ({"type": "choice", "choice": []}, ".choice"),
        ({"type": "choice", "choice": ["a", "a"]}, ".choice"),
        ({"type": "choice", "choice": [""]}, ".choice"), ({"type": "choice", "choice": [3]}, ".choice"),
        ({"type": "choice", "choice": "ab"}, ".choice"),
        ({"type": "choice", "choice": ["\ud800"]}, ".choice"),
        ({"type": "choice", "choice": ["a" * 40_000]}, ".choice"),
        ({"type": "choice", "choice": [str(number) for number in range(1025)]}, ".choice"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_format(given: object, param: str) -> None:
    with pytest.raises(RequestError) as error:
        text_constraint(given)
    assert error.value.param == f"response_format{param}"


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ({"type": "regex", "regex": None}, "regex_invalid", ".regex"),
        ({"type": "grammar", "grammar": {"syntax": "lark"}}, "grammar_invalid", ".grammar.definition"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": False}}, "schema_invalid",
        ".json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": None}}, "schema_invalid",
        ".json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}, "schema_unsupported",
        ".json_schema.schema.not"),
    ],
)  # fmt: skip
def test_a_wrong_grammar_in_it(given: object, code: str, param: str) -> None:
    with pytest.raises(GrammarError) as error:
        text_constraint(given, "format")
    assert (error.value.code, error.value.param) == (code, f"format{param}")
