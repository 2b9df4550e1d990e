"""``--parallel``: ranks started by the command itself and by torchrun, stopped, continued, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nano import toml

from mixtral.cli import main, ranks
from mixtral.errors import TrainingError
from mixtral.train import checkpoint, tune


def nano(steps: int, **run: int) -> str:
    return toml(run={"steps": steps, **run})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "nano.toml"
    path.write_text(nano(3))
    return path


def command(config: Path, out: Path, axes: str, *launcher: str) -> list[str]:
    start = launcher or (sys.executable,)
    return [*start, "-m", "mixtral", "train", "pretrain", str(config), "--out", str(out), "--parallel", axes]


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("axes", ["dp", "pp=2", "dp=2,ep=3"])
def test_axes_that_cannot_be_read_are_refused(capsys: pytest.CaptureFixture[str], config: Path, axes: str) -> None:
    arguments = ["train", "pretrain", str(config), "--out", str(config.parent / "run"), "--parallel", axes]
    assert "parallel is" in refused(capsys, arguments)


def test_a_launch_without_axes_is_refused(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "say how they share: --parallel" in refused(
        capsys, ["train", "pretrain", str(config), "--out", str(config.parent / "run")]
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_own_ranks_and_those_of_torchrun_train_alike(config: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(config, tmp_path / "own", "dp=2"), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3/3  loss") == 1
    assert "own: 3 steps" in done.stdout
    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2")
    other = subprocess.run(
        command(config, tmp_path / "run", "dp=2", *torchrun), capture_output=True, text=True, timeout=110
    )
    assert other.returncode == 0, other.stderr
    assert losses(tmp_path / "own") == losses(tmp_path / "run")
    states = [checkpoint.load_latest(tmp_path / name) for name in ("own", "run")]
    assert states[0] is not None
    assert states[1] is not None
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())
    assert main(["train", "export", str(tmp_path / "own"), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks_after_the_step_saved(config: Path, tmp_path: Path, number: int) -> None:
    config.write_text(nano(100_000))
    with subprocess.Popen(command(config, tmp_path / "run", "dp=2"), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("step 1/")
        run.send_signal(number)
        rest = run.stdout.read()
    assert run.returncode == 0
    assert "the same command goes on from here" in rest
    found = checkpoint.load_latest(tmp_path / "run")
    assert found is not None
    assert found[0] == losses(tmp_path / "run")[-1][0]


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_next_goes_on(config: Path, tmp_path: Path) -> None:
    config.write_text(nano(100_000, save_every=2))
    run = subprocess.Popen(
        command(config, tmp_path / "run", "dp=2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    while "saved" not in run.stdout.readline():
        pass
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=100)
    assert run.returncode == 2
    assert "ended with" in errors
    assert "lost another rank" in errors
    found = checkpoint.load_latest(tmp_path / "run")
    assert found is not None
    assert found[0] % 2 == 0
    config.write_text(nano(found[0] + 1, save_every=2))
    again = subprocess.run(command(config, tmp_path / "run", "dp=2"), capture_output=True, text=True, timeout=110)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run")[-1][0] == found[0] + 1


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_gone(config: Path, tmp_path: Path) -> None:
    config.write_text(nano(100_000))
    out = tmp_path / "out"  # a file: a pipe that nobody reads any more would end them as well
    with out.open("w") as file, subprocess.Popen(command(config, tmp_path / "run", "dp=2"), stdout=file) as run:
        while run.poll() is None and not out.read_text().startswith("step 1/"):
            time.sleep(0.1)
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.kill()
    assert len(ranks) == 2
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with checkpoint.exclusive(tmp_path / "run"):  # free when the first rank has ended
                break
        except TrainingError:
            time.sleep(0.2)
    else:
        for rank in ranks:
            os.kill(int(rank), signal.SIGKILL)
        pytest.fail("the ranks still run")
    assert checkpoint.load_latest(tmp_path / "run") is not None


@pytest.mark.parametrize(
    "text",
    [
        "pretrain --out run --max-seconds 3.0 nano.toml",
        "sft --out run --data a.jsonl --adapter --set run.epochs=2 --set x.y=1",
        "sft --out run --tensorboard",
        "dpo --out run --data p.jsonl --learning-rate 0.001 c.toml",
    ],
)
def test_a_rank_gets_the_words_of_the_command(
    text: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *text.split(), "--parallel", "dp=2"]
    started: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text("[run]\nepochs = 1\n")
    monkeypatch.setattr(ranks, "launched", lambda arguments, parallel, stopping: started.append(list(arguments)))
    monkeypatch.setattr(tune, "with_changes", lambda values, changes, source: {"data": {"train": "p"}})
    assert main(words) == 0
    assert len(started) == 1
    assert started[0][:2] == words[:2]
    assert sorted(started[0]) == sorted(words)


@pytest.mark.slow
def test_sft_on_own_ranks_ends_with_an_adapter(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning!"}]}
    data = tmp_path / "talks.jsonl"
    data.write_text(f"{json.dumps(line)}\n" * 8)
    arguments = ["train", "sft", "--data", str(data), "--adapter", "--epochs", "1", "--parallel", "dp=2"]
    arguments += ["--set", "data.documents_per_step=4", "--set", "data.max_tokens=64", "--set", "run.threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", "mixtral", *arguments, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2  loss") == 1
    assert done.stdout.count("training a low-rank adapter") == 1
    assert main(["train", "export", str(tmp_path / "run"), str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
