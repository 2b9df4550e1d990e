"""The verifier accepts every reference answer, and no answer that differs in what was asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mixtral.desk.source import SPLITS, Document
from mixtral.desk.verify import check, languages_of
from mixtral.desk.write import SKILLS

COUNT = 150


def documents(skill: str) -> list[Document]:
    return [SKILLS[skill](0, split, number) for split in SPLITS for number in range(COUNT)]


def reply(document: Document) -> tuple[str, list[dict[str, Any]]]:
    last = document.messages[-1]
    return last.get("content") or "", list(last.get("tool_calls") or ())


@pytest.mark.parametrize("skill", [skill for skill in SKILLS if skill != "story"])
def test_every_reference_answer_is_accepted(skill: str) -> None:
    for document in documents(skill):
        assert check(document, *reply(document)), document


@pytest.mark.parametrize("skill", ["records", "sums", "notes"])
def test_an_empty_answer_or_a_needless_call_is_rejected(skill: str) -> None:
    for document in documents(skill):
        text, _ = reply(document)
        assert not check(document, "")
        assert not check(document, text, [{"name": "get_weather", "arguments": {}}])


def test_a_wrong_number_is_rejected() -> None:
    for document in documents("sums"):
        text, _ = reply(document)
        number = document.answer["number"]
        assert not check(document, f"{text.rpartition('####')[0]}#### {number + 1}")
        assert not check(document, f"{text}\n#### {number + 10}")
        assert not check(document, f"{text}0")
        assert not check(document, f"{text}.5")
        assert not check(document, f"{text}{'0' * 5000}")
        assert check(document, f"The answer is {number}.")
        assert check(document, f"{text}\nThat is all, 7 times.")


def test_a_wrong_note_is_rejected() -> None:
    for document in documents("notes"):
        text, _ = reply(document)
        for part in document.answer["contains"]:
            assert not check(document, text.replace(part, ""))
            assert not check(document, text.replace(part, f"{part}1"))
            assert not check(document, text.replace(part, f"9{part}"))
        assert check(document, "\n" + text.replace(" ", "  "))


def test_case_matters_outside_chats() -> None:
    assert not check(Document("notes", "notes/short", "en", answer={"contains": ["Goldener Anker"]}), "goldener anker")
    chat = Document("chat", "chat/values", "de", answer={"contains": ["Mittwoch"], "language": "de"})
    assert check(chat, "Das Museum ist mittwochs geschlossen.")
    assert not check(chat, "Das Museum ist donnerstags geschlossen.")
    assert not check(chat, "The museum is closed on the day of Mittwoch.")


def changed(value: Any) -> list[Any]:
    """Objects that differ from ``value`` in one place."""
    if isinstance(value, dict):
        less = [{name: part for name, part in value.items() if name != gone} for gone in value]
        inner = [{**value, name: other} for name, part in value.items() for other in changed(part)]
        return [*less, {**value, "extra": 1}, *inner]
    if isinstance(value, bool):
        return [not value, int(value), None]
    if isinstance(value, int):
        return [value + 1, str(value)]
    if isinstance(value, list):
        return [value[1:], [*value, "more"]]
    return [f"{value}x", str(value).swapcase()] if str(value).swapcase() != str(value) else [f"{value}x"]


def test_a_wrong_object_is_rejected_and_key_order_is_free() -> None:
    for document in documents("records"):
        wanted = document.answer["json"]
        for other in changed(wanted):
            assert not check(document, json.dumps(other)), other
        assert check(document, json.dumps(dict(reversed(wanted.items())), indent=1))
        text, _ = reply(document)
        assert not check(document, text[:-1])
        assert not check(document, f"Here it is: {text}")


def test_wrong_calls_are_rejected_and_their_order_is_free() -> None:
    parallel = 0
    for document in documents("calls"):
        wanted = document.answer.get("calls")
        if wanted is None:
            continue
        extra = {"name": "get_weather", "arguments": {"city": "Nowhere"}}
        assert not check(document, "", [*wanted, extra])
        if not wanted:
            continue
        assert check(document, "", wanted[::-1])
        assert check(
            document, "", [{"function": {**call, "arguments": json.dumps(call["arguments"])}} for call in wanted]
        )
        parallel += len(wanted) > 1
        assert not check(document, "", wanted[1:])
        for place, call in enumerate(wanted):
            others = [
                {**call, "name": f"{call['name']}s"},
                *({**call, "arguments": x} for x in changed(call["arguments"])),
            ]
            others.append({**call, "arguments": "{not JSON"})
            for other in others:
                assert not check(document, "", [*wanted[:place], other, *wanted[place + 1 :]])
    assert parallel > 10


def test_a_chat_reply_in_another_language_is_rejected() -> None:
    found = documents("chat")
    sure = [document for document in found if len(languages_of(reply(document)[0])) == 1]
    assert len(sure) > 0.9 * len(found)
    for document in sure[:100]:
        text = reply(document)[0]
        for other in sure[:20]:
            if other.language != document.language:
                asked = Document("chat", document.suite, other.language, answer={"language": other.language})
                assert not check(asked, text), text


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The museum opens at ten and there is a café.", "en"),
        ("Das Museum öffnet um zehn, und es gibt ein Café.", "de"),
        ("Le musée ouvre à dix heures et il y a un café.", "fr"),
        ("El museo abre a las diez y hay una cafetería.", "es"),
        ("Il museo apre alle dieci e c'è un bar nella piazza.", "it"),
    ],
)
def test_the_language_of_a_sentence(text: str, language: str) -> None:
    assert languages_of(text) == (language,)


def test_a_text_without_function_words_has_no_language() -> None:
    assert languages_of("Lindera 22:40") == ()


def test_a_plain_text_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="skill 'story'"):
        check(SKILLS["story"](0, "train", 0), "Anything.")
