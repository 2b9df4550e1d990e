"""Function calls read from ids, and ids of 9 characters (E8, E9, E10, E14)."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.errors import MessagesError
from mixtral.tokenizer import CallReader, Tokenizer, ToolCall, encode_chat, parse_calls
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
        ("[" * 100000, "call 0 has no name"),
        ('[{"a": ' + "[" * 100000, "not valid JSON"),
        ('[{"name": "f", "name": "g"}]', "two members of one name"),
        ('[{"name": "f"}] and more', "something follows"),
        ('[{"name": "f" "arguments": {}}]', "is missing"),
        ('[{"name": f}]', "not valid JSON"),
        ('[{"name": "f", "arguments": {"a": 01}}]', "not valid JSON"),
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


def read(pieces: Iterable[str]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of every call in a text that comes in pieces."""
    reader, found = CallReader(salt="s"), list[tuple[str, str, str]]()
    for piece in pieces:
        for delta in reader.push(piece):
            if delta.name:
                assert delta.index == len(found)
                assert not delta.arguments
                found.append((delta.id, delta.name, ""))
            else:
                id, name, arguments = found[delta.index]
                found[delta.index] = (id, name, arguments + delta.arguments)
    reader.finish()
    return found


WRITTEN = [
    '[{"name": "f", "arguments": {"a": "x\\"}]", "b": [1, {"c": -1.5e3}]}}, {"name": "g", "arguments": {}}]',
    ' [ {"arguments" : {"a":1} ,\n"id": "abcdefghi", "name" : "f"}\t, {"name":"g"} ] ',
    '[{"name": "f", "arguments": "{\\"a\\": \\"\\u00e9\\"}", "": null, "more": ["arguments", {"name": "h"}]}]',
    '[{"name": "f", "arguments": {"\\\\": "\\\\", "é🥐": true}}]',
]


@pytest.mark.parametrize("text", WRITTEN)
def test_every_cut_gives_the_same_calls(text: str) -> None:
    whole = read([text])
    assert [call[1:] for call in whole] == [(call.name, call.arguments) for call in parse_calls(V3, written(text))[1]]
    assert read(text) == whole
    for place in range(len(text)):
        assert read([text[:place], text[place:]]) == whole
    shuffle = random.Random(1)
    for _ in range(50):
        cuts = sorted(shuffle.choices(range(len(text)), k=5))
        assert read(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)) == whole


def test_arguments_come_out_as_they_are_written() -> None:
    reader = CallReader()
    seen = [reader.push(character) for character in '[{"name": "f", "arguments": {"a": 1}}]']
    assert [len(deltas) for deltas in seen] == [0] * 12 + [1] + [0] * 15 + [1] * 8 + [0] * 2
    assert seen[12][0].name == "f"
    assert "".join(delta.arguments for deltas in seen for delta in deltas) == '{"a": 1}'


@pytest.mark.parametrize("cut", range(1, len(WRITTEN[0]) - 1))
def test_a_text_that_ends_too_early_is_noticed(cut: int) -> None:
    reader = CallReader()
    reader.push(WRITTEN[0][:cut])
    with pytest.raises(MessagesError, match="ends too early"):
        reader.finish()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(arguments=arguments_of_calls, data=st.data())
def test_any_arguments_come_back_in_pieces(arguments: list[dict[str, Any]], data: st.DataObject) -> None:
    text = json.dumps([{"name": "f", "arguments": each} for each in arguments], ensure_ascii=False)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    found = read(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
    assert [json.loads(call[2]) for call in found] == arguments


@pytest.mark.parametrize(
    "filler",
    ["x", '\\"', "[", '{"a":', "\\\\", "1,", "é"],
    ids=["text", "quotes", "lists", "objects", "escapes", "x", "é"],
)
def test_reading_is_linear(filler: str) -> None:
    text = '[{"name": "f", "arguments": {"a": "' + filler * (300_000 // len(filler))
    for pieces in ([text], [text[place : place + 3] for place in range(0, len(text), 3)]):
        began = time.monotonic()
        reader = CallReader()
        for piece in pieces:
            reader.push(piece)
        assert time.monotonic() - began < 5  # quadratic time would be minutes
