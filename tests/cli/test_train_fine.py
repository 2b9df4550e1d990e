"""``train sft`` and ``train dpo``: bad lines, options and files, what is printed, and a model that can be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from mixtral.cli import main, train
from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError
from mixtral.model import Mixtral, initialise
from mixtral.train import checkpoint
from mixtral.train.loop import StepReport
from mixtral.weights import save_model

Capture = pytest.CaptureFixture[str]
SIZES: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
SMALL = ["--set", "data.documents_per_step=2", "--set", "run.threads=1", "--set", "run.dtype=float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Mixtral(MixtralConfig.from_dict(SIZES))
    initialise(made, seed=1)
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(made, folder)
    return folder


def write(path: Path, lines: Sequence[object]) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return str(path)


def talks(path: Path, count: int = 4) -> str:
    return write(path, [{"text": f"Sentence number {i}."} for i in range(count)])


def pairs(path: Path) -> str:
    lines = [{"prompt": f"{i} and {i} are", "chosen": f" {2 * i}.", "rejected": f" {2 * i + 1}."} for i in range(4)]
    return write(path, lines)


def test_a_model_is_fine_tuned_exported_and_used(model: Path, tmp_path: Path, capsys: Capture) -> None:
    run, data = tmp_path / "run", talks(tmp_path / "x.jsonl")
    command = ["train", "sft", "--model", str(model), "--data", data, "--out", str(run), "--epochs", "1", *SMALL]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{data}: 4 lines, 4 documents; ")
    assert "learnt; 0 cut, 0 dropped as too long, 0 lines repeated" in lines[0]
    assert lines[1].startswith(f"{model}: training all weights, ")
    assert lines[1].endswith("numbers, 2 steps")
    assert lines[2].startswith("step 1/2  loss 10.")
    assert "  entropy " in lines[2]
    assert lines[-1] == f"{run}: 2 steps, {checkpoint.load_latest(run)[2]['tokens_total']} tokens"  # type: ignore[index]
    assert json.loads((run / "record.json").read_text())["kind"] == "sft"
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[2:] == lines[-1:]
    assert main(["train", "export", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "a checkpoint in float32; try `mixtral chat --model" in capsys.readouterr().out
    assert mixtral.load(tmp_path / "out").generate("a", max_tokens=2, temperature=0).finish_reason == "length"
    assert main(["train", "export", str(run), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_every_bad_line_is_listed_and_nothing_is_trained(model: Path, tmp_path: Path, capsys: Capture) -> None:
    data = write(tmp_path / "x.jsonl", [{"text": "good"}, *["{"] * 20, {"txt": "a"}])
    run = tmp_path / "run"
    assert main(["train", "sft", "--model", str(model), "--data", data, "--out", str(run), *SMALL]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split(":")[1] for line in lines[:-1]] == [str(number) for number in range(2, 23)]
    assert lines[20].startswith(f"{data}:22: the line: unknown key 'txt' (did you mean 'text'?)")
    assert lines[-1] == f"mixtral: error: {data}: 21 of 22 lines cannot be trained; nothing was trained"
    assert not list(run.glob("step-*"))


def test_an_adapter_is_trained_on_preferences_and_exported(model: Path, tmp_path: Path, capsys: Capture) -> None:
    run, data = tmp_path / "run", pairs(tmp_path / "p.jsonl")
    file = tmp_path / "dpo.toml"
    file.write_text(f'[model]\npath = "{model}"\n[data]\ntrain = "{data}"\n[run]\nepochs = 1\n[dpo]\nbeta = 0.2\n')
    command = ["train", "dpo", str(file), "--out", str(run), "--adapter", "--set", "adapter.rank=2", *SMALL]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{data}: 4 lines, 4 pairs; " in out
    assert f"{model}: training a low-rank adapter, " in out
    assert "margin 0.000  accuracy 0.50  " in out
    assert json.loads((run / "record.json").read_text())["preference"]["beta"] == 0.2
    assert main(["train", "export", str(run), str(tmp_path / "adapter")]) == 0
    assert f"try `mixtral chat --model {model} --adapter {tmp_path / 'adapter'}`" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    for dtype, says in (("bananas", "expected one of"), ("float32", "becomes an adapter, in float32; leave dtype out")):
        assert main(["train", "export", str(run), str(tmp_path / "other"), "--dtype", dtype]) == 2
        assert says in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    assert main(["train", "export", str(run), str(tmp_path / "other")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_an_option_overrides_the_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sft.toml"
    file.write_text('[data]\ntrain = "nowhere.jsonl"\n[run]\nepochs = 50\nsteps = 7\n[optim]\nlearning_rate = 1.0\n')
    data, run = talks(tmp_path / "x.jsonl"), tmp_path / "run"
    options = ["--model", str(model), "--data", data, "--learning-rate", "1e-4", "--set", "run.steps=1", *SMALL]
    assert main(["train", "sft", str(file), "--out", str(run), *options]) == 0
    found = checkpoint.load_latest(run)
    assert found is not None
    config = found[2]["config"]
    assert (found[0], config["optim"]["learning_rate"], config["data"]["train"]) == (1, 1e-4, data)
    assert all(bool(torch.isfinite(value).all()) for value in found[1].values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "data: missing key 'train'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--data", "x", "--set", "epochs=2"], "'epochs' is no name of a value; expected TABLE.KEY"),
        (["--data", "x", "--set", "run.epochs"], "--set is 'run.epochs'; expected TABLE.KEY=VALUE"),
        (["--data", "x", "--set", "run.epoch=2"], "unknown key 'epoch' (did you mean 'epochs'?)"),
        (["--data", "x", "--set", "run.dtype=fp8"], "dtype is 'fp8'; expected 'bfloat16' or 'float32'"),
        (["--data", "x", "--set", f"run.steps=1{'0' * 400}"], "steps is an integer of 1329 bits; expected at most 64"),
        (["--data", "x", "--set", f"optim.ema=1{'0' * 400}"], "ema is an integer of 1329 bits; expected at most 64"),
        (["--data", "x", "--set", f"run.steps=1{'0' * 5000}"], "--set run.steps: not TOML (Exceeds the limit"),
        (["--data", "x", "--set", f"run.steps={'[' * 5000}"], "--set run.steps: not TOML ("),
        (["--data", "x", "--epochs", f"1{'0' * 400}"], "epochs is an integer of 1329 bits; expected at most 64"),
        (["--data", "x", "--epochs", "0"], "epochs is 0; expected at least 1"),
        (["--data", "x", "--model", "8x7b"], "8x7b"),
    ],
)
def test_a_wrong_option_is_one_line(
    model: Path, tmp_path: Path, capsys: Capture, options: list[str], says: str
) -> None:
    with_model = [] if "--model" in options else ["--model", str(model)]
    assert main(["train", "sft", "--out", str(tmp_path / "run"), *with_model, *options]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_tensorboard_that_is_not_installed_is_told_before_anything(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("--tensorboard needs the package tensorboard")

    monkeypatch.setattr("mixtral.train.board.check_installed", missing)
    data, run = talks(tmp_path / "x.jsonl"), tmp_path / "run"
    assert main(["train", "sft", "--model", str(model), "--data", data, "--out", str(run), "--tensorboard"]) == 2
    assert "needs the package tensorboard" in capsys.readouterr().err
    assert not run.exists()


def test_the_line_of_a_step_tells_what_is_wrong_with_the_routers() -> None:
    numbers: dict[str, Any] = dict.fromkeys(StepReport.__slots__, 0.0) | {"step": 1, "seconds": 1.0, "tokens": 5}
    healthy = StepReport(**numbers | {"entropy": 0.95, "agreement": 1.0})
    line = train.Progress(9, train.Stop()).line(healthy, 1.0)
    assert line.endswith("load 0.00..0.00  entropy 0.950  left 0:00:08")
    ill = StepReport(**numbers | {"entropy": 0.5, "agreement": 0.25, "dead": 3, "collapsed": 2, "skipped": 1})
    line = train.Progress(9, train.Stop()).line(ill, 1.0)
    assert "  entropy 0.500  agreement 0.250  dead 3  collapsed 2  skipped 1  left " in line
