"""What is small enough to train in a test: two layers of width 32, the desk's documents, and lines of a user."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from nano import DATA, MODEL

from mixtral.config import MixtralConfig
from mixtral.model import Mixtral, initialise
from mixtral.tokenizer import Tokenizer
from mixtral.train.config import DataConfig, PretrainConfig
from mixtral.train.data import choose_trained_ids
from mixtral.weights import save_compact, save_model
from mixtral.weights.names import EMBEDDING, HEAD
from mixtral.weights.vocab import build_respell, expand_rows, row_map

NANO: Mapping[str, dict[str, Any]] = {
    "model": MODEL,
    "data": DATA,
    "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
    "run": {"steps": 6, "save_every": 3, "dtype": "float32", "threads": 1},
}


@pytest.fixture(scope="session")
def nano() -> Callable[..., PretrainConfig]:
    """``nano(data={...}, run={...})``: the nano configuration with some values changed."""

    def make(**changes: dict[str, Any]) -> PretrainConfig:
        tables = {name: table | changes.get(name, {}) for name, table in NANO.items()}
        return PretrainConfig.from_dict(tables, source="nano")

    return make


@pytest.fixture(scope="session")
def trained_ids() -> list[int]:
    config = DataConfig(trained_rows=1400, sample_documents=200)
    return choose_trained_ids(Tokenizer.from_version("v3"), config)


SIZES: Mapping[str, Any] = NANO["model"] | {"intermediate_size": 32, "hidden_size": 32, "max_position_embeddings": 512}


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random float32 model of the v3 vocabulary, ordinary tensors."""
    model = Mixtral(MixtralConfig.from_dict(SIZES))
    initialise(model, seed=3, std=0.1)
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="session")
def compact(tmp_path_factory: pytest.TempPathFactory, trained_ids: list[int]) -> Path:
    """A folder with a random model of shared vocabulary rows, int8 groups."""
    sizes = MixtralConfig.from_dict(SIZES)
    shared = Mixtral(sizes.replace(vocab_size=len(trained_ids) + 1))
    initialise(shared, seed=3, std=0.1)
    row_of_id = row_map(trained_ids, sizes.vocab_size)
    tokenizer = Tokenizer.from_version("v3")
    respell = build_respell([tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], set(trained_ids))
    values = dict(shared.state_dict())
    values |= {name: expand_rows(values[name], row_of_id) for name in (EMBEDDING, HEAD)}
    model = Mixtral(sizes, device="meta")
    model.load_state_dict(values, assign=True)
    folder = tmp_path_factory.mktemp("compact") / "model"
    save_compact(model, folder, row_of_id=row_of_id, respell=respell, metadata={})
    return folder


def question(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"How much are {number} tickets?"}


def answer(number: int) -> dict[str, Any]:
    return {"role": "assistant", "content": f"That is {9 * number} francs."}


Lines = Callable[[str, Sequence[object]], Path]


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """``lines(name, values)``: a JSONL file; a value that is text is a line as it is."""

    def write(name: str, values: Sequence[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def talks(lines: Lines) -> Path:
    """Twelve conversations of different length, one of them with calls."""
    found: list[object] = [
        {"messages": [m for n in range(1 + i % 3) for m in (question(i + n), answer(i + n))]} for i in range(11)
    ]
    return lines("talks.jsonl", [*found, {"messages": WITH_CALLS, "tools": TOOLS}])


@pytest.fixture
def pairs(lines: Lines) -> Path:
    """Ten pairs with answers of different length."""
    return lines(
        "pairs.jsonl",
        [
            {"prompt": [question(i)], "chosen": [answer(i)], "rejected": "I do not know that." * (1 + i % 3)}
            for i in range(10)
        ],
    )


TOOLS: Sequence[dict[str, Any]] = (
    {"type": "function", "function": {"name": "price", "description": "", "parameters": {"type": "object"}}},
)
WITH_CALLS: Sequence[dict[str, Any]] = (
    question(1),
    answer(1),
    {"role": "user", "content": "And for groups?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "VvvODy9mT", "type": "function", "function": {"name": "price", "arguments": '{"people": 20}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "VvvODy9mT", "content": '{"francs": 7}'},
    {"role": "assistant", "content": "Groups pay 7 francs each."},
)


@pytest.fixture(scope="session")
def with_calls() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages with a call in the middle, and the tools."""
    return list(WITH_CALLS), list(TOOLS)
