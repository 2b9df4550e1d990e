"""Our side: what it times, the tokens it dictates to the others, the experts it counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import mixtral
from mixtral.bench.ours import Ours
from mixtral.bench.random_model import create_model
from mixtral.bench.work import Work
from mixtral.config import MixtralConfig


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_config: MixtralConfig) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        create_model(tiny_config, folder, form="f32", name="n", vocabulary=lambda size: {})
    return folder


def prepared(path: Path, work: Work, turns: int = 2) -> tuple[Ours, list[list[int]]]:
    side, prompts = Ours({"model": str(path), "threads": 1}), work.prompts(0, 320)
    side.prepare({**work.to_json(), "cells": work.cells(turns)}, prompts if work.kind == "context" else [])
    return side, prompts


def test_packed_weights_are_kept(tiny_config: MixtralConfig, tmp_path: Path) -> None:
    config = tiny_config.replace(hidden_size=256, intermediate_size=256, head_dim=64)
    made = create_model(config, tmp_path / "m.gguf", form="q4_k_s", name="n", vocabulary=lambda size: {})
    Ours({"model": str(made.path), "threads": 1, "packed_cache": str(tmp_path / "cache")})
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def plausible(found: dict[str, Any], steps: int) -> None:
    assert len(found["seconds"]) == steps
    assert all(0 < seconds < 10 for seconds in found["seconds"])


def test_a_prompt_is_timed_to_its_first_token(path: Path) -> None:
    side, prompts = prepared(path, Work("prefill", 100, 1, 0))
    found = side.run(prompts, [])
    plausible(found, 1)
    assert found["fed"] == []
    assert found["experts"] == [4.0, 4.0]  # of 100 tokens, all are used
    assert side.llm.generator.pages_in_use == 0


def test_tokens_are_the_greedy_ones_and_each_step_is_timed(path: Path) -> None:
    work = Work("batch", 8, 3, 5)
    side, _ = prepared(path, work)
    llm = mixtral.load(path)
    for turn in range(2):
        prompts = work.prompts(turn, 320)
        found = side.run(prompts, [])
        plausible(found, 5)
        expected = [one.ids for one in llm.generate(prompts, max_tokens=6, temperature=0, stop_ids=())]
        # The last token of each is chosen, but never read.
        assert found["fed"] == [[ids[step] for ids in expected] for step in range(5)]
        assert all(2 <= count <= 4 for count in found["experts"])


def test_one_sequence_uses_two_experts_in_every_layer(path: Path) -> None:
    side, prompts = prepared(path, Work("decode", 8, 1, 4))
    assert side.run(prompts, [])["experts"] == [2.0, 2.0]


def test_a_context_goes_on_from_where_it_was(path: Path) -> None:
    work = Work("context", 40, 1, 4)
    side, prompts = prepared(path, work)
    rows = [row for _ in range(3) for row in side.run([], [])["fed"]]  # the warm-up and two turns
    expected = mixtral.load(path).generate(prompts[0], max_tokens=13, temperature=0, stop_ids=()).ids
    assert [id for (id,) in rows] == expected[:12]


def test_it_says_what_it_is(path: Path) -> None:
    side, _ = prepared(path, Work("decode", 8, 1, 1))
    assert side.versions().keys() == {"mixtral", "torch", "kernels"}
    with pytest.raises(RuntimeError, match="nothing was prepared"):
        side._next()
