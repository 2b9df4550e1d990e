"""SFT and DPO over ranks that have the whole model each: the numbers of one process, exact resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from pool import Ranks

from mixtral.config import MixtralConfig
from mixtral.model import Mixtral, initialise
from mixtral.train import checkpoint
from mixtral.weights import save_model

SIZES = {
    "vocab_size": 32768,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
ADAPTER = {"rank": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = Mixtral(MixtralConfig.from_dict(SIZES))
    initialise(model, seed=3, std=0.1)
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(model, folder)
    return str(folder)


def said(number: int) -> list[dict[str, str]]:
    words = " ".join(f"{number + n}" for n in range(1 + number % 5))
    return [{"role": "user", "content": f"Count from {number}."}, {"role": "assistant", "content": words}]


def tables(kind: str, folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Twelve documents or pairs of different length, three of them held out."""
    path = folder / f"{kind}.jsonl"
    if kind == "sft":
        lines: list[dict[str, Any]] = [{"messages": said(number)} for number in range(12)]
    else:
        lines = [{"prompt": said(n)[:1], "chosen": said(n)[1:], "rejected": "No." * (1 + n % 3)} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    found: dict[str, dict[str, Any]] = {
        "data": {
            "train": str(path),
            "validation": str(folder / "held.jsonl"),
            "documents_per_step": 4,
            "max_tokens": 200,
            "tokens_per_part": 40,
        },
        "optim": {"learning_rate": 3e-3, "warmup_steps": 1, "balance_scope": "sequence", "balance_coef": 0.1},
        "run": {"epochs": 1, "save_every": 2, "dtype": "float32", "threads": 1},
    }
    return {name: table | changes.pop(name, {}) for name, table in found.items()} | changes


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sft", {"adapter": ADAPTER}),
        ("dpo", {}),
        pytest.param("sft", {}, marks=pytest.mark.slow),
        pytest.param("dpo", {"adapter": ADAPTER}, marks=pytest.mark.slow),
    ],
    ids=["sft-adapter", "dpo-all", "sft-all", "dpo-adapter"],
)
def test_a_run_on_two_ranks_is_that_of_one_process(
    two: Ranks, base: str, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    given = tables(kind, tmp_path, **changes)
    expected = runs.tune(None, kind, given, str(tmp_path / "one"), base)
    reports = two("runs:tune", "dp=2", kind, given, str(tmp_path / "two"), base)
    assert reports[1] == []
    assert len(reports[0]) == len(expected) == 3
    for ours, alone in zip(reports[0], expected, strict=True):
        assert (ours.tokens, ours.tokens_total) == (alone.tokens, alone.tokens_total)
        for name in ("loss", "balance", "z", "grad_norm", "load_max", "load_min"):
            close = 2e-6 if ours.step == 1 else 1e-3
            assert getattr(ours, name) == pytest.approx(getattr(alone, name), rel=close), (name, ours.step)
    (one, both) = (checkpoint.load_latest(tmp_path / name) for name in ("one", "two"))
    assert one is not None
    assert both is not None
    assert one[1].keys() == both[1].keys()
    masters = [name for name in one[1] if name.startswith("master.")]
    assert max(float((one[1][name] - both[1][name]).abs().max()) for name in masters) < 1e-3
    logs = [json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[-1]) for n in ("one", "two")]
    assert logs[1]["validation_loss"] == pytest.approx(logs[0]["validation_loss"], rel=1e-4)
    record = json.loads((tmp_path / "two" / "record.json").read_text())
    assert (record["parallelism"]["devices"], record["parallelism"]["data"]) == (2, 2)


def test_a_stopped_run_goes_on_bitwise_and_also_in_one_process(two: Ranks, base: str, tmp_path: Path) -> None:
    given = tables("sft", tmp_path, adapter=ADAPTER | {"dropout": 0.1})
    two("runs:tune", "dp=2", "sft", given, str(tmp_path / "straight"), base)
    two("runs:tune", "dp=2", "sft", given, str(tmp_path / "stopped"), base, 1)
    first = checkpoint.load_latest(tmp_path / "stopped")
    assert first is not None
    assert first[0] == 1
    two("runs:tune", "dp=2", "sft", given, str(tmp_path / "stopped"), base)
    (one, other) = (checkpoint.load_latest(tmp_path / name) for name in ("straight", "stopped"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    two("runs:tune", "dp=2", "sft", given, str(tmp_path / "alone"), base, 1)
    assert [report.step for report in runs.tune(None, "sft", given, str(tmp_path / "alone"), base)] == [2, 3]


@pytest.mark.parametrize(
    ("axes", "count", "message"),
    [("tp=2", 4, "expected dp alone"), ("dp=2,ep=2", 4, "expected dp alone"), ("dp=2", 3, "expected a multiple of dp")],
)
def test_what_cannot_be_divided_is_refused(
    two: Ranks, base: str, tmp_path: Path, axes: str, count: int, message: str
) -> None:
    given = tables("sft", tmp_path, data={"documents_per_step": count})
    answers = two("runs:refused_tuning", axes, given, str(tmp_path / "run"), base)
    assert all(message in answer for answer in answers)


def test_a_disk_that_refuses_the_first_rank_is_an_error_on_all(two: Ranks, base: str, tmp_path: Path) -> None:
    given = tables("sft", tmp_path, adapter=ADAPTER)
    first, second = two("runs:tuning_without_space", "dp=2", given, str(tmp_path / "run"), base)
    assert "No space left on device" in first
    assert "the first rank could not save the state" in second


def test_a_disk_that_refuses_the_reference_is_an_error_on_all_at_once(two: Ranks, base: str, tmp_path: Path) -> None:
    given = tables("dpo", tmp_path)
    first, second = two("runs:reference_without_space", "dp=2", given, str(tmp_path / "run"), base)
    assert "reference: cannot be written (No space left on device); nothing was trained" in first
    assert "the first rank did not write what the others can read" in second
