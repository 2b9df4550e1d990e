"""The configuration file: everything that is not exactly right is refused with the name of the key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral.config import preset
from mixtral.errors import ConfigError
from mixtral.train.config import DataConfig, OptimConfig, PretrainConfig, RunConfig, read_pretrain_config

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pretrain.toml"


def from_tables(**tables: Any) -> PretrainConfig:
    return PretrainConfig.from_dict({"model": {"preset": "tiny"}, "run": {"steps": 5}} | tables, source="x.toml")


def test_defaults_fill_what_is_not_given() -> None:
    config = from_tables()
    assert config.model == preset("tiny")
    assert (config.data, config.optim, config.run) == (DataConfig(), OptimConfig(), RunConfig(steps=5))


def test_a_preset_can_be_changed_number_by_number() -> None:
    config = from_tables(model={"preset": "tiny", "num_hidden_layers": 3})
    assert config.model == preset("tiny").replace(num_hidden_layers=3)


def test_the_published_example_is_read() -> None:
    config = read_pretrain_config(EXAMPLE)
    assert config.model.vocab_size == 32768
    assert sum(config.data.mixture.values()) == 100


def test_json_gives_the_same_configuration_back(nano: Callable[..., PretrainConfig]) -> None:
    config = nano(data={"mixture": {"sums": 3}, "prompt_weight": 0.1 + 0.2})
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict())), source="state") == config


@pytest.mark.parametrize(
    ("tables", "param", "says"),
    [
        ({"optimizer": {}}, "optimizer", "did you mean 'optim'"),
        ({"optim": {"learning_rat": 1.0}}, "learning_rat", "x.toml: optim: .*did you mean 'learning_rate'"),
        ({"run": {"steps": 5, "zzz": 1}}, "zzz", "known keys: steps, seed"),
        ({"model": {"preset": "tiny", "hiden_size": 1}}, "hiden_size", "did you mean 'hidden_size'"),
        ({"data": 3}, "data", "expected a table"),
        ({"model": [1]}, "model", "expected a table"),
        ({"run": {}}, "steps", "missing key 'steps'"),
        ({"run": {"steps": 3.0}}, "steps", r"steps is 3\.0; expected int"),
        ({"run": {"steps": True}}, "steps", "expected int"),
        ({"run": {"steps": 0}}, "steps", "x.toml: run: steps is 0; expected at least 1"),
        ({"run": {"steps": 5, "dtype": "float16"}}, "dtype", "expected 'bfloat16' or 'float32'"),
        ({"run": {"steps": 5, "dtype": 16}}, "dtype", "expected str"),
        ({"optim": {"learning_rate": float("nan")}}, "learning_rate", "expected float"),
        ({"optim": {"learning_rate": "3e-3"}}, "learning_rate", "expected float"),
        ({"optim": {"clip_norm": 0}}, "clip_norm", "expected at least"),
        ({"optim": {"decay_fraction": 1.5}}, "decay_fraction", "expected 0 to 1"),
        ({"optim": {"balance_coef": -0.1}}, "balance_coef", "expected at least 0"),
        ({"data": {"documents_per_step": 10, "micro_batches": 4}}, "documents_per_step", "multiple of micro_batches 4"),
        ({"data": {"mixture": {"sums": -1}}}, "mixture", "expected dict"),
        ({"data": {"mixture": {"sums": True}}}, "mixture", "expected dict"),
        ({"data": {"mixture": {"sums": 1001}}}, "mixture", "mixture: sums is 1001; expected at most 1000"),
        ({"data": {"later": {"5": {"sums": -1}}}}, "later", "expected dict"),
        ({"data": {"later": {"5": 3}}}, "later", "expected dict"),
        ({"data": {"later": {"5": {"sums": 1001}}}}, "later.5", "later.5: sums is 1001; expected at most 1000"),
        ({"data": {"later": {"0": {"sums": 1}}}}, "later", "'0' is no step; expected a number from 1 on"),
        ({"data": {"later": {"05": {"sums": 1}}}}, "later", "'05' is no step"),
        ({"data": {"later": {"soon": {"sums": 1}}}}, "later", "'soon' is no step"),
        ({"data": {"unknown_per_mille": 1001}}, "unknown_per_mille", "is 1001; expected at most 1000"),
        ({"run": {"steps": 2**31}}, "steps", "x.toml: run: steps is 2147483648; expected at most 2147483647"),
        ({"run": {"steps": 5, "threads": 2**40}}, "threads", "threads is 1099511627776; expected at most 1024"),
        (
            {"model": {"preset": "tiny", "num_experts_per_tok": 1}},
            "num_experts_per_tok",
            "x.toml: num_experts_per_tok is 1; expected at least 2: .* softmax over one logit, always 1",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(tables: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        from_tables(**tables)
    assert caught.value.param == param


def test_numbers_from_python_must_be_finite() -> None:
    for kind in (OptimConfig, DataConfig):
        for name in [field.name for field in dataclasses.fields(kind) if field.type == "float"]:
            for value in (float("nan"), float("inf")):
                with pytest.raises(ConfigError, match=f"{name} is {value}; expected a finite number") as caught:
                    kind(**{name: value})
                assert caught.value.param == name
            with pytest.raises(ConfigError, match=f"{name} is -inf; expected at least"):
                kind(**{name: -float("inf")})
    with pytest.raises(ConfigError, match="steps is nan; expected a finite number, at least 1"):
        RunConfig(steps=float("nan"))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**70, 1 << 20_000], ids=["400", "-400", "70", "20000"])
@pytest.mark.parametrize("table", ["model", "data", "optim", "run"])
def test_huge_integers_are_refused_by_name(table: str, value: int, tmp_path: Path) -> None:
    sizes = preset("tiny").to_dict()
    kinds = {"model": type(preset("tiny")), "data": DataConfig, "optim": OptimConfig, "run": RunConfig}
    names = [f.name for f in dataclasses.fields(kinds[table]) if f.type in {"int", "float"}]
    path = tmp_path / "run.toml"
    for name in names:
        tables: dict[str, dict[str, Any]] = {"model": dict(sizes), "run": {"steps": 5}}
        tables[table] = tables.get(table, {}) | {name: value}
        with pytest.raises(
            ConfigError, match=f"x.toml: {name} is an integer of .* bits; expected at most 64"
        ) as caught:
            PretrainConfig.from_dict(tables, source="x.toml")
        assert caught.value.param == name
    path.write_text(f"[{table}]\n{names[0]} = {hex(abs(value))}\n")
    with pytest.raises(ConfigError, match=f"run.toml: {names[0]} is an integer of"):
        read_pretrain_config(path)


def test_a_number_longer_than_python_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[run]\nsteps = {'9' * 5000}\n")
    with pytest.raises(ConfigError, match=r"run.toml: not TOML"):
        read_pretrain_config(path)


def test_huge_integers_from_python_are_refused_too() -> None:
    for kind, name in ((RunConfig, "steps"), (RunConfig, "seed"), (DataConfig, "seed"), (OptimConfig, "learning_rate")):
        values: dict[str, Any] = {"steps": 5} if kind is RunConfig else {}
        for value in (1 << 20_000, -(1 << 20_000)):
            with pytest.raises(ConfigError, match=f"{name} is an integer of 20001 bits; expected") as caught:
                kind(**(values | {name: value}))
            assert caught.value.param == name


def test_negative_seeds_are_seeds() -> None:
    config = from_tables(run={"steps": 5, "seed": -(2**63)}, data={"seed": 2**63 - 1})
    assert (config.run.seed, config.data.seed) == (-(2**63), 2**63 - 1)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known presets: 8x7b"):
        from_tables(model={"preset": "huge"})


def test_mixtures_hold_from_their_steps_on(nano: Callable[..., PretrainConfig]) -> None:
    config = nano(data={"mixture": {"sums": 1}, "later": {"10": {"chat": 1}, "4": {"calls": 1}}}).data
    found = [next(iter(config.mixture_at(step))) for step in (0, 3, 4, 9, 10, 10**6)]
    assert found == ["sums", "sums", "calls", "calls", "chat", "chat"]


def test_a_configuration_cannot_be_changed_after_its_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_tables().run.steps = 7  # type: ignore[misc]


@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), (b"\xff", "not UTF-8"), (b"[run", "not TOML")])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_pretrain_config(path)
