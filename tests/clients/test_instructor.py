"""instructor over the embedded model: pydantic models through functions and through JSON schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from desk import BIKE, BIKE_TEXT, DATE, DAY, LOST, BookBike, Lost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # importing it takes seconds


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as found:
        yield found


def ask(client: openai.OpenAI, mode: str, model: type[pydantic.BaseModel], text: str, **more: Any) -> Any:
    import instructor

    able = instructor.from_openai(client, mode=instructor.Mode[mode])
    return able.chat.completions.create(
        model="embedded",
        messages=[{"role": "user", "content": text}],
        response_model=model,
        temperature=0,
        max_tokens=200,
        **more,
    )


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_models(client: openai.OpenAI, mode: str) -> None:
    booked = ask(client, mode, BookBike, BIKE_TEXT, max_retries=0)
    lost = ask(client, mode, Lost, LOST, max_retries=0)
    assert isinstance(booked, BookBike)
    assert isinstance(lost, Lost)
    assert booked.date == DATE or lost.date == DAY


def test_a_model_that_grows(client: openai.OpenAI) -> None:
    import instructor

    able = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    grown = list(
        able.chat.completions.create_partial(
            model="embedded",
            messages=[{"role": "user", "content": BIKE}],
            response_model=BookBike,
            temperature=0,
            max_tokens=200,
        )
    )
    assert grown[0].date is None
    assert grown[-1].date == DATE


def test_an_answer_that_is_refused_is_asked_for_again(client: openai.OpenAI) -> None:
    """What a schema cannot say is checked by pydantic, and the model gets the error as the result of its call."""
    import instructor.core

    seen: list[str] = []

    class Picky(BookBike):
        @pydantic.field_validator("date")
        @classmethod
        def refuse(cls, value: str) -> str:
            seen.append(value)
            raise ValueError("there are no bikes on this day")

    with pytest.raises(instructor.core.InstructorRetryException, match="no bikes"):
        ask(client, "TOOLS", Picky, BIKE, max_retries=2)
    assert len(seen) >= 2
