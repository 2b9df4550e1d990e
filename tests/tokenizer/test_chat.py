"""The chat format: pinned ids, rules that a conversation can break, training marks, limits (E1-E10)."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.errors import CapacityError, MessagesError
from mixtral.tokenizer import Tokenizer, encode_chat

TOKENIZERS = {version: Tokenizer.from_version(version) for version in ("v1", "v2", "v3")}
V1, V3 = TOKENIZERS["v1"], TOKENIZERS["v3"]
USER = {"role": "user", "content": "Hi"}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "Hello "},
    {"role": "user", "content": "Bye"},
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"a": 1e5}'}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

GOLDEN_V1 = [1, 733, 16289, 28793, 1739, 6817, 28723, 13, 13, 23809, 733, 28748, 16289, 28793, 22557, 28705, 2, 733]
GOLDEN_V1 += [16289, 28793, 2463, 28706, 733, 28748, 16289, 28793]
GOLDEN_V3 = [1, 3, 16127, 4, 23325, 2, 3, 2507, 7585, 29491, 781, 781, 2698, 29474, 4]


def text_of(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    """The encoded conversation with control tokens shown by name."""
    ids = encode_chat(tokenizer, messages, tools, **options).ids
    return "".join(
        tokenizer.piece(id) if tokenizer.is_control(id) else tokenizer.token_bytes(id).decode() for id in ids
    )


@pytest.mark.parametrize(("version", "ids"), [("v1", GOLDEN_V1), ("v2", GOLDEN_V3), ("v3", GOLDEN_V3)])
def test_golden_ids(version: str, ids: list[int]) -> None:
    """E: pinned, so that a change of the vocabulary files or of the reference is noticed."""
    assert encode_chat(TOKENIZERS[version], DIALOGUE).ids == ids


def test_golden_ids_of_one_word() -> None:
    assert encode_chat(V1, [USER]).ids == [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793]
    assert encode_chat(V3, [USER]).ids == [1, 3, 16127, 4]


def test_function_calls_in_v3() -> None:
    """E2, E9, E10: JSON is written again, results carry the id of their call."""
    assert text_of(V3, [USER, CALLS, RESULT, {"role": "assistant", "content": "OK"}, USER], [TOOL]) == (
        '<s>[INST] Hi[/INST][TOOL_CALLS] [{"name": "f", "arguments": {"a": 100000.0}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS] {"content": 1, "call_id": "abcdefghi"}[/TOOL_RESULTS] OK</s>'
        '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "f", "description": "", '
        '"parameters": {"type": "object"}}}][/AVAILABLE_TOOLS][INST] Hi[/INST]'
    )


def test_v2_forgets_old_calls_and_takes_one_result_per_turn() -> None:
    v2 = TOKENIZERS["v2"]
    named = RESULT | {"name": "f"}
    assert text_of(v2, [USER, CALLS, named, {"role": "assistant", "content": "OK"}, USER]) == (
        "<s>[INST] Hi[/INST] OK</s>[INST] Hi[/INST]"
    )
    assert text_of(v2, [USER, CALLS, named]) == (
        '<s>[INST] Hi[/INST][TOOL_CALLS] [{"name": "f", "arguments": {"a": 100000.0}}]</s>'
        '[TOOL_RESULTS] [{"name": "f", "content": 1}][/TOOL_RESULTS]'
    )
    two = {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "jklmnopqr"}]}
    with pytest.raises(MessagesError, match="second result") as caught:
        encode_chat(v2, [USER, two, RESULT, RESULT | {"tool_call_id": "jklmnopqr"}])
    assert caught.value.param == "messages[3]"


def test_a_turn_to_be_continued_has_no_end() -> None:
    messages = [USER, {"role": "assistant", "content": "The answer is ", "prefix": True}]
    assert text_of(V3, messages) == "<s>[INST] Hi[/INST] The answer is"
    assert text_of(V1, messages) == "<s> [INST] Hi [/INST] The answer is "


def test_developer_is_system_and_null_members_are_absent() -> None:
    plain = encode_chat(V3, DIALOGUE).ids
    assert encode_chat(V3, [DIALOGUE[0] | {"role": "developer"}, *DIALOGUE[1:]]).ids == plain
    answered = DIALOGUE[2] | {"refusal": None, "tool_calls": None, "audio": None, "weight": None}
    assert encode_chat(V3, [*DIALOGUE[:2], answered, DIALOGUE[3]]).ids == plain


def test_surrogates_in_content() -> None:
    assert text_of(V3, [{"role": "user", "content": "a\ud800b"}]) == "<s>[INST] a\ufffdb[/INST]"


def test_foreign_call_ids_are_replaced_and_listed() -> None:
    """E8"""
    foreign = "call_0123456789abcdef"
    messages = [USER, {"role": "assistant", "tool_calls": [CALL | {"id": foreign}]}, RESULT | {"tool_call_id": foreign}]
    encoded = encode_chat(V3, messages)
    (short,) = encoded.call_ids.values()
    assert encoded.call_ids == {foreign: short}
    same = [USER, {"role": "assistant", "tool_calls": [CALL | {"id": short}]}, RESULT | {"tool_call_id": short}]
    assert encode_chat(V3, same) == type(encoded)(encoded.ids, encoded.trained, {})


def test_results_in_any_order_and_ids_used_again_later() -> None:
    other = {"id": "jklmnopqr", "function": {"name": "g", "arguments": ""}}
    two = {"role": "assistant", "tool_calls": [CALL, other]}
    results = [RESULT | {"tool_call_id": "jklmnopqr"}, RESULT]
    text = text_of(V3, [USER, two, *results, two, *results])
    for id in ("abcdefghi", "jklmnopqr"):
        assert (text.count(f', "id": "{id}"'), text.count(f'"call_id": "{id}"')) == (2, 2)


class TestTraining:
    def test_assistant_turns_and_their_end_are_marked(self) -> None:
        encoded = encode_chat(V3, [*DIALOGUE, {"role": "assistant", "content": "Bye"}], for_training=True)
        marked = [id for id, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
        assert marked == [*V3.encode("Hello"), 2, *V3.encode("Bye"), 2]

    def test_weight_zero_leaves_a_turn_out(self) -> None:
        """F11"""
        messages = [*DIALOGUE, {"role": "assistant", "content": "Bye", "weight": 1}]
        messages[2] = messages[2] | {"weight": 0}
        encoded = encode_chat(V3, messages, for_training=True)
        marked = [id for id, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
        assert marked == [*V3.encode("Bye"), 2]

    def test_only_the_last_calls_have_no_ids(self) -> None:
        messages = [USER, CALLS, RESULT, CALLS]
        text = text_of(V3, messages, for_training=True)
        assert text.count('"id": "abcdefghi"') == 1
        assert text.endswith('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 100000.0}}]</s>')
        without = {"role": "assistant", "tool_calls": [{"function": CALL["function"]}]}
        assert text_of(V3, [*messages[:-1], without], for_training=True) == text

    @pytest.mark.parametrize(
        "last",
        [USER, RESULT, {"role": "assistant", "content": "x", "prefix": True}, {"role": "system", "content": "x"}],
    )
    def test_the_last_message_is_the_assistants(self, last: dict[str, Any]) -> None:
        with pytest.raises(MessagesError):
            encode_chat(V3, [USER, last], for_training=True)


BROKEN: list[tuple[str, Any, Any]] = [
    ("messages", [], None),
    ("messages[0]", ["Hi"], None),
    ("messages[0].role", [{"content": "Hi"}], None),
    ("messages[0].role", [USER | {"role": "function"}], None),
    ("messages[0].role", [USER | {"role": ["user"]}], None),
    ("messages[0].name", [USER | {"name": "Ann"}], None),
    ("messages[0].content", [{"role": "user"}], None),
    ("messages[0].content", [{"role": "user", "content": 3}], None),
    (
        "messages[0].content[1].type",
        [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]}],
        None,
    ),
    ("messages[0].content[0].text", [{"role": "user", "content": [{"type": "text"}]}], None),
    ("messages[0].content[0].url", [{"role": "user", "content": [{"type": "text", "text": "", "url": 1}]}], None),
    ("messages[1].role", [USER, {"role": "assistant", "content": "x"}], None),
    ("messages[1].role", [USER, {"role": "system", "content": "x"}], None),
    ("messages[2].role", [USER, {"role": "assistant", "content": "x"}, {"role": "system", "content": "x"}, USER], None),
    ("messages[1]", [USER, {"role": "assistant", "content": ""}, USER], None),
    ("messages[1]", [USER, CALLS | {"content": "x"}, RESULT], None),
    ("messages[2]", [USER, {"role": "assistant", "content": "x"}, CALLS, RESULT], None),
    ("messages[1].prefix", [USER, {"role": "assistant", "content": "x", "prefix": True}, USER], None),
    ("messages[1].prefix", [USER, {"role": "assistant", "content": "x", "prefix": 1}], None),
    ("messages[1].prefix", [USER, CALLS | {"prefix": True}], None),
    ("messages[1].weight", [USER, {"role": "assistant", "content": "x", "weight": 2}, USER], None),
    ("messages[1].tool_calls", [USER, {"role": "assistant", "tool_calls": 3}, USER], None),
    (
        "messages[1].tool_calls[0].id",
        [USER, {"role": "assistant", "tool_calls": [{"function": CALL["function"]}]}, RESULT],
        None,
    ),
    ("messages[1].tool_calls[0].id", [USER, {"role": "assistant", "tool_calls": [CALL | {"id": ""}]}, RESULT], None),
    (
        "messages[1].tool_calls[0].id",
        [USER, {"role": "assistant", "tool_calls": [CALL | {"id": "a\ud800"}]}, RESULT],
        None,
    ),
    (
        "messages[1].tool_calls[0].type",
        [USER, {"role": "assistant", "tool_calls": [CALL | {"type": "x"}]}, RESULT],
        None,
    ),
    ("messages[1].tool_calls[1].id", [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, RESULT, RESULT], None),
    ("messages[2].tool_call_id", [USER, CALLS, {"role": "tool", "content": "1"}], None),
    ("messages[2].tool_call_id", [USER, CALLS, RESULT | {"tool_call_id": "jklmnopqr"}], None),
    ("messages[3].tool_call_id", [USER, CALLS, RESULT, RESULT], None),
    ("messages[2].name", [USER, CALLS, RESULT | {"name": "f\n"}], None),
    ("messages[2]", [USER, CALLS, USER], None),
    (
        "messages[3]",
        [USER, {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "jklmnopqr"}]}, RESULT, USER],
        None,
    ),
    ("tools", [USER], 3),
    ("tools[0].type", [USER], [TOOL | {"type": "web"}]),
    ("tools[0].function", [USER], [{"type": "function"}]),
    ("tools[0].function.name", [USER], [{"function": {"name": "a b"}}]),
    ("tools[0].function.name", [USER], [{"function": {"name": "a" * 65}}]),
    ("tools[0].function.nmae", [USER], [{"function": {"name": "a", "nmae": "b"}}]),
    ("tools[0].function.description", [USER], [{"function": {"name": "a", "description": 3}}]),
    ("tools[0].function.parameters", [USER], [{"function": {"name": "a", "parameters": []}}]),
    ("tools[0].function.strict", [USER], [{"function": {"name": "a", "strict": "yes"}}]),
    ("tools[1].function.name", [USER], [TOOL, TOOL]),
    ("tools", [USER], [{"function": {"name": "a", "parameters": {"x": {1, 2}}}}]),
]


@pytest.mark.parametrize(("param", "messages", "tools"), BROKEN)
def test_a_broken_rule_is_named_with_its_place(param: str, messages: Any, tools: Any) -> None:
    """E3, E5, E6, E7"""
    with pytest.raises(MessagesError) as caught:
        encode_chat(V3, messages, tools)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert caught.value.code == "invalid_messages"


@pytest.mark.parametrize("name", ["arguments", "name", "extra"])
def test_a_broken_function_call_is_named_with_its_place(name: str) -> None:
    call = CALL | {"function": CALL["function"] | {name: {"a": 1}}}
    with pytest.raises(MessagesError) as caught:
        encode_chat(V3, [USER, {"role": "assistant", "tool_calls": [call]}, RESULT])
    assert caught.value.param == f"messages[1].tool_calls[0].function.{name}"


@pytest.mark.parametrize("number", ["9" * 5000, "[" * 100_000 + "]" * 100_000])
def test_json_that_python_cannot_read_is_refused(number: str) -> None:
    with pytest.raises(MessagesError, match="cannot be read") as caught:
        encode_chat(V3, [USER, CALLS, RESULT | {"content": number}])
    assert caught.value.param == "messages[2].content"


def test_functions_with_the_v1_format_are_refused() -> None:
    """E4"""
    for messages, tools in (([USER], [TOOL]), ([USER, CALLS, RESULT], None)):
        with pytest.raises(MessagesError) as caught:
            encode_chat(V1, messages, tools)
        assert caught.value.code == "tools_not_supported"
    assert encode_chat(V1, [USER], []).ids == encode_chat(V1, [USER]).ids


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_limit_is_exact(version: str) -> None:
    tokenizer = TOKENIZERS[version]
    needed = len(encode_chat(tokenizer, DIALOGUE).ids)
    assert len(encode_chat(tokenizer, DIALOGUE, max_tokens=needed).ids) == needed
    for limit in range(needed):
        with pytest.raises(CapacityError, match=f"limit is {limit}"):
            encode_chat(tokenizer, DIALOGUE, max_tokens=limit)


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    messages = [{"role": "user", "content": "word " * 4_000_000}]
    start = time.perf_counter()
    with pytest.raises(CapacityError, match=r"at least 1111114 tokens; the limit is 1000"):
        encode_chat(V3, messages, max_tokens=1000)
    assert time.perf_counter() - start < 0.5


names = st.sampled_from(["[INST]", "[/INST]", "</s>", "<s>", "[TOOL_CALLS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"])
texts = st.lists(st.one_of(names, st.text(max_size=4)), max_size=5).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(system=texts, user=texts, answer=texts, result=texts, described=texts)
def test_text_cannot_change_the_control_tokens(
    system: str, user: str, answer: str, result: str, described: str
) -> None:
    """D4, D6: the same control ids whatever the texts hold, and one BOS."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        CALLS,
        RESULT | {"content": result},
        {"role": "assistant", "content": answer + "."},
        {"role": "user", "content": user},
    ]
    tools = [{"function": {"name": "f", "description": described}}]
    ids = encode_chat(V3, messages, tools).ids
    assert [id for id in ids if V3.is_control(id)] == [1, 3, 4, 5, 2, 8, 9, 2, 6, 7, 3, 4]
