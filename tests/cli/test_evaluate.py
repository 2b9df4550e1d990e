"""``evaluate`` on a tiny model, and what counts as an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from mixtral.cli import answers, main
from mixtral.config import MixtralConfig
from mixtral.desk.verify import check
from mixtral.desk.write import suite_documents
from mixtral.errors import CapacityError
from mixtral.evaluate.desk import Answer
from mixtral.model import Mixtral, initialise
from mixtral.results import ChatCompletion, Usage
from mixtral.tokenizer import Tokenizer, ToolCall
from mixtral.weights import save_model

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32768,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Mixtral(CONFIG, dtype=torch.float32)
    initialise(model, seed=1, std=0.3)
    folder = tmp_path_factory.mktemp("models") / "town"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> mixtral.LLM:
    return mixtral.load(folder)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_TOKENS", 8)


def test_table_on_standard_output_and_json_in_a_file(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "scores.json"
    options = ["--suite", "sums/2-op", "--suite", "calls/values", "--count", "2", "--json", str(path)]
    assert main(["evaluate", "--model", str(folder), *options]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("| suite | n |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| sums/2-op", "| calls/values"]
    assert captured.err.splitlines() == ["sums/2-op: 2 of 2 answered", "calls/values: 2 of 2 answered"]
    made = json.loads(path.read_text())
    assert (made["split"], made["seed"]) == ("validation", 1)
    rows = made["scores"]
    assert [(row["suite"], row["n"]) for row in rows] == [("sums/2-op", 2), ("calls/values", 2)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_scores_that_cannot_be_written_are_shown_all_the_same(folder: Path, capsys: Capture) -> None:
    options = ["--suite", "sums/2-op", "--count", "1", "--json", "/dev/full"]
    assert main(["evaluate", "--model", str(folder), *options]) == 2
    captured = capsys.readouterr()
    assert "| sums/2-op | 1 |" in captured.out
    assert captured.err.splitlines()[1:] == ["mixtral: error: /dev/full: cannot be written (No space left on device)"]


def test_finished_suites_are_shown_also_after_an_error(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    small = tmp_path / "small"
    shutil.copytree(folder, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    path = tmp_path / "scores.json"
    options = ["--suite", "sums/1-op", "--suite", "notes/1024", "--count", "1", "--json", str(path)]
    assert main(["evaluate", "--model", str(small), *options]) == 2
    captured = capsys.readouterr()
    assert [line.split(" | ")[0] for line in captured.out.splitlines()[2:]] == ["| sums/1-op"]
    assert "mixtral: error: the conversation needs at least" in captured.err
    assert not path.exists()


def test_batches_answer_as_chat_does_one_by_one(llm: mixtral.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "BATCH", 2)
    documents = suite_documents("sums/2-op", 3, seed=5, split="test")
    heard: list[tuple[str, int, int]] = []
    found = answers.answerer(llm, lambda *batch: heard.append(batch))(documents)
    assert heard == [("sums/2-op", 2, 3), ("sums/2-op", 3, 3)]
    single = [llm.chat(document.messages[:-1], temperature=0, max_tokens=8).content for document in documents]
    assert [answer.text for answer in found] == single
    assert len(set(single)) > 1


def test_the_written_call_of_a_document_is_right(llm: mixtral.LLM) -> None:
    document = suite_documents("calls/values", 1, seed=1, split="validation")[0]
    calls = [
        {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        for call in document.messages[-1]["tool_calls"]
    ]
    ids = [llm.tokenizer.control_id("[TOOL_CALLS]"), *llm.tokenizer.encode(json.dumps(calls)), Tokenizer.eos_id]
    answer = answers.read_answer(llm, ids, ended=True)
    assert check(document, answer.text, answer.calls)
    cut = answers.read_answer(llm, ids, ended=False)
    assert not check(document, cut.text, cut.calls)


@pytest.mark.parametrize("written", ['[{"name": "f", "arg', "hello", "[]", '[{"arguments": {}}]'])
def test_malformed_calls_are_wrong_also_where_no_call_is_wanted(written: str, llm: mixtral.LLM) -> None:
    document = suite_documents("sums/2-op", 1, seed=1, split="validation")[0]
    reply = document.messages[-1]["content"]
    assert check(document, reply, ())
    before = llm.tokenizer.encode(reply)
    ids = [*before, llm.tokenizer.control_id("[TOOL_CALLS]"), *llm.tokenizer.encode(written), Tokenizer.eos_id]
    answer = answers.read_answer(llm, ids, ended=True)
    assert not check(document, answer.text, answer.calls)
    plain = answers.read_answer(llm, [*before, Tokenizer.eos_id], ended=True)
    assert check(document, plain.text, plain.calls)


def test_a_prompt_that_fills_the_context_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixtral(CONFIG.replace(max_position_embeddings=16), dtype=torch.float32)
    initialise(model, seed=1)
    small = mixtral.LLM(model, Tokenizer.from_version("v3"), name="small")
    documents = suite_documents("sums/2-op", 1, seed=1, split="validation")
    with pytest.raises(CapacityError):
        answers.answerer(small, lambda *batch: None)(documents)


def test_answers_vote(llm: mixtral.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["#### 4", "#### 5", "nothing", "#### 5"] * 2)
    drawn: list[int] = []

    def batch(model: object, documents: list[object], seeds: list[int]) -> list[Answer]:
        drawn.extend(seeds)
        return [Answer(next(texts)) for _ in documents]

    monkeypatch.setattr(answers, "_answer_batch", batch)
    documents = suite_documents("sums/2-op", 2, seed=5, split="test")
    found = answers.voter(llm, 4, lambda *told: None)(documents)
    assert [answer.text for answer in found] == ["#### 5", "#### 5"]
    assert drawn == [0, 1, 2, 3] * 2


def test_with_a_grammar_every_answer_is_asked_for_in_its_form() -> None:
    asked: list[dict[str, Any]] = []

    class Model:
        def chat(self, messages: object, **options: Any) -> ChatCompletion:
            asked.append(options)
            call = ToolCall("abcdefghi", "find_room", '{"nights": 2}')
            return ChatCompletion("{}", (call,) if options["tools"] else (), "stop", Usage(1, 1))

    documents = [suite_documents(suite, 1, seed=5, split="test")[0] for suite in ("records/values", "calls/values")]
    found = answers.formed_answerer(Model(), lambda *told: None)(documents)  # type: ignore[arg-type]
    schema = asked[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"].keys() == documents[0].answer["json"].keys()
    assert (asked[0]["tools"], asked[1]["tools"], asked[1]["response_format"]) == (None, documents[1].tools, None)
    assert (found[0].text, found[1].calls) == ("{}", ({"name": "find_room", "arguments": '{"nights": 2}'},))


def test_votes_are_for_sums(capsys: Capture) -> None:
    assert main(["evaluate", "--suite", "chat/values", "--samples", "8"]) == 2
    assert "--samples is for suites of sums" in capsys.readouterr().err
