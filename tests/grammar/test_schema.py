"""Each keyword of the drafts is enforced, is an annotation, or is refused with its name and place; limits hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from random_schemas import random_schema
from sampling import accepts, validate

from mixtral.errors import GrammarError
from mixtral.grammar import Grammar, text_constraint
from mixtral.grammar.schema import ANNOTATIONS, FORMATS, KEYWORDS, check_schema


def grammar_of(schema: Any) -> str:
    source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert source is not None
    return source.text


def refused(schema: Any) -> GrammarError:
    with pytest.raises(GrammarError) as error:
        check_schema(schema, "schema")
    return error.value


OBJECT = {"type": "object"}
# keyword -> a schema that has it, a text that it allows, and one that only this keyword forbids
EFFECTS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "type": ({"type": "integer"}, 1, "a"),
    "enum": ({"enum": ["a", 2, None, {"x": [1]}]}, {"x": [1]}, {"x": [2]}),
    "const": ({"const": [1, "é"]}, [1, "é"], [1, "e"]),
    "anyOf": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, None, 1),
    "oneOf": ({"oneOf": [{"type": "string"}, {"type": "null"}]}, "a", 1),
    "allOf": ({"allOf": [{"minimum": 3}, {"maximum": 5}]}, 4, 6),
    "$ref": ({"$ref": "#/$defs/a b~1c", "$defs": {"a b/c": {"type": "null"}}}, None, 1),
    "$defs": ({"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "null"}}}, [None], [1]),
    "definitions": ({"items": {"$ref": "#/definitions/x"}, "definitions": {"x": {"type": "null"}}}, [None], [1]),
    "items": ({"items": {"type": "null"}}, [None], [1]),
    "prefixItems": ({"prefixItems": [{"type": "null"}]}, [None, 1], [1, 1]),
    "minItems": ({"type": "array", "minItems": 2}, [1, 2], [1]),
    "maxItems": ({"type": "array", "maxItems": 1}, [1], [1, 2]),
    "properties": ({"properties": {"a": {"type": "null"}}}, {"a": None}, {"a": 1}),
    "patternProperties": ({**OBJECT, "patternProperties": {"^p": {"type": "null"}}}, {"pq": None}, {"pq": 1}),
    "additionalProperties": ({**OBJECT, "additionalProperties": {"type": "null"}}, {"b": None}, {"b": 1}),
    "required": ({**OBJECT, "required": ["a"]}, {"a": 1}, {"b": 1}),
    "minProperties": ({**OBJECT, "minProperties": 1}, {"a": 1}, {}),
    "maxProperties": ({**OBJECT, "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    "minLength": ({"type": "string", "minLength": 2}, "é\n", "é"),
    "maxLength": ({"type": "string", "maxLength": 2}, "😀\n", "abc"),
    "pattern": ({"type": "string", "pattern": "^[ab]+$"}, "ab", "ac"),
    "format": ({"type": "string", "format": "date"}, "2024-02-29", "2024-02-30"),
    "minimum": ({"type": "number", "minimum": 0.5}, 0.5, 0.25),
    "maximum": ({"type": "number", "maximum": 0.5}, 0.5, 0.75),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, 4, 3),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, 2, 3),
    "multipleOf": ({"type": "number", "multipleOf": 0.25}, 1.75, 1.7),
}


def test_the_table_of_effects_is_complete() -> None:
    assert EFFECTS.keys() == KEYWORDS.keys()


@pytest.mark.parametrize("keyword", EFFECTS)
def test_each_keyword_has_its_effect(v3: Grammar, keyword: str) -> None:
    schema, good, bad = EFFECTS[keyword]
    source = grammar_of(schema)
    assert accepts(v3, source, json.dumps(good, ensure_ascii=False))
    assert not accepts(v3, source, json.dumps(bad, ensure_ascii=False))
    validate(schema, json.dumps(good))
    if keyword not in ("$defs", "definitions"):
        without = {key: value for key, value in schema.items() if key != keyword}
        assert accepts(v3, grammar_of(without), json.dumps(bad, ensure_ascii=False))


@pytest.mark.parametrize("annotation", sorted(ANNOTATIONS))
def test_annotations_change_nothing(annotation: str) -> None:
    assert check_schema({"type": "null", annotation: {"not": [True]}}, "schema").whole() == {"type": "null"}


@pytest.mark.parametrize(
    "keyword",
    ["$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "$vocabulary", "id",
    "additionalItems",
     "unevaluatedItems", "unevaluatedProperties", "contains", "minContains", "maxContains", "uniqueItems",
     "propertyNames",
     "dependencies", "dependentSchemas", "dependentRequired", "if", "then", "else", "not", "contentEncoding",
     "contentMediaType", "contentSchema", "divisibleBy", "extends", "disallow", "nullable", "x-guidance", "x-order",
     "Type", "Minimum", ""],
)  # fmt: skip
def test_any_other_keyword_is_refused_by_name_and_place(keyword: str) -> None:
    for outer, path in [
        (lambda inner: inner, "schema"),
        (lambda inner: {"properties": {"a": inner}}, "schema.properties.a"),
        (lambda inner: {"anyOf": [True, {"items": inner}]}, "schema.anyOf[1].items"),
        (lambda inner: {"$defs": {"never used": inner}}, 'schema.$defs["never used"]'),
    ]:
        error = refused(outer({"type": "array", keyword: {}}))
        assert error.code == "schema_unsupported"
        assert repr(keyword) in str(error)
        assert error.param is not None
        assert error.param.startswith(path)


def test_an_id_is_known_at_the_root_alone() -> None:
    assert check_schema({"$id": "https://x.org/a", "type": "null"}, "schema").root == {"type": "null"}
    assert refused({"items": {"$id": "https://x.org/a"}}).code == "schema_unsupported"


WRONG: list[tuple[Any, str]] = [
    (3, "schema"), (None, "schema"), ([], "schema"), ({"items": []}, "schema.items"), ({"items": [{}]}, "schema.items"),
    ({"type": "int"}, "schema.type"), ({"type": []}, "schema.type"), ({"type": ["null", "null"]}, "schema.type"),
    ({"type": ["null", 3]}, "schema.type"), ({"type": {}}, "schema.type"), ({"enum": []}, "schema.enum"),
    ({"enum": 3}, "schema.enum"),
    ({"anyOf": []}, "schema.anyOf"), ({"allOf": {}}, "schema.allOf"), ({"oneOf": [3]}, "schema.oneOf[0]"),
    ({"properties": []}, "schema.properties"), ({"properties": {"a": 3}}, "schema.properties.a"),
    ({"required": ["a", "a"]}, "schema.required"), ({"required": "a"}, "schema.required"),
    ({"required": [3]}, "schema.required"),
    ({"minItems": -1}, "schema.minItems"), ({"minItems": 1.0}, "schema.minItems"),
    ({"maxLength": True}, "schema.maxLength"),
    ({"maxLength": 2**31}, "schema.maxLength"), ({"minimum": "3"}, "schema.minimum"),
    ({"minimum": True}, "schema.minimum"),
    ({"exclusiveMinimum": True}, "schema.exclusiveMinimum"), ({"pattern": 3}, "schema.pattern"),
    ({"format": 3}, "schema.format"),
    ({"$ref": 3}, "schema.$ref"), ({"$ref": "a"}, "schema.$ref"), ({"$ref": "https://x.org/s"}, "schema.$ref"),
    ({"$ref": "file:///etc/passwd"}, "schema.$ref"), ({"$ref": "#a"}, "schema.$ref"),
    ({"$ref": "#/$defs/x"}, "schema.$ref"),
    ({"$ref": "#/examples/0", "examples": [{}]}, "schema.$ref"),
    ({"$ref": "#/properties", "properties": {}}, "schema.$ref"),
    ({"const": float("nan")}, "schema.const"), ({"minimum": float("inf")}, "schema.minimum"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "param"), WRONG, ids=[json.dumps(schema) for schema, _ in WRONG])
def test_a_wrong_value_is_refused_with_its_place(schema: Any, param: str) -> None:
    error = refused(schema)
    assert (error.code, error.param) == ("schema_invalid", param)


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"format": "foo"}, "schema.format"), ({"format": "unknown"}, "schema.format"),
        ({"format": "regex"}, "schema.format"),
        ({"const": 2**53 + 1}, "schema.const"), ({"enum": [1, [-(2**53) - 1]]}, "schema.enum"),
        ({"minimum": 1e300}, "schema.minimum"),
        ({"maximum": 1e-10}, "schema.maximum"), ({"multipleOf": 0}, "schema.multipleOf"),
        ({"multipleOf": -2}, "schema.multipleOf"),
        ({"multipleOf": 10007}, "schema.multipleOf"), ({"multipleOf": 0.00123456}, "schema.multipleOf"),
        ({"const": "a\x00"}, "schema.const"), ({"enum": [{"\x7f": 1}]}, "schema.enum"),
        ({"required": ["\x01"]}, "schema.required[0]"),
        ({"properties": {"\x1f": {}}}, 'schema.properties["\\u001f"]'), ({"minProperties": 2}, "schema.minProperties"),
        ({"minProperties": 3, "required": ["a", "b"]}, "schema.minProperties"),
        ({"patternProperties": {"^(?=a)": {}}}, 'schema.patternProperties["^(?=a)"]'),
    ],
)  # fmt: skip
def test_what_would_be_kept_only_nearly_is_refused(schema: Any, param: str) -> None:
    error = refused(schema)
    assert (error.code, error.param) == ("schema_unsupported", param)


def nested(levels: int, key: str = "items") -> Any:
    schema: Any = {}
    for _ in range(levels):
        schema = {key: schema if key == "items" else [schema]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(33), nested(100_000), nested(100_000, "anyOf"), {"default": nested(100_000, "x")},
        {"const": nested(100, "x")},
        {"properties": {f"p{number}": {} for number in range(2049)}}, {"enum": list(range(4097))},
        {"allOf": [{"$ref": "#"}] * 257}, {"description": "x" * 65_536}, {"anyOf": [{"enum": list(range(2049))}] * 2},
        {"oneOf": [{"$ref": "#/$defs/a"}] * 200, "$defs": {"a": {"anyOf": [{}] * 200}}},
    ],
    ids=lambda schema: f"{next(iter(schema))}",
)  # fmt: skip
def test_limits_are_checked_first(schema: Any) -> None:
    assert refused(schema).code == "grammar_too_complex"


def test_what_is_just_within_the_limits_is_accepted() -> None:
    check_schema(nested(32), "schema")
    check_schema({"properties": {f"p{number}": {} for number in range(2048)}}, "schema")
    check_schema({"enum": list(range(4096))}, "schema")
    check_schema({"allOf": [{"$ref": "#/$defs/a"}] * 256, "$defs": {"a": {}}}, "schema")


def test_half_characters_are_refused() -> None:
    assert refused({"const": "\ud800"}).code == "schema_invalid"
    assert refused({"properties": {"\udfff": {}}}).code == "schema_invalid"


def test_references_get_names_of_ours() -> None:
    properties = {"a/b~": {"type": "null"}, "x": {"$ref": "#/properties/a~1b~0"}, "self": {"$ref": "#"}}
    checked = check_schema({"properties": properties}, "schema", prefix="p")
    assert checked.root == {"$ref": "#/$defs/p1"}
    assert checked.definitions["p0"] == {"type": "null"}
    assert checked.definitions["p1"]["properties"]["a/b~"] == {"$ref": "#/$defs/p0"}
    assert checked.whole()["$defs"] == checked.definitions


def test_options_of_one_of_are_copied_to_their_place_once() -> None:
    kinds = {name: {"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]} for name in "ab"}
    kinds["b"]["properties"]["inner"] = union = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
    checked = check_schema({**union, "$defs": kinds}, "schema")
    assert checked.root == {"$ref": "#/$defs/d2"}
    first, second = checked.definitions["d2"]["oneOf"]
    assert first == kinds["a"]
    assert second["properties"] == {"k": {"const": "b"}, "inner": {"$ref": "#/$defs/d3"}}
    check_schema({"oneOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}, "schema")
    check_schema({"$defs": {"a": {"oneOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "schema")
    chain = {f"d{n}": {"oneOf": [{"items": {"oneOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2}}]} for n in range(100)}
    check_schema({"$ref": "#/$defs/d0", "$defs": {**chain, "d100": {}}}, "schema")


def test_generated_unions_work(v3: Grammar) -> None:
    """Options that are references cannot be told apart; here a union is also part of one of its own options."""
    union = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "discriminator": {"propertyName": "k"}}
    kinds = {name: {"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]} for name in "ab"}
    kinds["b"]["properties"]["inner"] = union
    for schema in ({**union, "$defs": kinds}, {"$ref": "#/$defs/u", "$defs": {**kinds, "u": union}}):
        source = grammar_of(schema)
        assert accepts(v3, source, '{"k": "b", "inner": {"k": "b", "inner": {"k": "a"}}}')
        assert not accepts(v3, source, '{"k": "b", "inner": {"k": "b", "inner": {"k": "c"}}}')


def test_a_name_cannot_be_hidden_behind_an_escape(v3: Grammar) -> None:
    source = grammar_of({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert accepts(v3, source, '{"a": 1, "b": "x"}')
    for again in ('"a"', '"\\u0061"', '"\\u0041"', '"\\x61"'):
        assert not accepts(v3, source, f'{{"a": 1, {again}: "x"}}')
    slash = grammar_of({"type": "object", "properties": {"/": {"type": "integer"}}, "required": ["/"]})
    assert not accepts(v3, slash, '{"/": 1, "\\/": "x"}')


FORMAT_CASES = {
    "date-time": ("2024-12-31T23:59:59Z", "2024-12-31 23:59:59"), "time": ("12:00:00+01:00", "25:00:00Z"),
    "date": ("1999-01-01", "1999-13-01"),
    "duration": ("P1DT2H", "1D"), "email": ("a.b@c.org", "a@"), "hostname": ("a-b.org", "-a.org"),
    "ipv4": ("127.0.0.1", "256.0.0.1"),
    "ipv6": ("::1", ":::1"), "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567"),
    "uri": ("https://x.org/a?b#c", "x y"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats(v3: Grammar, name: str) -> None:
    good, bad = FORMAT_CASES[name]
    source = grammar_of({"type": "string", "format": name})
    assert accepts(v3, source, json.dumps(good))
    assert not accepts(v3, source, json.dumps(bad))


def test_random_schemas_are_accepted_or_refused_by_compiling_alone() -> None:
    for seed in range(500):
        check_schema(random_schema(seed), "schema")


def test_the_oracle_sees_a_wrong_answer() -> None:
    with pytest.raises(Exception, match="is not of type"):
        validate({"type": "integer"}, '"a"')
    with pytest.raises(Exception, match="is not a multiple of"):
        validate({"multipleOf": 0.1}, "0.35")
