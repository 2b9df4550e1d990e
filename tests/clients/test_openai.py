"""The official Python client, whole and asynchronous, over the embedded model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from desk import BIKE, DATE, DAY, FACT, FULL, LOST, NEXT, QUESTION, TOOL, BookBike, Lost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MODEL = "embedded"
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_whole_streamed_and_with_the_helper_it_is_one_answer(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": ASKED, "temperature": 0}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    assert FACT in whole
    with client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.completion_tokens > 5
    with client.chat.completions.stream(**ask) as helper:
        assert helper.get_final_completion().choices[0].message.content == whole


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, temperature=0, logprobs=True, top_logprobs=3, max_tokens=8
    )
    assert answer.choices[0].logprobs is not None
    listed = answer.choices[0].logprobs.content or []
    assert answer.usage is not None
    assert len(listed) == answer.usage.completion_tokens == 8
    for token in listed:
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy: the likeliest comes first
        assert len(token.top_logprobs) == 3
    text = answer.choices[0].message.content
    # The space in front of the first word belongs to its token, but not to the text.
    assert b"".join(bytes(token.bytes or []) for token in listed).decode().removeprefix(" ") == text


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "book_bike"}}])
def test_a_call_its_result_and_the_answer(client: openai.OpenAI, choice: Any) -> None:
    asked: list[Any] = [{"role": "user", "content": BIKE}]
    tools: Any = [TOOL]
    first = client.chat.completions.create(model=MODEL, messages=asked, tools=tools, tool_choice=choice, temperature=0)
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    (call,) = message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "book_bike"
    assert json.loads(call.function.arguments)["date"] == DATE
    result = {"role": "tool", "tool_call_id": call.id, "content": FULL}
    second = client.chat.completions.create(model=MODEL, messages=[*asked, message, result], tools=tools, temperature=0)
    assert NEXT in (second.choices[0].message.content or "")


def test_pydantic_models_as_form_and_as_function(client: openai.OpenAI) -> None:
    form = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": LOST}], response_format=Lost, temperature=0
    )
    assert form.choices[0].message.parsed is not None
    assert form.choices[0].message.parsed.date == DAY
    tool = openai.pydantic_function_tool(BookBike, name="book_bike")
    called = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": BIKE}], tools=[tool], tool_choice="required", temperature=0
    )
    (call,) = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, BookBike)
    assert call.function.parsed_arguments.date == DATE


def test_completions(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    both = client.completions.create(prompt=["The castle", "Breakfast"], n=2, **{**ask, "temperature": 1, "seed": 5})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    whole = client.completions.create(prompt="The castle", logprobs=2, **ask)
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 12
    with client.completions.create(prompt="The castle", stream=True, **ask) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    scored = client.completions.create(prompt="The castle", echo=True, logprobs=1, **{**ask, "max_tokens": 0})
    assert scored.choices[0].text == "The castle"
    assert scored.choices[0].logprobs is not None
    assert (scored.choices[0].logprobs.token_logprobs or [0])[0] is None


def test_errors_and_raw_responses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=ASKED, store=True)
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "store")
    with pytest.raises(openai.NotFoundError, match="no model") as missing:
        client.chat.completions.create(model="gpt-4o", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no embedding head"):
        client.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.NotFoundError, match="not stored"):
        client.responses.create(model=MODEL, input="a")
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ASKED, max_tokens=3)
    assert raw.request_id == raw.headers["x-request-id"]
    assert int(raw.headers["x-mixtral-seed"]) >= 0
    assert raw.parse().choices[0].finish_reason == "length"


def test_the_asynchronous_client(base: str) -> None:
    async def act() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
            ask: dict[str, Any] = {"model": MODEL, "messages": ASKED, "temperature": 0}

            async def streamed() -> str:
                stream = await client.chat.completions.create(**ask, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def whole() -> str:
                answer = await client.chat.completions.create(**ask)
                return answer.choices[0].message.content or ""

            return await asyncio.gather(*(act() for act in [streamed, whole] * 4))

    found = asyncio.run(act())
    assert len(set(found)) == 1
    assert FACT in found[0]
