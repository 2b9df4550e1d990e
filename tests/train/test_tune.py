"""The configuration of fine-tuning: defaults, refusals, and values changed by their dotted names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral.errors import ConfigError
from mixtral.train.config import read_toml
from mixtral.train.tune import AdapterConfig, DpoConfig, SftConfig, with_changes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def sft(**tables: Any) -> SftConfig:
    return SftConfig.from_dict({"data": {"train": "x.jsonl"}} | tables, source="x.toml")


def test_the_losses_of_the_router_are_off_and_all_weights_are_trained_by_default() -> None:
    config = sft()
    assert (config.optim.balance_coef, config.optim.z_coef, config.optim.schedule) == (0, 0, "cosine")
    assert (config.model.path, config.adapter, config.run.epochs) == ("embedded", None, 3)


def test_a_table_adapter_asks_for_an_adapter() -> None:
    config = sft(adapter={"rank": 3, "targets": "q, down", "expert_rank": 2})
    assert config.adapter is not None
    lora = config.adapter.lora()
    assert (lora.rank, lora.targets, lora.expert_rank) == (3, ("q", "down"), 2)
    assert AdapterConfig().lora().expert_rank is None


@pytest.mark.parametrize("table", [{"adapter": {}}, {"experts": {"file": "x.json"}}], ids=["adapter", "experts"])
def test_muon_is_for_models_that_are_trained_whole(table: dict[str, Any]) -> None:
    assert sft(optim={"optimizer": "muon"}).optim.optimizer == "muon"
    with pytest.raises(ConfigError, match=r'optimizer is "muon", .* expected "adamw" for an adapter or chosen'):
        sft(optim={"optimizer": "muon"}, **table)


def test_json_gives_the_same_configuration_back() -> None:
    for config in (sft(adapter={"rank": 3}), sft()):
        assert SftConfig.from_dict(json.loads(json.dumps(config.to_dict())), source="state") == config
    dpo = DpoConfig.from_dict({"data": {"train": "x"}, "dpo": {"beta": 0.3}}, source="x")
    assert DpoConfig.from_dict(json.loads(json.dumps(dpo.to_dict())), source="state") == dpo


@pytest.mark.parametrize(
    ("tables", "param", "says"),
    [
        ({"data": {}}, "train", "x.toml: data: missing key 'train'"),
        ({"data": {"train": 3}}, "train", "train is 3; expected str"),
        ({"modeli": {}}, "modeli", "did you mean 'model'"),
        ({"dpo": {}}, "dpo", "unknown key 'dpo'"),
        ({"adapter": 3}, "adapter", "expected a table"),
        ({"adapter": {"rank": 0}}, "rank", "rank is 0; expected 1 to 4096"),
        ({"adapter": {"targets": "q,w1"}}, "targets", "expected some of q, k, v, o, gate_up, down, router"),
        ({"adapter": {"rslora": 1}}, "rslora", "rslora is 1; expected bool"),
        ({"optim": {"schedule": "cosin"}}, "schedule", "expected 'wsd', 'cosine', 'linear' or 'constant'"),
        ({"optim": {"optimizer": "sgd"}}, "optimizer", "expected 'muon' or 'adamw'"),
        ({"optim": {"skip_norm": 0.5}}, "skip_norm", r"expected 0 \(off\) or at least 1"),
        ({"optim": {"ema": 1.0}}, "ema", "ema is 1.0; expected at most"),
        ({"run": {"epochs": 0}}, "epochs", "epochs is 0; expected at least 1"),
        ({"data": {"train": "x", "held_out_percent": 60}}, "held_out_percent", "expected at most 50"),
        (
            {"data": {"train": "x", "held_out_percent": 5, "validation": "y"}},
            "held_out_percent",
            "there is a file for validation; give one of them",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(tables: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        sft(**tables)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"beta": 0}, "beta is 0; expected at least"),
        ({"label_smoothing": 0.6}, "label_smoothing is 0.6; expected at most 0.5"),
        ({"reference": "frozen"}, "expected 'auto', 'adapter-off' or 'cached'"),
    ],
)
def test_a_wrong_value_of_dpo_is_named(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DpoConfig.from_dict({"data": {"train": "x"}, "dpo": table}, source="x")


def test_values_are_changed_by_their_dotted_names() -> None:
    values = {"data": {"train": "x"}, "run": {"epochs": 2}}
    found = with_changes(values, {"run.epochs": 5, "adapter.rank": 4}, "x")
    assert found == {"data": {"train": "x"}, "run": {"epochs": 5}, "adapter": {"rank": 4}}
    assert values["run"] == {"epochs": 2}
    for name in ("epochs", ".epochs", "run."):
        with pytest.raises(ConfigError, match=r"expected TABLE\.KEY"):
            with_changes(values, {name: 1}, "x")


def test_the_published_examples_are_read() -> None:
    assert SftConfig.from_dict(read_toml(EXAMPLES / "sft.toml"), source="sft.toml").adapter is None
    assert SftConfig.from_dict(read_toml(EXAMPLES / "lora.toml"), source="lora.toml").adapter is not None
    assert DpoConfig.from_dict(read_toml(EXAMPLES / "dpo.toml"), source="dpo.toml").dpo.beta > 0
