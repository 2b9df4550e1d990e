"""JSONL of a user: ids as mistral-common's, only answers learnt, each once; every bad line listed with its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral.errors import MessagesError, TrainingError
from mixtral.tokenizer import Tokenizer
from mixtral.train.lines import BadLinesError, Lines, conversation, read_pairs, read_texts, text_answer
from mixtral.train.start import Start, load_start

Write = Callable[[str, Sequence[object]], Path]
Talk = tuple[list[dict[str, Any]], list[dict[str, Any]]]
V3 = Tokenizer.from_version("v3")
USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}


@pytest.fixture(scope="module")
def start(plain: Path) -> Start:
    return load_start(plain, dtype="float32", full=True)


@pytest.fixture(scope="module")
def shared(compact: Path) -> Start:
    return load_start(compact, dtype="float32", full=True)


def theirs(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
    """mistral-common's ids for fine-tuning."""
    path = MistralTokenizer.v3().instruct_tokenizer.tokenizer.file_path
    tokenizer = MistralTokenizer.from_file(path, mode=ValidationMode.finetuning)
    plain = [{name: value for name, value in one.items() if name != "weight"} for one in messages]
    request = ChatCompletionRequest.from_openai(plain, list(tools) or None)
    ids: list[int] = tokenizer.encode_chat_completion(request).tokens
    return ids


def learnt(documents: list[tuple[list[int], list[bool]]]) -> list[str]:
    return [
        V3.decode([id for id, wanted in zip(ids, trained, strict=True) if wanted and id != V3.eos_id])
        for ids, trained in documents
    ]


def test_a_plain_conversation_is_one_document_with_mistral_commons_ids() -> None:
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "Again: good morning."}]
    ((ids, trained),) = conversation(V3, messages, None)
    assert ids == theirs(messages)
    assert learnt([(ids, trained)]) == ["Good morning. Again: good morning."]
    ends = [place for place, id in enumerate(ids) if id == V3.eos_id]
    assert len(ends) == 2
    assert all(trained[end] for end in ends)


def test_a_call_ends_a_document_without_its_id_and_is_read_with_it_in_the_next(with_calls: Talk) -> None:
    messages, tools = with_calls
    first, second = conversation(V3, messages, tools)
    bare = json.loads(json.dumps(messages[:4]))
    del bare[3]["tool_calls"][0]["id"]
    assert first[0] == theirs(bare, tools)
    assert second[0] == theirs(messages, tools)
    call = '[{"name": "price", "arguments": {"people": 20}}]'
    assert learnt([first, second]) == [f"That is 9 francs. {call}", "Groups pay 7 francs each."]
    control = V3.control_id("[TOOL_CALLS]")
    assert first[1][first[0].index(control)]
    assert not second[1][second[0].index(control)]
    results = second[0].index(V3.control_id("[/TOOL_RESULTS]"))
    assert not any(second[1][: results + 1])
    assert all(second[1][results + 1 :])


def test_every_turn_is_learnt_in_exactly_one_document(with_calls: Talk) -> None:
    messages, tools = with_calls
    again = json.loads(json.dumps(messages))
    again[3]["tool_calls"][0]["id"] = again[4]["tool_call_id"] = "Abcdefgh1"
    found = conversation(V3, [*messages, *again], tools)
    assert len(found) == 3
    assert sum(sum(id == V3.eos_id and w for id, w in zip(*one, strict=True)) for one in found) == 6


def test_a_turn_of_weight_zero_is_read_but_not_learnt() -> None:
    muted = {**ANSWER, "weight": 0}
    ((ids, trained),) = conversation(V3, [USER, muted, USER, {**ANSWER, "weight": 1}], None)
    assert ids == theirs([USER, ANSWER, USER, ANSWER])
    assert learnt([(ids, trained)]) == ["Good morning."]
    assert conversation(V3, [USER, muted], None) == []


def test_v1_has_the_same_masks() -> None:
    v1 = Tokenizer.from_version("v1")
    ((ids, trained),) = conversation(v1, [USER, ANSWER], None)
    text = v1.decode([id for id, wanted in zip(ids, trained, strict=True) if wanted])
    assert (text, trained[-1], ids[-1]) == ("Good morning.", True, v1.eos_id)


def test_lines_become_documents(start: Start, lines: Write) -> None:
    path = lines("x.jsonl", [{"text": "One two."}, "", {"messages": [USER, ANSWER], "weight": 2.5}])
    found = read_texts(path, start, max_tokens=100)
    text, talk = found.kept
    assert text.ids.tolist() == V3.encode("One two.", bos=True, eos=True)
    assert text.trained.tolist() == [False] + [True] * (len(text.ids) - 1)
    assert talk.ids.tolist() == theirs([USER, ANSWER])
    assert (text.weight, talk.weight) == (1.0, 2.5)
    assert (found.lines, found.tokens) == (2, len(text.ids) + len(talk.ids) - 2)
    assert found.trained == int(text.trained.sum() + talk.trained.sum())
    assert found.told("documents").startswith("2 lines, 2 documents; ")


BAD: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "not JSON"),
    "not UTF-8": ("\udcff", "not UTF-8"),
    "a list": ([1], "a list; expected an object"),
    "unknown key": ({"txt": "a"}, "unknown key 'txt' .did you mean 'text'"),
    "both": ({"text": "a", "messages": []}, "exactly one of text and messages"),
    "neither": ({}, "exactly one of text and messages"),
    "empty text": ({"text": ""}, "text is ''"),
    "text that is none": ({"text": 3}, "text is 3"),
    "no messages": ({"messages": []}, "messages is .*at least one message"),
    "messages that are none": ({"messages": "hello"}, "expected a list of messages"),
    "no answer": ({"messages": [USER]}, r"messages\[0\].role is 'user'; expected assistant"),
    "nothing to learn": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant message has weight 0"),
    "half a weight": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\].weight is 0.5"),
    "negative weight": ({"text": "a", "weight": -1}, "weight is -1; expected a number above 0"),
    "true weight": ({"text": "a", "weight": True}, "weight is True"),
    "unanswered call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
                ANSWER,
            ]
        },
        "expected after assistant|has no result|after assistant",
    ),
    "tools of a text": ({"text": "a", "tools": [{"type": "function"}]}, "tools belong to messages"),
}


@pytest.mark.parametrize(("line", "says"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(start: Start, tmp_path: Path, line: object, says: str) -> None:
    path = tmp_path / "x.jsonl"
    bad = line if isinstance(line, str) else json.dumps(line)
    good = json.dumps({"text": "good"})
    path.write_bytes(f"{good}\n\n{bad}\n{good}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(BadLinesError, match=says) as caught:
        read_texts(path, start, max_tokens=100)
    assert [number for number, _ in caught.value.problems] == [3]
    assert caught.value.summary() == f"{path}: 1 of 3 lines cannot be trained; nothing was trained"


def test_all_bad_lines_are_listed(start: Start, lines: Write) -> None:
    path = lines("x.jsonl", ["{", {"text": "good"}] * 40)
    with pytest.raises(BadLinesError) as caught:
        read_texts(path, start, max_tokens=100)
    assert [number for number, _ in caught.value.problems] == list(range(1, 80, 2))


@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), ("", "holds nothing to train")])
def test_a_file_without_lines_is_refused(start: Start, tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TrainingError, match=says):
        read_texts(path, start, max_tokens=100)


def test_what_is_too_long_is_cut_and_dropped_if_nothing_is_left(start: Start, lines: Write) -> None:
    question = {"role": "user", "content": "word " * 50}
    values = [{"text": "word " * 40}, {"messages": [question, ANSWER]}, {"text": "short"}]
    found = read_texts(lines("x.jsonl", values), start, max_tokens=20)
    assert (found.cut, found.dropped, [len(doc.ids) for doc in found.kept]) == (1, 1, [20, 3])
    assert "1 cut, 1 dropped as too long" in found.told("documents")


def test_repeated_lines_are_counted_and_kept(start: Start, lines: Write) -> None:
    found = read_texts(lines("x.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}]), start, max_tokens=20)
    assert (found.repeated, len(found.kept)) == (1, 3)


def test_lines_are_held_out_by_their_content_alone(start: Start, lines: Write) -> None:
    values = [{"text": f"number {i}"} for i in range(200)]

    def held_out(found: Lines[Any]) -> set[tuple[int, ...]]:
        return {tuple(doc.ids.tolist()) for doc in found.held_out}

    one = read_texts(lines("a.jsonl", values), start, max_tokens=50, held_out_percent=20)
    other = read_texts(lines("b.jsonl", values[::-1]), start, max_tokens=50, held_out_percent=20)
    assert 20 <= len(one.held_out) <= 60
    assert held_out(one) == held_out(other)
    assert len(one.kept) + len(one.held_out) == 200


def test_a_token_without_a_row_is_refused_only_where_it_is_learnt(shared: Start, lines: Write) -> None:
    control = shared.tokenizer.control_id("[TOOL_CALLS]")
    missing = shared.without_row([control])
    assert missing in ([], [control])
    text = {"text": "Zürich 東京"}  # respelled with bytes, which every model has
    assert read_texts(lines("x.jsonl", [text]), shared, max_tokens=50).trained > 5
    plain = Tokenizer.from_version("v3")
    word = next(i for i in range(20_000, plain.vocab_size) if shared.without_row([i]) and plain.piece(i)[1:].isalpha())
    odd = Start(shared.model, {}, plain, shared.row_of_id, {}, shared.copies_of_last)
    with pytest.raises(BadLinesError, match="has no row of its own in this model"):
        read_texts(lines("y.jsonl", [{"text": plain.decode([word])}]), odd, max_tokens=50)


def test_an_answer_begins_where_the_text_of_the_prompt_ends() -> None:
    for prompt, answer in (("The price is", " 9 francs."), ("The pri", "ce is 9."), ("", "All of it."), ("A\n", "b")):
        ids, trained = text_answer(V3, prompt, answer)
        assert ids == V3.encode(prompt + answer, bos=True, eos=True)
        alone = V3.encode(prompt, bos=True)
        first = trained.index(True)
        assert ids[:first] == alone[:first]
        assert first == len(alone) or ids[first] != alone[first]
        assert all(trained[first:])


def test_pairs_share_a_prompt_and_learn_their_answers(start: Start, lines: Write) -> None:
    prompt = [USER, ANSWER, USER]
    values = [
        {"prompt": prompt, "chosen": "Yes.", "rejected": [{"role": "assistant", "content": "Not now."}]},
        {"prompt": "One, two,", "chosen": " three.", "rejected": " seven."},
    ]
    talk, text = read_pairs(lines("x.jsonl", values), start, max_tokens=100).kept
    for doc, said in ((talk.chosen, "Yes."), (talk.rejected, "Not now.")):
        assert doc.ids.tolist() == theirs([*prompt, {"role": "assistant", "content": said}])
        assert V3.decode(doc.ids[doc.trained].tolist()) == said
        assert doc.trained[-1]
    assert V3.decode(text.rejected.ids[text.rejected.trained].tolist()) == "seven."
    shared_part = int((~text.chosen.trained).sum())
    assert np.array_equal(text.chosen.ids[:shared_part], text.rejected.ids[:shared_part])


def test_a_call_can_be_preferred(start: Start, lines: Write, with_calls: Talk) -> None:
    messages, tools = with_calls
    value = {"prompt": messages[:3], "chosen": messages[3], "rejected": "I cannot look that up.", "tools": tools}
    (pair,) = read_pairs(lines("x.jsonl", [value]), start, max_tokens=200).kept
    said = V3.decode(pair.chosen.ids[pair.chosen.trained].tolist())
    assert said == '[{"name": "price", "arguments": {"people": 20}}]'


BAD_PAIRS: dict[str, tuple[object, str]] = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "rejected is missing"),
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is ''"),
    "messages after text": ({"prompt": "a", "chosen": [ANSWER], "rejected": "b"}, "expected text, as the prompt"),
    "no prompt": ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is ..; expected text or a list"),
    "answered": ({"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"}, "prompt ends with an assistant message"),
    "two": ({"prompt": [USER], "chosen": [ANSWER, ANSWER], "rejected": "b"}, "expected text or one assistant message"),
    "a user's": ({"prompt": [USER], "chosen": [USER], "rejected": "b"}, "expected text or one assistant message"),
    "text": ({"text": "a"}, "unknown key 'text'"),
    "tools of a text": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"type": "function"}]},
        "tools belong to messages",
    ),
    "muted": ({"prompt": [USER], "chosen": {**ANSWER, "weight": 0}, "rejected": "b"}, "nothing to learn"),
}


@pytest.mark.parametrize(("line", "says"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_bad_pair_is_named(start: Start, lines: Write, line: object, says: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(BadLinesError, match=says) as caught:
        read_pairs(lines("x.jsonl", [good, line]), start, max_tokens=100)
    assert [number for number, _ in caught.value.problems] == [2]


def test_pairs_that_are_equal_after_cutting_are_dropped(start: Start, lines: Write) -> None:
    same = "word " * 30
    values = [
        {"prompt": "a", "chosen": same + "x", "rejected": same + "y"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    found = read_pairs(lines("x.jsonl", values), start, max_tokens=20)
    assert (found.dropped, len(found.kept)) == (1, 1)


def test_messages_must_be_a_list() -> None:
    with pytest.raises(MessagesError, match="expected a list of messages"):
        conversation(V3, "hello", None)  # type: ignore[arg-type]
