"""Pretraining that begins with the weights of a model: its values and rows, resume, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError, TrainingError
from mixtral.tokenizer import Tokenizer
from mixtral.train import checkpoint
from mixtral.train import pretrain as recipe
from mixtral.train.config import PretrainConfig
from mixtral.train.export import export_run
from mixtral.train.pretrain import Pretraining, pretrain
from mixtral.train.start import fingerprint, load_start
from mixtral.weights import load_compact
from mixtral.weights.vocab import trained_ids

Begun = Callable[..., PretrainConfig]


@pytest.fixture
def begun(nano: Callable[..., PretrainConfig], compact: Path, trained_ids: list[int]) -> Begun:
    """``begun(run={...})``: the configuration of a run on the weights of ``compact``."""
    sizes = MixtralConfig.from_dict(json.loads((compact / "config.json").read_text()))

    def make(**changes: dict[str, Any]) -> PretrainConfig:
        tables = nano().to_dict()
        tables["model"] = sizes.to_dict() | {"max_position_embeddings": 4096} | changes.pop("model", {})
        tables["data"] = tables["data"] | {"trained_rows": len(trained_ids)} | changes.pop("data", {})
        tables["start"] = {"path": str(compact)}
        for name, values in changes.items():
            tables[name] = tables[name] | values
        return PretrainConfig.from_dict(tables, source="begun")

    return make


def test_a_run_begins_with_the_values_and_the_rows_of_the_model(
    tmp_path: Path, begun: Begun, compact: Path, trained_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "choose_trained_ids", lambda *_: pytest.fail("rows were chosen"))
    run = Pretraining(begun(run={"dtype": "bfloat16"}), tmp_path)
    assert run.trained_ids == trained_ids
    expected = load_start(compact, dtype="float32", full=True).masters
    assert run.optimizer.masters.keys() == expected.keys()
    for name, value in run.model.named_parameters():
        assert torch.equal(run.optimizer.masters[name], expected[name])
        assert torch.equal(value, expected[name].to(value.dtype))


def test_a_run_of_no_steps_would_export_the_model_that_it_began_with(
    tmp_path: Path, begun: Begun, compact: Path
) -> None:
    """A step with hardly any learning rate: the integers of the export are those of the model."""
    config = begun(run={"steps": 1}, optim={"learning_rate": 1e-12, "weight_decay": 0.0})
    pretrain(config, tmp_path / "run", on_step=lambda report: None)
    export_run(tmp_path / "run", tmp_path / "model")
    before, after = (load_compact(folder, device="cpu") for folder in (compact, tmp_path / "model"))
    assert torch.equal(before.row_of_id, after.row_of_id)
    assert before.respell == after.respell
    for name, value in before.model.named_parameters():
        assert torch.allclose(value, after.model.get_parameter(name), atol=1e-5), name


def test_it_goes_on_bitwise_and_its_record_names_the_model(tmp_path: Path, begun: Begun, compact: Path) -> None:
    straight = pretrain(begun(run={"steps": 3}), tmp_path / "a", on_step=lambda report: None)
    pretrain(begun(run={"steps": 3}), tmp_path / "b", on_step=lambda report: None, stopping=_after(2))
    assert (found := checkpoint.load_latest(tmp_path / "b")) is not None
    assert found[0] == 1
    again = pretrain(begun(run={"steps": 3}), tmp_path / "b", on_step=lambda report: None)
    for name, value in straight.optimizer.masters.items():
        assert torch.equal(again.optimizer.masters[name], value)
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    assert record["base"] == {"path": str(compact), "fingerprint": fingerprint(compact)}
    assert record["seeds"].keys() == {"data"}  # no weight was drawn


def _after(steps: int) -> Callable[[], bool]:
    """Whether to stop, asked before every step."""
    asked = iter(range(1, 100))
    return lambda: next(asked) >= steps


def test_a_run_from_nothing_does_not_go_on_as_one_from_a_model(tmp_path: Path, begun: Begun) -> None:
    config = begun(run={"steps": 1})
    pretrain(config, tmp_path, on_step=lambda report: None)
    tables = config.to_dict() | {"start": None}
    with pytest.raises(TrainingError, match="was started with the table start"):
        Pretraining(PretrainConfig.from_dict(tables, source="x"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"trained_rows": 1399}}, r"trained_rows is 1399, but .* has 1400; they must be equal"),
        ({"model": {"num_local_experts": 3}}, r"model\.num_local_experts is 3, but .* has \d; they must be equal"),
        ({"model": {"rms_norm_eps": 1e-3}}, r"model\.rms_norm_eps is 0\.001, but"),
    ],
)
def test_other_sizes_are_refused(tmp_path: Path, begun: Begun, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Pretraining(begun(**change), tmp_path)
    assert not list(tmp_path.glob("step-*"))


def test_a_model_without_shared_rows_is_refused(tmp_path: Path, begun: Begun, plain: Path) -> None:
    with pytest.raises(TrainingError, match=r"has no shared vocabulary rows; expected what `mixtral train export`"):
        Pretraining(begun(), tmp_path, base=plain)


def test_the_table_is_strict(begun: Begun) -> None:
    tables = begun().to_dict()
    with pytest.raises(ConfigError, match=r"start: unknown key 'folder'"):
        PretrainConfig.from_dict(tables | {"start": {"folder": "x"}}, source="x")
    with pytest.raises(ConfigError, match=r"start: missing key 'path'"):
        PretrainConfig.from_dict(tables | {"start": {}}, source="x")


def test_a_run_goes_on_without_its_model_but_not_with_another(tmp_path: Path, begun: Begun, compact: Path) -> None:
    base = Path(shutil.copytree(compact, tmp_path / "base"))
    config = begun(run={"steps": 2})
    pretrain(config, tmp_path / "run", on_step=lambda report: None, stopping=_after(2), base=base)
    header = base / "config.json"
    header.write_text(header.read_text() + "\n")
    with pytest.raises(TrainingError, match=r"the run was started with other model \(sha256 [0-9a-f]{12}, now "):
        Pretraining(config, tmp_path / "run", base=base)
    shutil.rmtree(base)
    run = pretrain(config, tmp_path / "run", on_step=lambda report: None, base=base)
    assert (run.steps_done, run.base_sha256) == (2, fingerprint(compact))


def test_a_large_model_is_refused_before_its_weights_are_read(
    tmp_path: Path, begun: Begun, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "load_start", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(TrainingError, match="has no shared vocabulary rows"):
        Pretraining(begun(), tmp_path, base=plain)


def test_skills_whose_control_tokens_the_model_lacks_are_refused(
    tmp_path: Path, begun: Begun, compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_version("v3")
    calls = next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == "[TOOL_CALLS]")
    plain = next(i for i in range(tokenizer.vocab_size - 1, 0, -1) if i not in load_ids(compact))
    monkeypatch.setattr(recipe, "trained_ids", lambda rows: sorted({*trained_ids(rows), plain} - {calls}))
    with pytest.raises(TrainingError, match=r"data.mixture has documents with \[TOOL_CALLS\], for which there are no"):
        Pretraining(begun(data={"mixture": {"calls": 1}}), tmp_path)


def load_ids(folder: Path) -> list[int]:
    return trained_ids(load_compact(folder, device="cpu").row_of_id)


def test_the_same_documents_again_are_told_and_the_file_names_its_base(
    tmp_path: Path, begun: Begun, compact: Path
) -> None:
    config = begun(run={"steps": 1})
    pretrain(config, tmp_path / "run", on_step=lambda report: None)
    export_run(tmp_path / "run", tmp_path / "model")
    notes = load_compact(tmp_path / "model", device="cpu").metadata
    assert (notes["base_sha256"], notes["data_seed"]) == (fingerprint(compact), str(config.data.seed))
    with pytest.warns(UserWarning, match=rf"documents of data.seed {config.data.seed} from the first on"):
        Pretraining(config, tmp_path / "again", base=tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pretraining(begun(data={"seed": config.data.seed + 1}), tmp_path / "other", base=tmp_path / "model")
