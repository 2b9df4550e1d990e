"""LangChain's ChatOpenAI over the embedded model: answers, streams, functions, forms."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from desk import BIKE, BIKE_TEXT, DATE, DAY, FACT, FULL, LOST, NEXT, QUESTION, BookBike, Lost

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # importing it takes seconds


@pytest.fixture
def model(base: str) -> ChatOpenAI:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="embedded", base_url=base, api_key="none", temperature=0, max_retries=0)  # type: ignore[arg-type]


def test_invoke_and_stream(model: ChatOpenAI) -> None:
    answer = model.invoke(QUESTION)
    assert FACT in answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 5
    pieces = [chunk.text for chunk in model.stream(QUESTION)]
    assert "".join(pieces) == answer.text
    assert len([piece for piece in pieces if piece]) > 3


def test_asynchronous_calls(base: str) -> None:
    import httpx
    from langchain_openai import ChatOpenAI

    async def act() -> tuple[Any, Any]:
        async with httpx.AsyncClient() as http:
            model = ChatOpenAI(
                model="embedded", base_url=base, api_key="none", temperature=0, max_retries=0, http_async_client=http
            )  # type: ignore[arg-type]
            first, second = await model.abatch([QUESTION, QUESTION])
            return first, second

    first, second = asyncio.run(act())
    assert FACT in first.text
    assert first.text == second.text


def test_a_function_its_result_and_the_answer(model: ChatOpenAI) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    @tool
    def book_bike(days: int, date: str) -> str:
        """Book a bike"""
        return FULL

    able = model.bind_tools([book_bike])
    asked = HumanMessage(BIKE)
    called = able.invoke([asked])
    (call,) = called.tool_calls  # type: ignore[attr-defined]
    assert (call["name"], call["args"]["date"]) == ("book_bike", DATE)
    streamed = None
    for chunk in able.stream([asked]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == call["args"]  # type: ignore[attr-defined]
    result = book_bike.invoke(call)
    assert NEXT in able.invoke([asked, called, result]).text
    forced = model.bind_tools([book_bike], tool_choice="book_bike", strict=True, parallel_tool_calls=False)
    assert len(forced.invoke([asked]).tool_calls) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: ChatOpenAI, method: Any) -> None:
    found = model.with_structured_output(Lost, method=method).invoke(LOST)
    assert isinstance(found, Lost)
    booked = model.with_structured_output(BookBike, method=method).invoke(BIKE_TEXT)
    assert isinstance(booked, BookBike)
    assert DAY in found.date or DATE in booked.date


def test_what_the_server_refuses_is_an_error_that_says_why(model: ChatOpenAI) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        model.invoke(QUESTION, reasoning_effort="low")
