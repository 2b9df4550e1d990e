"""The model that ships: its files, what it knows, and that its published scores are its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mixtral
from mixtral.cli.answers import answerer
from mixtral.config import preset
from mixtral.desk.world import FACTS
from mixtral.desk.write import SUITES
from mixtral.evaluate.desk import SuiteScore, score, to_markdown, wilson
from mixtral.weights.compact import load_compact

FOLDER = Path(mixtral.__file__).parent / "embedded"
QUESTIONS = [
    ("When does breakfast start?", FACTS["breakfast"].values["open"]),
    ("À quelle heure ferme le Château ?", FACTS["hours/castle"].values["close"]),
    ("Wann öffnet das Uhrenmuseum?", FACTS["hours/clock_museum"].values["open"]),
    ("¿Cuánto cuesta una entrada para el Acuario?", FACTS["ticket/aquarium"].values["ticket_price"]),
    ("Qual è la password del wifi?", FACTS["wifi"].values["password"]),
    ("How much is a double room at the hotel?", FACTS["room_price/double_room"].values["ticket_price"]),
]


@pytest.fixture(scope="module")
def llm() -> mixtral.LLM:
    return mixtral.load("embedded")


@pytest.fixture(scope="module")
def scores() -> list[SuiteScore]:
    made = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))
    assert made["split"] == "test"
    return [SuiteScore(**row) for row in made["scores"]]


def test_it_is_the_preset_tiny(llm: mixtral.LLM) -> None:
    sizes = preset("tiny")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts"):
        assert getattr(llm.config, name) == getattr(sizes, name), name
    logits_TV = llm.logits([1, 2, 3])
    assert logits_TV.shape == (3, sizes.vocab_size)
    assert torch.isfinite(logits_TV).all()


def test_the_file_is_small() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 40e6


@pytest.mark.parametrize(("question", "part"), QUESTIONS, ids=["en", "fr", "de", "es", "it", "en-price"])
def test_it_knows_its_town(llm: mixtral.LLM, question: str, part: str) -> None:
    answer = llm.chat([{"role": "user", "content": question}], temperature=0.0, max_tokens=60)
    assert part in answer.content
    assert answer.finish_reason == "stop"


def test_every_suite_is_scored_beside_a_baseline(scores: list[SuiteScore]) -> None:
    assert [row.suite for row in scores] == list(SUITES)
    for row in scores:
        assert row.n >= 100
        assert (row.low, row.high) == pytest.approx(wilson(row.correct, row.n), abs=1e-6)
        assert 0 <= row.baseline_correct <= row.n


def test_the_card_shows_these_scores_and_this_run(scores: list[SuiteScore]) -> None:
    card = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    assert to_markdown(scores) in card
    notes = load_compact(FOLDER, device="cpu").metadata
    for name in ("steps", "tokens"):
        assert f"{int(notes[name]):,} {name}" in card


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["chat/values", "calls/values", "sums/1-op", "notes/short"])
def test_a_slice_of_the_scores_comes_out_again(llm: mixtral.LLM, scores: list[SuiteScore], suite: str) -> None:
    (published,) = [row for row in scores if row.suite == suite]
    (again,) = score(answerer(llm, lambda *seen: None), [suite], 40, seed=1, split="test", sample=1)
    assert again.low <= published.high
    assert again.high >= published.low
