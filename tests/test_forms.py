"""Constrained answers of the Python API: forms, calls by ``tool_choice``, what is refused, a server writes the same."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling import validate
from threaded import serving_model

import mixtral
from mixtral.config import MixtralConfig
from mixtral.errors import GrammarError, MatcherError, MessagesError, MixtralError, RequestError, TokenizerError
from mixtral.forms import Forms
from mixtral.grammar import Grammar
from mixtral.model.mixtral import Mixtral
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint, SamplingParams

CONFIG = MixtralConfig(
    vocab_size=32768,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=512,
)
USER = {"role": "user", "content": "When does breakfast start?"}
SCHEMA = {
    "type": "object",
    "properties": {"day": {"enum": ["Monday", "Friday"]}, "at": {"type": "integer", "minimum": 0, "maximum": 23}},
    "required": ["day", "at"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS = [
    {"type": "function", "function": {"name": "hours", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
CALLS = 5  # the id that opens function calls


@pytest.fixture(scope="module")
def llm() -> mixtral.LLM:
    generator = torch.Generator().manual_seed(1)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return mixtral.LLM(model, Tokenizer.from_version("v3"), name="random")


def is_json(text: str) -> bool:
    return isinstance(json.loads(text), dict)


FORMS: list[tuple[dict[str, Any], Any]] = [
    (JSON, lambda text: validate(SCHEMA, text) is None),
    ({"type": "regex", "regex": r" ?[0-9]{4}-[0-9]{2}"}, lambda text: re.fullmatch(r" ?[0-9]{4}-[0-9]{2}", text)),
    ({"type": "choice", "choice": ["yes", "no", "vielleicht"]}, lambda text: text in ("yes", "no", "vielleicht")),
    (
        {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "(" start? ")" | "x"'}},
        lambda text: re.fullmatch(r"\(*x?\)*", text),
    ),
]


@pytest.mark.parametrize(("form", "fits"), FORMS)
def test_every_finished_answer_has_the_form(llm: mixtral.LLM, form: dict[str, Any], fits: Any) -> None:
    found = [llm.generate("hello", response_format=form, max_tokens=120, seed=seed) for seed in range(8)]
    turns = [llm.chat([USER], response_format=form, max_tokens=120, seed=seed) for seed in range(8)]
    ended = [one.text for one in found if one.finish_reason == "stop"]
    ended += [turn.content for turn in turns if turn.finish_reason == "stop"]
    assert len(ended) >= 8
    for text in ended:
        assert fits(text), text


def test_any_object_is_json(llm: mixtral.LLM) -> None:
    # A random model seldom ends an object of its own accord; a high weight of the brace helps.
    brace = llm.tokenizer.encode("x}")[-1]
    found = llm.generate("x", response_format={"type": "json_object"}, max_tokens=200, logit_bias={brace: 20.0}, seed=1)
    assert found.finish_reason == "stop"
    assert is_json(found.text)


def test_free_text_is_what_it_is_without(llm: mixtral.LLM) -> None:
    free = llm.generate("hello", temperature=0.0, max_tokens=9)
    assert llm.generate("hello", temperature=0.0, max_tokens=9, response_format={"type": "text"}).ids == free.ids


def test_a_batch_and_a_stream_are_constrained_alike(llm: mixtral.LLM) -> None:
    prompts = ["one", "two", "three"]
    options: dict[str, Any] = {"response_format": JSON, "seed": 3, "max_tokens": 80}
    whole = llm.generate(prompts, **options)
    parts = ["", "", ""]
    for delta in llm.generate(prompts, stream=True, **options):
        parts[delta.sequence] += delta.text
    assert parts == [one.text for one in whole]
    for one in whole:
        if one.finish_reason == "stop":
            validate(SCHEMA, one.text)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "most", "names"),
    [
        ({"tool_choice": "required"}, 128, {"hours", "now"}),
        ({"tool_choice": "any", "parallel_tool_calls": False}, 1, {"hours", "now"}),
        ({"tool_choice": {"type": "function", "function": {"name": "hours"}}}, 1, {"hours"}),
        ({"logit_bias": {CALLS: 100.0}}, 128, {"hours", "now"}),
    ],
)
def test_calls_are_valid(llm: mixtral.LLM, fields: dict[str, Any], most: int, names: set[str], stream: bool) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    seen = 0
    for seed in range(6):
        options: dict[str, Any] = {"max_tokens": 300, "seed": seed, **fields}
        if stream:
            turn: Any = list(llm.chat([USER], tools=TOOLS, stream=True, **options))[-1]
        else:
            turn = llm.chat([USER], tools=TOOLS, **options)
        if turn.finish_reason == "length":
            continue
        assert turn.finish_reason == "tool_calls"
        assert 1 <= len(turn.tool_calls) <= most
        for call in turn.tool_calls:
            assert call.name in names
            validate(schemas[call.name], call.arguments)
            assert re.fullmatch("[0-9A-Za-z]{9}", call.id)
        seen += len(turn.tool_calls)
    assert seen >= 3


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"response_format": JSON}])
def test_no_calls_where_none_are_asked_for(llm: mixtral.LLM, fields: dict[str, Any]) -> None:
    turn = llm.chat([USER], temperature=0.0, max_tokens=40, logit_bias={CALLS: 100.0}, **fields)
    assert turn.tool_calls == []
    assert turn.content


def test_a_form_beside_tools_is_for_the_text(llm: mixtral.LLM) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "response_format": JSON, "max_tokens": 120, "seed": 1}
    text = llm.chat([USER], logit_bias={CALLS: -100.0}, **options)
    if text.finish_reason == "stop":
        validate(SCHEMA, text.content)
    calls = llm.chat([USER], logit_bias={CALLS: 100.0}, **options)
    assert calls.content == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": JSON, "stop": ["x"]}, "stop"),
        ({"response_format": JSON, "min_tokens": 2}, "min_tokens"),
        ({"response_format": JSON, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": JSON, "stop_ids": (7,)}, "stop_ids"),
        ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": JSON}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "prefix": True}], "tools": TOOLS,
        "tool_choice": "required"}, "tool_choice"),
        *(({"messages": [USER, {"role": "assistant", "content": "a", "prefix": True}], "response_format": form},
        "response_format") for form, _ in FORMS),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(llm: mixtral.LLM, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as error:
        llm.chat(**{"messages": [USER], **fields})
    assert (error.value.code, error.value.param) == ("unsupported_combination", param)


def test_a_continued_message_may_be_text(llm: mixtral.LLM) -> None:
    messages = [USER, {"role": "assistant", "content": "a", "prefix": True}]
    free = llm.chat(messages, temperature=0.0, max_tokens=9)
    assert llm.chat(messages, temperature=0.0, max_tokens=9, response_format={"type": "text"}).content == free.content


@pytest.mark.parametrize("choice", ["maybe", 1, {"type": "function"}, {"type": "x", "function": {"name": "hours"}}])
def test_an_unknown_tool_choice_is_refused(llm: mixtral.LLM, choice: Any) -> None:
    with pytest.raises(RequestError, match="expected") as error:
        llm.chat([USER], tools=TOOLS, tool_choice=choice)
    assert error.value.param == "tool_choice"
    with pytest.raises(MessagesError, match="no function 'other'"):
        llm.chat([USER], tools=TOOLS, tool_choice={"type": "function", "function": {"name": "other"}})


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}, "schema_unsupported"),
        ({"type": "regex", "regex": "("}, "regex_invalid"),
        ({"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: x"}}, "grammar_invalid"),
        ({"type": "regex", "regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"}, "grammar_too_complex"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_before_a_token(
    llm: mixtral.LLM, form: dict[str, Any], code: str
) -> None:
    for call in (lambda: llm.generate("x", response_format=form), lambda: llm.chat([USER], response_format=form)):
        with pytest.raises(GrammarError) as error:
            call()
        assert error.value.code == code
        assert str(error.value.param).startswith("response_format")
    assert llm.generator.pages_in_use == 0


def test_without_a_tokenizer_there_are_no_forms() -> None:
    llm = mixtral.LLM(Mixtral(CONFIG.replace(vocab_size=300)), None, name="ids")
    with pytest.raises(TokenizerError, match="300 entries"):
        llm.generate([1], response_format=JSON)


def test_trials_end_with_their_owner() -> None:
    forms = Forms(Tokenizer.from_version("v3"))
    params = SamplingParams(max_tokens=9)
    assert forms.of_text({"type": "text"}, params, ()) is None
    assert forms._guard.pids() == []
    assert forms.of_text(JSON, params, ()) is not None
    (pid,) = forms._guard.pids()
    assert Path(f"/proc/{pid}").exists()
    forms.close()
    assert not Path(f"/proc/{pid}").exists()
    assert forms.of_text({"type": "regex", "regex": "new"}, params, ()) is not None
    (pid,) = forms._guard.pids()
    del forms
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


def test_a_plain_turn_needs_no_grammar() -> None:
    forms, grammar = Forms(Tokenizer.from_version("v3")), Grammar(Tokenizer.from_version("v3"))
    constraint = Constraint(trigger=CALLS)
    light, full = forms.matcher(constraint), grammar.matcher(constraint)
    assert "_grammar" not in vars(forms)
    masks = np.zeros((2, 1024), dtype=np.uint32)
    for id in (100, 200):
        for matcher, mask in zip((light, full), masks, strict=True):
            matcher.mask(mask)
            matcher.advance(id)
        assert np.array_equal(*masks)
    assert not light.finished
    for matcher in (light, full):
        with pytest.raises(MatcherError):
            matcher.advance(CALLS)


@pytest.fixture(scope="module")
def bodies() -> list[dict[str, Any]]:
    forms: list[dict[str, Any]] = [{"response_format": form} for form, _ in FORMS]
    forms += [{}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}]
    forms += [{"tools": TOOLS, "tool_choice": "any", "parallel_tool_calls": False}]
    return forms


@pytest.mark.slow
def test_the_server_writes_the_same(llm: mixtral.LLM, bodies: list[dict[str, Any]]) -> None:
    with serving_model(llm, constrained=True) as client:
        for seed, fields in enumerate(bodies * 2):
            ours = llm.chat([USER], seed=seed, max_tokens=90, **fields)
            body = {"model": "random", "messages": [USER], "seed": seed, "max_tokens": 90, **fields}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            (theirs,) = answer.json()["choices"]
            assert theirs["finish_reason"] == ours.finish_reason
            calls = [(call["function"]["name"], call["function"]["arguments"]) for call in _calls(theirs)]
            if ours.finish_reason != "length":
                assert (theirs["message"]["content"] or "") == ours.content
                assert calls == [(call.name, call.arguments) for call in ours.tool_calls]


def _calls(choice: Mapping[str, Any]) -> list[Any]:
    return list(choice["message"].get("tool_calls") or [])


def test_a_grammar_that_fails_in_the_middle_ends_its_answer(llm: mixtral.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(constraint: Any) -> Any:
        raise MatcherError("a planted fault")

    assert llm._forms is not None
    monkeypatch.setattr(llm._forms, "matcher", broken)
    with pytest.raises(MixtralError, match="planted") as error:
        llm.generate("x", response_format=JSON)
    assert error.value.code == "grammar_failed"
    monkeypatch.undo()
    assert llm.generate("x", temperature=0.0, max_tokens=3).ids
    assert llm.generator.pages_in_use == 0


def test_two_streams_do_not_share_their_place(llm: mixtral.LLM) -> None:
    options: dict[str, Any] = {"response_format": JSON, "max_tokens": 80, "stream": True}
    alone = ["".join(d.text for d in llm.generate("x", seed=seed, **options)) for seed in (1, 2)]
    first: Iterator[Any] = llm.generate("x", seed=1, **options)
    second: Iterator[Any] = llm.generate("x", seed=2, **options)
    texts = ["", ""]
    for _ in range(80):
        for place, stream in enumerate((first, second)):
            texts[place] += "".join(delta.text for delta in [next(stream, None)] if delta is not None)
    assert texts == alone
