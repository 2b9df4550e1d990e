"""Answers that real engines write under random schemas and calls of functions: what ends is valid, by another program.

With random weights, which know no JSON, and with the embedded model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from random_schemas import random_schema, random_tools
from sampling import validate
from threaded import serving_model

import mixtral
from mixtral.config import MixtralConfig
from mixtral.desk.calls import calls as desk_calls
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.errors import GrammarError
from mixtral.grammar import Grammar, calls_constraint, text_constraint
from mixtral.model.mixtral import Mixtral
from mixtral.tokenizer import Tokenizer, encode_chat, parse_calls
from mixtral.wire import Constraint, Failed, SamplingParams, Submit, Tokens

CALLS = 5  # the id that opens function calls
TINY = MixtralConfig(
    vocab_size=32768,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=2048,
)
Check = Callable[[list[int], str], None]


def loaded(name: str) -> mixtral.LLM:
    """The embedded model, or one of random weights."""
    if name == "embedded":
        return mixtral.load("embedded")
    generator = torch.Generator().manual_seed(1)
    model = Mixtral(TINY, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return mixtral.LLM(model, Tokenizer.from_version("v3"), name="random")


@dataclass
class Found:
    """How many answers ended, were cut, and could not be asked for; and how many calls there were."""

    ended: int = 0
    cut: int = 0
    refused: int = 0
    calls: int = 0
    names: set[str] = field(default_factory=set)


class Driver:
    """Runs requests of ``n`` answers each on one engine, some at a time, and checks those that end."""

    def __init__(self, name: str, n: int, *, at_once: int = 8) -> None:
        llm = loaded(name)
        self.tokenizer = llm.tokenizer
        self.engine = Engine(llm.generator.model, EngineConfig(cache_bytes=64 << 20), Grammar(self.tokenizer))
        self.found = Found()
        self._n, self._at_once = n, at_once
        # Random weights seldom close what they opened: those tokens are made likelier.
        closing = ['"', "}", "]", '"}', '"]', "}]", '",', ","]
        ids = range(3, self.tokenizer.vocab_size)
        self._bias = {}
        if name == "random":
            self._bias = {id: 12.0 for id in ids if self.tokenizer.token_bytes(id).decode("latin-1") in closing}
            self._bias[self.tokenizer.eos_id] = 16.0
        self._open: dict[str, tuple[Check, dict[int, list[int]]]] = {}

    def ask(self, name: str, prompt: list[int], constraint: Constraint, seed: int, check: Check) -> None:
        """Put a request in; earlier ones are worked on when there are too many."""
        params = SamplingParams(max_tokens=200, temperature=1.0, seed=seed, logit_bias=self._bias)
        self._open[name] = (check, {})
        self.engine.submit(Submit(request=name, prompts=[prompt], params=params, n=self._n, constraint=constraint))
        while len(self._open) >= self._at_once:
            self._step()

    def finish(self) -> Found:
        """Work until nothing is left."""
        while self.engine.has_work:
            self._step()
        assert not self._open
        assert self.engine.stats().pages_used == 0
        return self.found

    def _step(self) -> None:
        for update in self.engine.step():
            if isinstance(update, Failed):
                raise AssertionError(f"{update.request}: {update.code} {update.message}")
            if isinstance(update, Tokens):
                check, written = self._open[update.request]
                for event in update.events:
                    written.setdefault(event.sequence, []).append(event.id)
                    if event.finish_reason == "stop":
                        self.found.ended += 1
                        check(written[event.sequence], event.finish_reason)
                    elif event.finish_reason == "length":
                        self.found.cut += 1
                if all(each for each in written.values()) and not self.engine.is_open(update.request):
                    del self._open[update.request]


def source_of(schema: Any) -> str:
    found = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert found is not None
    return found.text


def check_schemas(name: str, seeds: range, *, validated: Callable[[Any, str], None] = validate) -> Found:
    """Four answers to each random schema."""
    driver = Driver(name, 4)
    for seed in seeds:
        schema = random_schema(seed)
        text = f"Room 12, Greta Ramos, 2026-09-21.\n\nTurn this text into JSON.\n\nSchema: {json.dumps(schema)}"
        prompt = encode_chat(driver.tokenizer, [{"role": "user", "content": text[:1500]}]).ids
        constraint = Constraint(text=source_of(schema), trigger=CALLS)
        try:
            driver.engine._grammar.matcher(constraint)  # type: ignore[union-attr]
        except GrammarError:
            driver.found.refused += 1
            continue

        def check(ids: list[int], reason: str, schema: Any = schema) -> None:
            validated(schema, driver.tokenizer.decode(ids))

        driver.ask(f"{seed}", prompt, constraint, seed, check)
    return driver.finish()


def check_calls(name: str, seeds: range, *, wanted: int) -> Found:
    """Four answers to each set of functions, in all modes, until there were ``wanted`` calls."""
    driver = Driver(name, 4)
    for seed in seeds:
        tools, messages = offer(seed)
        first = tools[0]["function"]["name"]
        mode = ("auto", "required", "named")[seed % 3]
        parallel = seed % 2 == 0
        try:
            source = calls_constraint(tools, name=first if mode == "named" else None, parallel=parallel)
            constraint = Constraint(calls=source.text, trigger=CALLS, forced=mode != "auto")
            driver.engine._grammar.matcher(constraint)  # type: ignore[union-attr]
        except GrammarError:
            driver.found.refused += 1
            continue

        def check(
            ids: list[int], reason: str, tools: Any = tools, mode: str = mode, most: int = 128 if parallel else 1
        ) -> None:
            content, found = parse_calls(driver.tokenizer, ids[:-1], salt="x")
            if mode == "auto" and ids[0] != CALLS:
                assert found == []
                return
            assert content == ""
            assert 1 <= len(found) <= (1 if mode == "named" else most)
            schemas = {each["function"]["name"]: each["function"].get("parameters") for each in tools}
            for call in found:
                assert mode != "named" or call.name == tools[0]["function"]["name"]
                validate(schemas[call.name] or {"maxProperties": 0}, call.arguments)
                assert re.fullmatch("[0-9A-Za-z]{9}", call.id)
            assert len({call.id for call in found}) == len(found)
            driver.found.calls += len(found)
            driver.found.names |= {mode}

        driver.ask(f"{seed}", encode_chat(driver.tokenizer, messages, tools).ids, constraint, seed, check)
        if driver.found.calls >= wanted:
            break
    return driver.finish()


def offer(seed: int) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """Functions and a conversation: those of the town desk, every third time random ones."""
    document = desk_calls(0, "train", seed)
    messages = [{key: value for key, value in one.items() if key != "weight"} for one in document.messages[:1]]
    if messages[0]["role"] != "user":
        messages = [{"role": "user", "content": "Please book a table for two."}]
    return (random_tools(seed) if seed % 3 == 2 else list(document.tools)), messages


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["random", pytest.param("embedded", marks=pytest.mark.slow)])
def test_answers_to_random_schemas_are_valid(name: str) -> None:
    found = check_schemas(name, range(6))
    assert found.ended >= 12, found


@pytest.mark.parametrize("name", ["random", pytest.param("embedded", marks=pytest.mark.slow)])
def test_calls_of_functions_are_valid(name: str) -> None:
    found = check_calls(name, range(12), wanted=10)
    assert found.calls >= 10, found


def test_an_invalid_answer_is_seen() -> None:
    def planted(schema: Any, text: str) -> None:
        validate({"const": "something else"}, text)

    with pytest.raises(Exception, match="was expected"):
        check_schemas("random", range(6), validated=planted)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ["random", "embedded"])
def test_answers_to_500_random_schemas_are_valid(name: str) -> None:
    """2,000 answers."""
    found = check_schemas(name, range(500))
    print(found)
    assert found.ended + found.cut + 4 * found.refused == 2000
    assert found.ended >= 1500
    assert found.refused <= 15


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_calls_of_functions_are_valid() -> None:
    found = check_calls("embedded", range(100_000), wanted=10_000)
    print(found)
    assert found.calls >= 10_000
    assert found.names == {"auto", "required", "named"}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_answers_over_http_are_valid() -> None:
    """The same through the server: 60 schemas, four answers each, and 60 sets of functions."""
    ended = calls = 0
    with serving_model(loaded("embedded"), constrained=True) as client:
        for seed in range(60):
            schema, (tools, messages) = random_schema(seed), offer(seed)
            asked: dict[str, Any] = {"model": "embedded", "max_tokens": 200, "seed": seed, "n": 4}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {**asked, "messages": [{"role": "user", "content": "JSON"}], "response_format": form}
            answer = client.post("/v1/chat/completions", json=body)
            if answer.status_code == 200:
                for choice in answer.json()["choices"]:
                    if choice["finish_reason"] == "stop":
                        ended += 1
                        validate(schema, choice["message"]["content"])
            else:
                assert answer.json()["error"]["code"] in ("schema_unsupported", "grammar_too_complex"), answer.text
            body = {**asked, "messages": messages, "tools": tools, "tool_choice": "required"}
            answer = client.post("/v1/chat/completions", json=body)
            if answer.status_code != 200:
                assert answer.json()["error"]["code"] in ("schema_unsupported", "grammar_too_complex"), answer.text
                continue
            schemas = {each["function"]["name"]: each["function"].get("parameters") for each in tools}
            for choice in answer.json()["choices"]:
                for call in choice["message"].get("tool_calls", []) if choice["finish_reason"] != "length" else []:
                    calls += 1
                    assert re.fullmatch("[0-9A-Za-z]{9}", call["id"])
                    validate(schemas[call["function"]["name"]] or {"maxProperties": 0}, call["function"]["arguments"])
    print(ended, "answers and", calls, "calls over HTTP")
    assert ended >= 150
    assert calls >= 150
