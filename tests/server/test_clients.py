"""The official OpenAI client against a real server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pydantic
import pytest
from fake import MESSAGES, FakeEngine, FakeGrammar, calling, listening, wait_until

from mixtral.server import ServerConfig

TOOL = {"type": "function", "function": {"name": "get_hours", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeEngine, openai.OpenAI]]:
    engine = FakeEngine()
    grammar = FakeGrammar()
    with (
        listening(engine, grammar=grammar) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield engine, client


@pytest.fixture
def engine(shared: tuple[FakeEngine, openai.OpenAI]) -> FakeEngine:
    shared[0].reply, shared[0].fails_after = "Frühstück: 07:00 🥐.", None
    return shared[0]


@pytest.fixture
def client(shared: tuple[FakeEngine, openai.OpenAI], engine: FakeEngine) -> openai.OpenAI:
    return shared[1]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "mixtral"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        temperature=0.5,
        seed=1,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].message.content == "Frühstück: 07:00 🥐."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    listed = answer.choices[0].logprobs
    assert listed is not None
    assert listed.content is not None
    assert all(len(token.top_logprobs) == 2 for token in listed.content)


def test_streamed_chat(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        stream=True,
        stream_options=options,
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Frühstück: 07:00 🥐."
    assert chunks[-1].usage.completion_tokens > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["stop"]


def test_the_streaming_helper_rebuilds_the_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = calling(engine.tokenizer)
    with client.chat.completions.stream(model="fake", messages=MESSAGES, tools=[TOOL]) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_hours", '{"place": "Castle"}')


def test_a_round_of_function_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = calling(engine.tokenizer)
    first = client.chat.completions.create(model="fake", messages=MESSAGES, tools=[TOOL])
    message = first.choices[0].message
    call = (message.tool_calls or [])[0]
    engine.reply = "It opens at nine."
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"open": "09:00"}'}
    second = client.chat.completions.create(
        model="fake",
        messages=[*MESSAGES, message.model_dump(), result],
        tools=[TOOL],
    )
    assert second.choices[0].message.content == "It opens at nine."
    sent = engine.tokenizer.decode(engine.prompts[-1])
    assert call.id in sent
    assert "09:00" in sent


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["One", "Two"], max_tokens=30, stop=["🥐"], logprobs=1)
    assert [choice.text for choice in answer.choices] == [" Frühstück: 07:00 "] * 2
    with client.completions.create(model="fake", prompt=[5, 6], max_tokens=30, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == " Frühstück: 07:00 🥐."


def test_errors_have_their_types(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=MESSAGES, store=True)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "store")
    engine.fails_after = engine.tokens + 2
    stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == "internal_error"


def test_extensions_go_through_extra_body(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    client.chat.completions.create(model="fake", messages=MESSAGES, extra_body=extra)
    params = engine.params[-1]
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.1)


def test_several_answers_and_sampling_fields(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        n=3,
        logit_bias={"5": -100},
        seed=7,
        user="ann",
        safety_identifier="ann",
        prompt_cache_key="desk",
        presence_penalty=0.5,
        stop=["never"],
        max_completion_tokens=40,
        extra_body={"min_tokens": 2, "priority": -1},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.system_fingerprint == "fp_fake"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    submit = engine.submits[-1]
    assert (submit.n, submit.priority, submit.params.min_tokens) == (3, -1, 2)
    assert submit.params.logit_bias == {5: -100.0}


class Hours(pydantic.BaseModel):
    place: str
    open: int


def test_parsed_answers(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = '{"place": "Castle", "open": 9}'
    answer = client.chat.completions.parse(model="fake", messages=MESSAGES, response_format=Hours)
    assert answer.choices[0].message.parsed == Hours(place="Castle", open=9)
    constraint = engine.submits[-1].constraint
    assert constraint is not None
    assert json.loads(constraint.text or "")["json_schema"]["strict"] is True
    with client.chat.completions.stream(model="fake", messages=MESSAGES, response_format=Hours) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Hours(place="Castle", open=9)


def test_parsed_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = calling(engine.tokenizer, '[{"name": "Hours", "arguments": {"place": "Castle", "open": 9}}]')
    tool = openai.pydantic_function_tool(Hours)
    with client.chat.completions.stream(
        model="fake", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Hours(place="Castle", open=9)
    constraint = engine.submits[-1].constraint
    assert constraint is not None
    assert constraint.forced


def test_a_named_function(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.reply = calling(engine.tokenizer)
    named = {"type": "function", "function": {"name": "get_hours"}}
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, tools=[TOOL], tool_choice=named)
    assert answer.choices[0].finish_reason == "tool_calls"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="fake", messages=MESSAGES, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "b"}}
        )
    assert caught.value.param == "tool_choice.function.name"


def test_scored_prompts(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="fake", prompt=[1, 5, 6, 7], max_tokens=1, echo=True, logprobs=1)
    listed = answer.choices[0].logprobs
    assert listed is not None
    assert listed.token_logprobs == [None, -1.5, -1.5, -1.5, -0.5]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_routing_beside_the_answer(client: openai.OpenAI) -> None:
    extra = {"mixtral": {"routing": "weights"}}
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, extra_body=extra)
    assert answer.model_extra is not None
    assert answer.model_extra["mixtral"]["routing"][0]["shape"][1:] == [4, 2]
    with client.chat.completions.create(model="fake", messages=MESSAGES, extra_body=extra, stream=True) as stream:
        told = [
            chunk.model_extra["mixtral"] for chunk in stream if chunk.model_extra and "mixtral" in chunk.model_extra
        ]
    assert len(told) > 3


def test_full_servers_are_tried_again() -> None:
    engine = FakeEngine("Yes.")
    engine.hold = threading.Event()
    with listening(engine, ServerConfig(port=0, queue_size=1, drain_s=1.0)) as address:
        patient = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=5)
        with patient, ThreadPoolExecutor(max_workers=4) as pool:
            asked = [
                pool.submit(patient.chat.completions.create, model="fake", messages=MESSAGES)  # type: ignore[arg-type]
                for _ in range(4)
            ]
            try:
                wait_until(lambda: engine.opened == 1)
                time.sleep(0.2)
            finally:
                engine.hold.set()
            assert [each.result().choices[0].message.content for each in asked] == ["Yes."] * 4
