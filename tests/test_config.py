"""config.json: what is refused, what is reported, and that no value ends in a traceback."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral.cli import main
from mixtral.config import FIXED_KEYS, IGNORED_KEYS, PRESETS, REPORTED_KEYS, MixtralConfig, read_config
from mixtral.errors import ConfigError

TINY = PRESETS["tiny"].to_dict()


def read(**changes: Any) -> MixtralConfig:
    return MixtralConfig.from_dict({**TINY, **changes}, source="config.json")


@pytest.mark.parametrize("name", PRESETS)
def test_published_values_are_read_without_a_warning(name: str) -> None:
    """Warnings are errors in these tests. The last keys are those of the published files and of transformers 5."""
    values = PRESETS[name].to_dict() | {"router_jitter_noise": 0.0, "output_router_logits": False, "rope_scaling": None}
    assert MixtralConfig.from_dict(values) == PRESETS[name]
    for silent in ({"sliding_window": None}, {"router_jitter_noise": 0}, {"rope_theta": 1000000}):
        MixtralConfig.from_dict(values | silent)
    del values["rope_theta"]
    assert MixtralConfig.from_dict(values).rope_theta == 1e6
    MixtralConfig.from_dict(values | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})


@pytest.mark.parametrize("values", [{"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000}}])
def test_b2_another_theta_is_used_and_warned_about(values: dict[str, Any]) -> None:
    rest = {key: value for key, value in TINY.items() if key != "rope_theta"}
    with pytest.warns(UserWarning, match=r"^config: rope_theta is 10000.* and is used, but .* 1000000; ") as told:
        assert MixtralConfig.from_dict(rest | values).rope_theta == 10000
    assert len(told) == 1


@pytest.mark.parametrize("window", [4096, 0, "wide", [1]])
def test_b3_a_sliding_window_is_reported_and_ignored(window: Any) -> None:
    with pytest.warns(UserWarning, match=r"^config.json: sliding_window is .* ignored: Mixtral has no") as told:
        assert read(sliding_window=window) == PRESETS["tiny"]
    assert len(told) == 1


def test_f4_jitter_is_reported_and_ignored() -> None:
    with pytest.warns(UserWarning, match=r"router_jitter_noise is 0.1, which is ignored: .* adds no noise") as told:
        assert read(router_jitter_noise=0.1) == PRESETS["tiny"]
    assert len(told) == 1


def test_the_command_line_says_it_once_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"sliding_window": 4096}))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["inspect", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("mixtral: warning: config.json: sliding_window is 4096, which is ignored")
    assert captured.err.count("\n") == 1


def test_two_thetas_must_agree() -> None:
    assert read(rope_parameters={"rope_theta": 1e6}) == PRESETS["tiny"]
    with pytest.raises(ConfigError, match=r"rope_theta is 1000000.0, but 10000 in rope_parameters"):
        read(rope_parameters={"rope_theta": 10000})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "window misspelled": ({"sliding_windows": 1}, r"unknown key 'sliding_windows' .did you mean 'sliding_window'"),
    "billions of layers": ({"num_hidden_layers": 2**31 - 1}, "expected at most 1024"),
    "billions of experts": ({"num_local_experts": 2**31 - 1}, "expected at most 1024"),
    "integer that Python will not print": ({"vocab_size": 10**5000}, "vocab_size is int too large to show"),
    "and for another key": ({"model_type": 10**5000}, "model_type is int too large to show"),
    "key of a megabyte": ({"x" * 10**6: 1}, r"unknown key 'x{79}\.\.\.$"),
    "value of a megabyte": ({"hidden_act": "x" * 10**6}, r"hidden_act is 'x{79}\.\.\.; "),
    "list as number": ({"eos_token_id": [2]}, r"eos_token_id is \[2\]; expected an integer"),
    "true as number": ({"num_hidden_layers": True}, "num_hidden_layers is True; expected an integer"),
    "head size from true": ({"head_dim": None, "num_attention_heads": True}, "num_attention_heads is True"),
    "null for a size": ({"hidden_size": None}, "missing key 'hidden_size'"),
    "rope parameters a list": ({"rope_parameters": []}, r"rope_parameters is \[\]; expected an object"),
    "scaled positions": ({"rope_parameters": {"rope_type": ["yarn"]}}, "expected an object with rope_type 'default'"),
    "unknown rope parameter": ({"rope_parameters": {"factor": 2}}, "unknown key 'factor' in rope_parameters"),
    "theta a list": ({"rope_theta": None, "rope_parameters": {"rope_theta": [1]}}, r"rope_theta is \[1\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_short_line(kind: str) -> None:
    changes, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json: ")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**64, -(10**400), 10**5000, 0.0, -0.5, 1.5, 1e-320, 1e308),
    *(math.nan, math.inf, -math.inf, "", "silu", "8", "\ud800\n", "x" * 1000),
    *([], [1], {}, {"rope_theta": 1e4}, {"rope_type": None}, {"rope_theta": {}, "\ud800": 1}, deep(5), deep(20000)),
)


def test_no_value_ends_in_a_traceback() -> None:
    """A thousand configs with up to three odd values each: a config, or a ConfigError of one line."""
    source = random.Random(0)
    keys = [*TINY, *sorted({*FIXED_KEYS, *IGNORED_KEYS, *REPORTED_KEYS}), "rope_parameters", "quantization_config", "?"]
    messages = []
    for _ in range(1000):
        changes = {source.choice(keys): source.choice(ODD) for _ in range(source.randint(1, 3))}
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                read(**changes)
            except ConfigError as error:
                messages.append(str(error))
    assert 300 < len(messages) < 900
    assert max(map(len, messages)) < 600


CONTENTS: dict[str, bytes] = {
    "nested too deep": b'{"sliding_window": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
    "nothing": b"",
    "a number": b"5",
    "UTF-16": json.dumps(TINY).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_odd_contents(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(CONTENTS[kind])
    with pytest.raises(ConfigError, match=r"config\.json: "):
        read_config(path)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path)])
def test_odd_files(make: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(ConfigError, match=r"config\.json: "):
        read_config(path)
