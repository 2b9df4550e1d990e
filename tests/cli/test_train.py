"""``train pretrain`` and ``train export`` on a model of one layer: stopping, resuming, exporting, loading."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from nano import toml
from safetensors import safe_open

import mixtral
from mixtral.cli import main, output, train
from mixtral.errors import TrainingError
from mixtral.train import checkpoint
from mixtral.train.export import export_run
from mixtral.train.pretrain import StepReport
from mixtral.weights import is_compact

Capture = pytest.CaptureFixture[str]
STEPS = 3
NANO = toml(run={"steps": STEPS})
REPORT = StepReport(
    step=10,
    loss=1.5,
    balance=1.01,
    z=2.0,
    grad_norm=1.0,
    learning_rate=1e-3,
    load_max=1.5,
    load_min=0.5,
    tokens=1000,
    seconds=2.0,
    tokens_total=10_000,
    seconds_total=20.0,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "nano.toml"
    path.write_text(NANO)
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", "pretrain", str(config), "--out", str(folder)]) == 0
    return folder


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_option_has_a_help_text() -> None:
    commands = typer.main.get_command(train.app).commands  # type: ignore[attr-defined]
    assert set(commands) == {"pretrain", "sft", "dpo", "export"}
    assert [p.name for command in commands.values() for p in command.params if not p.help] == []


def test_a_finished_run_has_nothing_to_do(config: Path, finished: Path, capsys: Capture) -> None:
    records = read_log(finished)
    assert [(record["step"], "validation_loss" in record) for record in records] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
    assert main(["train", "pretrain", str(config), "--out", str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished}: 3 steps, {records[2]['tokens_total']:,} tokens\n"
    assert read_log(finished) == records


def test_a_run_is_not_continued_with_another_recipe(
    config: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace("warmup_steps = 1", "warmup_steps = 2"))
    assert main(["train", "pretrain", str(other), "--out", str(finished)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mixtral: error: optim.warmup_steps is 2, but the run was started with 1")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(
    number: signal.Signals,
    config: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    before = signal.getsignal(number)
    show = train.Progress.show

    def show_and_stop(self: train.Progress, report: StepReport) -> None:
        show(self, report)
        os.kill(os.getpid(), number)

    command = ["train", "pretrain", str(config), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "show", show_and_stop)
        assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 1/3  loss ")
    assert lines[1] == f"step 1/3  saved  validation loss {read_log(tmp_path)[-1]['validation_loss']:.4f}"
    assert f"{tmp_path}: 1 steps, " in lines[2]
    assert "goes on from here" in lines[2]
    assert signal.getsignal(number) is before
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001"]

    assert main(command) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]] == ["2/3", "3/3", "3/3"]
    resumed, unbroken = checkpoint.load_latest(tmp_path), checkpoint.load_latest(finished)
    assert resumed is not None
    assert unbroken is not None
    assert resumed[0] == unbroken[0] == STEPS
    assert [name for name, value in unbroken[1].items() if not torch.equal(value, resumed[1][name])] == []


def test_two_commands_do_not_train_in_one_folder(config: Path, tmp_path: Path, capsys: Capture) -> None:
    with checkpoint.exclusive(tmp_path):
        assert main(["train", "pretrain", str(config), "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"mixtral: error: {tmp_path}: another process is training here; ")
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_a_second_signal_is_not_kept_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        with train.Stop.on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.wanted
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_time_limit_ends_a_run(config: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", "pretrain", str(config), "--out", str(tmp_path), "--max-seconds", "0"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 0 steps, 0 tokens of 3; the same command goes on from here\n"


@pytest.mark.parametrize("problem", [output.PipeClosedError(), OSError(28, "No space left on device", "the output")])
def test_a_reader_that_leaves_ends_the_run_saved(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_reads(text: str) -> None:
        raise problem

    monkeypatch.setattr(output, "say", nobody_reads)
    for show in (lambda p: p.show(REPORT), lambda p: p.show_validation(10, 1.5)):
        stop = train.Stop()
        show(train.Progress(10, stop))
        assert stop.wanted


def test_the_line_of_a_step() -> None:
    line = train.Progress(100, train.Stop()).line(REPORT, seconds_per_step=50.0)
    assert line == "step 10/100  loss 1.5000  500 tok/s  balance 1.010  load 0.50..1.50  left 1:15:00"


def test_export_holds_the_masters_and_loads(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    assert main(["train", "export", str(finished), str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    llm = mixtral.load(folder)
    saved = checkpoint.load_latest(finished)
    assert saved is not None
    _, tensors, values = saved
    trained = values["trained_ids"]
    assert llm.config.vocab_size == 32768
    for name, parameter in llm.generator.model.named_parameters():
        master = tensors[f"master.{name}"]
        if parameter.shape != master.shape:
            untrained = sorted(set(range(32768)) - set(trained))
            torch.testing.assert_close(parameter[untrained], parameter[untrained[:1]].expand(len(untrained), -1))
            parameter = torch.cat([parameter[trained], parameter[untrained[:1]]])
        # A group's step is its largest value / 127: half a step of rounding, and 127 / 2048 for the fp16 of the step.
        torch.testing.assert_close(parameter, master, rtol=0, atol=float(master.abs().max()) * 0.563 / 127)
    assert set(llm.tokenizer.encode("The quick brown fox jumps over the lazy dog.")) <= set(trained)
    assert llm.generate("a", max_tokens=2, temperature=0).finish_reason == "length"


def test_export_says_where_the_model_comes_from(finished: Path, tmp_path: Path) -> None:
    export_run(finished, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["tokens"] == str(max(record.get("tokens_total", 0) for record in read_log(finished)))
    assert {name: metadata[name] for name in ("steps", "seed", "data_seed", "trained_rows")} == {
        "steps": "3",
        "seed": "1",
        "data_seed": "1",
        "trained_rows": "1300",
    }


def test_export_replaces_a_model_only_when_told(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["train", "export", str(finished), str(tmp_path)]
    (tmp_path / "config.json").write_text("mine")
    assert main(command) == 2
    assert "not empty; choose another folder, or overwrite it explicitly" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "model.safetensors").exists()
    (tmp_path / "a file").touch()
    assert main(["train", "export", str(finished), str(tmp_path / "a file")]) == 2
    assert "a file: not a folder" in capsys.readouterr().err


def test_export_refuses_an_unknown_dtype(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", "export", str(finished), str(tmp_path / "model"), "--dtype", "bananas"]) == 2
    error = capsys.readouterr().err
    assert "dtype is 'bananas'" in error
    assert "expected one of" in error
    assert not (tmp_path / "model").exists()


def test_export_in_a_dtype_is_an_ordinary_checkpoint_that_spells_alike(finished: Path, tmp_path: Path) -> None:
    assert main(["train", "export", str(finished), str(tmp_path / "compact")]) == 0
    assert main(["train", "export", str(finished), str(tmp_path / "plain"), "--dtype", "float32"]) == 0
    compact, plain = (mixtral.load(tmp_path / name, decode=True) for name in ("compact", "plain"))
    text = "Der Schornsteinfeger kauft Zwetschgen."
    ids = compact.tokenizer.encode(text)
    assert plain.tokenizer.encode(text) == ids
    assert not is_compact(tmp_path / "plain")
    expected, found = compact.logits(ids), plain.logits(ids)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())  # int8 against float32


def test_export_refuses_a_run_whose_only_state_is_damaged(finished: Path, tmp_path: Path) -> None:
    state = next(finished.glob("step-*"))
    damaged = tmp_path / "run" / state.name
    damaged.mkdir(parents=True)
    for path in state.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainingError, match="holds no whole run state"):
        export_run(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_damaged_state_is_passed_over_with_one_line(
    config: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    older, newer = tmp_path / "step-00000003", tmp_path / "step-00000004"
    shutil.copytree(next(finished.glob("step-*")), older)
    newer.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["train", "pretrain", str(config), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().err
    assert text.startswith(f"mixtral: warning: {tmp_path}: passed over step-00000004 (")
    assert text.endswith("going on from step-00000003\n")
    assert text.count("\n") == 1
