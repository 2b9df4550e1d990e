"""What models are trained to write is what the grammars allow, token for token: the conversations of the town desk."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest
from safetensors.numpy import load_file
from sampling import allowed, answer, text_of, validate

from mixtral.desk.calls import calls
from mixtral.desk.records import records
from mixtral.desk.source import Document
from mixtral.grammar import Grammar, Guard, calls_constraint, text_constraint
from mixtral.tokenizer import Tokenizer, encode_chat
from mixtral.wire import Constraint


@pytest.fixture(scope="module")
def embedded() -> Grammar:
    """The vocabulary of the model that comes with the package, most of whose ids were never trained."""
    tensors = load_file(str(files("mixtral.embedded") / "model.safetensors"))
    ids, offsets, spelled = (tensors[f"respell.{name}"].tolist() for name in ("ids", "offsets", "pieces"))
    respell = {id: tuple(spelled[offsets[n] : offsets[n + 1]]) for n, id in enumerate(ids)}
    return Grammar(Tokenizer("v3", respell=respell))


def taught(tokenizer: Tokenizer, document: Document) -> list[int]:
    """The ids that a model learns to write in a document."""
    encoded = encode_chat(tokenizer, document.messages, document.tools, for_training=True)
    last = len(encoded.trained) - encoded.trained[::-1].index(False)
    return encoded.ids[last:]


def follow(grammar: Grammar, constraint: Constraint, ids: list[int]) -> None:
    matcher = grammar.matcher(constraint)
    for id in ids:
        assert id in allowed(matcher, grammar.tokenizer), grammar.tokenizer.decode(ids)
        matcher.advance(id)
    assert matcher.finished


@pytest.mark.parametrize("respelled", [False, True])
def test_calls(v3: Grammar, embedded: Grammar, respelled: bool) -> None:
    grammar = embedded if respelled else v3
    trigger = grammar.tokenizer.control_id("[TOOL_CALLS]")
    seen = 0
    for number in range(80):
        document = calls(7, "train", number)
        if not document.messages[-1].get("tool_calls"):
            continue
        seen += 1
        constraint = Constraint(calls=calls_constraint(document.tools).text, trigger=trigger)
        follow(grammar, constraint, taught(grammar.tokenizer, document))
    assert seen > 20


@pytest.mark.parametrize("respelled", [False, True])
def test_records(v3: Grammar, embedded: Grammar, respelled: bool) -> None:
    grammar = embedded if respelled else v3
    free = text_constraint({"type": "json_object"})
    assert free is not None
    seen = 0
    for number in range(60):
        document = records(7, "train", number)
        request = document.messages[0]["content"]
        ids = taught(grammar.tokenizer, document)
        follow(grammar, Constraint(text=free.text), ids)
        if "Schema: " in request:
            seen += 1
            schema = json.loads(request.partition("Schema: ")[2].partition("\n\n")[0])
            source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
            assert source is not None
            follow(grammar, Constraint(text=source.text), ids)
    assert seen > 10


def test_ids_that_were_never_trained_are_masked(embedded: Grammar) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 3}}, "required": ["a"]}
    source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert source is not None
    rare = np.array(sorted(embedded.tokenizer.respell))
    assert len(rare) > 20_000
    matcher = embedded.matcher(Constraint(text=source.text))
    for id in embedded.tokenizer.encode('{"a": "'):
        matcher.advance(id)
    found = allowed(matcher, embedded.tokenizer)
    assert len(found) > 3000
    assert not np.intersect1d(found, rare).size
    for seed in range(20):
        ids = answer(embedded, Constraint(text=source.text), seed)
        if ids is not None:
            assert not set(ids) & set(rare.tolist())
            validate(schema, text_of(embedded.tokenizer, ids))


@pytest.mark.slow
def test_trials_use_the_same_vocabulary(embedded: Grammar) -> None:
    guard = Guard(embedded.tokenizer, workers=1)
    try:
        source = text_constraint({"type": "json_object"})
        assert source is not None
        guard.check(source)
    finally:
        guard.close()
