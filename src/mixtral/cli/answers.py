"""Answers of a loaded model to documents of the town desk, in batches: what ``mixtral evaluate`` scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtral.api import LLM
    from mixtral.desk.source import Document
    from mixtral.evaluate.desk import Answer, Answerer

__all__ = ["BATCH", "MAX_TOKENS", "answerer", "read_answer"]

BATCH = 32  # documents that are answered together
MAX_TOKENS = 160  # longest answer

# Equals no call that a document asks for, so the answer counts as wrong.
_BROKEN_CALL = {"name": "", "arguments": ""}


def answerer(llm: LLM, on_batch: Callable[[str, int, int], None]) -> Answerer:
    """Greedy answers of ``llm``; ``on_batch`` hears the suite and how many of its documents are answered.

    Raises (while answering):
        MixtralError: the model has no tokenizer or no function calls, or a prompt fills its context.
    """

    def answer(documents: Sequence[Document]) -> list[Answer]:
        found: list[Answer] = []
        for start in range(0, len(documents), BATCH):
            found += _answer_batch(llm, documents[start : start + BATCH])
            on_batch(documents[0].suite, len(found), len(documents))
        return found

    return answer


def _answer_batch(llm: LLM, documents: Sequence[Document]) -> list[Answer]:
    from mixtral.tokenizer import encode_chat
    from mixtral.wire import SamplingParams

    prompts = [
        encode_chat(llm.tokenizer, document.messages[:-1], document.tools or None, max_tokens=llm.context - 1).ids
        for document in documents
    ]
    params = [
        SamplingParams(temperature=0.0, seed=0, max_tokens=min(MAX_TOKENS, llm.context - len(ids))) for ids in prompts
    ]
    written: list[list[int]] = [[] for _ in documents]
    ended = [False] * len(documents)
    for event in llm.generator.stream(prompts, params):
        written[event.sequence].append(event.id)
        ended[event.sequence] = event.finish_reason == "stop"
    return [read_answer(llm, ids, ended=stop) for ids, stop in zip(written, ended, strict=True)]


def read_answer(llm: LLM, ids: Sequence[int], *, ended: bool) -> Answer:
    """Text and calls of one assistant turn; calls that are cut short or malformed make it wrong."""
    from mixtral.errors import MessagesError
    from mixtral.evaluate.desk import Answer
    from mixtral.tokenizer import parse_calls

    try:
        text, calls = parse_calls(llm.tokenizer, ids)
    except MessagesError:
        return Answer("", (_BROKEN_CALL,))
    if calls and not ended:
        return Answer(text, (_BROKEN_CALL,))
    return Answer(text, tuple({"name": call.name, "arguments": call.arguments} for call in calls))
