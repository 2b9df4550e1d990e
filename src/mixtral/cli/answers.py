"""Answers of a loaded model to documents of the town desk, in batches: what ``mixtral evaluate`` scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtral.api import LLM
    from mixtral.desk.source import Document
    from mixtral.evaluate.desk import Answer, Answerer

__all__ = ["BATCH", "MAX_TOKENS", "TEMPERATURE", "answerer", "formed_answerer", "read_answer", "voter"]

BATCH = 32  # documents that are answered together
MAX_TOKENS = 320  # longest answer
TEMPERATURE = 0.7  # of answers that vote

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


def formed_answerer(llm: LLM, on_batch: Callable[[str, int, int], None]) -> Answerer:
    """As ``answerer``, with the form of every answer enforced: records by their schema, calls by their functions'."""
    from mixtral.errors import MessagesError
    from mixtral.evaluate.desk import Answer

    def one(document: Document) -> Answer:
        schema = document.answer.get("schema")
        form = {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}} if schema else None
        try:
            reply = llm.chat(
                document.messages[:-1],
                tools=document.tools or None,
                response_format=form,
                temperature=0.0,
                max_tokens=MAX_TOKENS,
            )
        except MessagesError:
            return Answer("", (_BROKEN_CALL,))
        return Answer(reply.content, tuple({"name": c.name, "arguments": c.arguments} for c in reply.tool_calls))

    def answer(documents: Sequence[Document]) -> list[Answer]:
        found: list[Answer] = []
        for document in documents:
            found.append(one(document))
            if len(found) % BATCH == 0 or len(found) == len(documents):
                on_batch(document.suite, len(found), len(documents))
        return found

    return answer


def voter(llm: LLM, samples: int, on_batch: Callable[[str, int, int], None]) -> Answerer:
    """Sums by vote: the number that most of ``samples`` answers at ``TEMPERATURE`` end with; of equals the first."""
    from mixtral.desk.verify import number_of
    from mixtral.evaluate.desk import Answer

    def answer(documents: Sequence[Document]) -> list[Answer]:
        found: list[Answer] = []
        size = max(1, BATCH // samples)
        for start in range(0, len(documents), size):
            some = [document for document in documents[start : start + size] for _ in range(samples)]
            seeds = [sample for _ in documents[start : start + size] for sample in range(samples)]
            texts = [reply.text for reply in _answer_batch(llm, some, seeds)]
            for first in range(0, len(texts), samples):
                votes = Counter(map(number_of, texts[first : first + samples]))
                found.append(Answer(f"#### {votes.most_common(1)[0][0]}"))
            on_batch(documents[0].suite, len(found), len(documents))
        return found

    return answer


def _answer_batch(llm: LLM, documents: Sequence[Document], seeds: Sequence[int] | None = None) -> list[Answer]:
    """Greedy answers, or with ``seeds`` answers that are drawn."""
    from mixtral.tokenizer import encode_chat
    from mixtral.wire import SamplingParams

    prompts = [
        encode_chat(llm.tokenizer, document.messages[:-1], document.tools or None, max_tokens=llm.context - 1).ids
        for document in documents
    ]
    params = [
        SamplingParams(
            temperature=TEMPERATURE if seeds else 0.0,
            seed=seeds[place] if seeds else 0,
            max_tokens=min(MAX_TOKENS, llm.context - len(ids)),
        )
        for place, ids in enumerate(prompts)
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
