"""Function calls read from ids, and ids of 9 characters (E8, E9, E10, E14)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.errors import MessagesError
from mixtral.tokenizer import Tokenizer, ToolCall, encode_chat, parse_calls
from mixtral.tokenizer.calls import map_call_ids

V1, V3 = Tokenizer.from_version("v1"), Tokenizer.from_version("v3")
TOOL_CALLS = 5


def written(text: str) -> list[int]:
    return [TOOL_CALLS, *V3.encode(text), V3.eos_id]


def test_content_alone() -> None:
    assert parse_calls(V3, [*V3.encode("Just [TOOL_CALLS] text"), 2]) == ("Just [TOOL_CALLS] text", [])
    assert parse_calls(V1, V1.encode('[TOOL_CALLS] [{"name": "f"}]')) == ('[TOOL_CALLS] [{"name": "f"}]', [])
    assert parse_calls(V3, []) == ("", [])


def test_calls_with_and_without_ids() -> None:
    """E9"""
    text = '[{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"arguments": {}, "name": "g"}]'
    content, calls = parse_calls(V3, written(text))
    assert content == ""
    assert calls[0] == ToolCall("abcdefghi", "f", '{"a": 1}')
    assert (calls[1].name, calls[1].arguments) == ("g", "{}")
    assert re.fullmatch("[a-zA-Z0-9]{9}", calls[1].id)
    assert parse_calls(V3, written(text))[1] == calls
    assert parse_calls(V3, written(text), salt="other")[1][1].id != calls[1].id


@pytest.mark.parametrize("id", ['"abc"', '"abcdefghi\\n"', "7", "null", '"abcdefgh-"'])
def test_an_id_that_is_not_nine_letters_and_digits_is_replaced(id: str) -> None:
    """E6"""
    _, calls = parse_calls(V3, written(f'[{{"name": "f", "arguments": {{}}, "id": {id}}}]'))
    assert re.fullmatch("[a-zA-Z0-9]{9}", calls[0].id)


def test_equal_calls_get_different_ids() -> None:
    one = '{"name": "f", "arguments": {}}'
    _, calls = parse_calls(V3, written(f"[{one}, {one}, {one}]"))
    assert len({call.id for call in calls}) == 3
    same = '{"name": "f", "arguments": {}, "id": "abcdefghi"}'
    _, calls = parse_calls(V3, written(f"[{same}, {same}]"))
    assert len({call.id for call in calls}) == 2


def test_arguments_keep_their_spelling() -> None:
    """E10: numbers, escapes and doubled keys are not written again."""
    arguments = '{ "a":1.10,"b" :1e5, "c": "\\u00e9 }] \\"{", "d":{"e":[{}, 12345678901234567890]}, "a": {} }'
    text = f' [ {{"arguments" : {arguments} , "name" : "f"}},\n{{"name":"g","arguments":{{}}}} ] '
    assert [call.arguments for call in parse_calls(V3, written(text))[1]] == [arguments, "{}"]


def test_arguments_that_are_json_in_a_string() -> None:
    _, calls = parse_calls(V3, written('[{"name": "f", "arguments": "{\\"a\\": 1}"}]'))
    assert calls[0].arguments == '{"a": 1}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"name": "f", "arguments": {', "not valid JSON"),
        ("", "not valid JSON"),
        ("sorry, no", "not valid JSON"),
        ('{"name": "f", "arguments": {}}', "not a list"),
        ("[]", "at least one call"),
        ('[{"arguments": {}}]', "call 0 has no name"),
        ('[{"name": "f"}, 3]', "call 1 has no name"),
        ('[{"name": "f g"}]', "other characters"),
        ('[{"name": "f\\n"}]', "other characters"),
        ('[{"name": "f", "arguments": [1]}]', "not a JSON object"),
        ("[" * 100000, "not valid JSON"),
    ],
)
def test_broken_calls_are_an_error_that_shows_the_text(text: str, reason: str) -> None:
    with pytest.raises(MessagesError, match=re.escape(reason)) as caught:
        parse_calls(V3, written(text))
    assert repr(text[:100])[1:-1] in str(caught.value)
    assert len(str(caught.value)) < 600


# Without "▁": in SentencePiece it is a space.
words = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
arguments_of_calls = st.lists(st.dictionaries(words, json_values, max_size=3), min_size=1, max_size=3)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(arguments=arguments_of_calls, indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_any_arguments_come_back(arguments: list[dict[str, Any]], indent: int | None, ascii: bool) -> None:
    """E14"""
    listed = [{"name": "f", "arguments": each} for each in arguments]
    _, calls = parse_calls(V3, written(json.dumps(listed, indent=indent, ensure_ascii=ascii)))
    assert [json.loads(call.arguments) for call in calls] == arguments


def test_a_training_turn_is_read_back() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "b"}'}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call, call]}]
    encoded = encode_chat(V3, messages, for_training=True)
    answer = [id for id, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    content, calls = parse_calls(V3, answer)
    assert content == ""
    assert [(each.name, each.arguments) for each in calls] == [("f", '{"a": "b"}')] * 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.one_of(st.text(max_size=12), st.from_regex(r"\A[a-zA-Z0-9]{9}\Z")), max_size=8))
def test_foreign_ids_are_mapped_injectively(ids: list[str]) -> None:
    """E8"""
    mapped = map_call_ids(ids)
    assert mapped == map_call_ids(reversed(ids))
    final = {id: mapped.get(id, id) for id in ids}
    assert len(set(final.values())) == len(set(ids))
    assert all(re.fullmatch(r"[a-zA-Z0-9]{9}", value) for value in final.values())


def test_ids_that_fit_keep_their_value_and_collisions_are_resolved() -> None:
    """E8: cutting ids off would collide."""
    (first,) = map_call_ids(["call_abcdefgh1"]).values()
    assert map_call_ids(["call_abcdefgh1", "call_abcdefgh2"])["call_abcdefgh1"] == first
    moved = map_call_ids(["call_abcdefgh1", first])
    assert first not in moved
    assert moved["call_abcdefgh1"] != first
