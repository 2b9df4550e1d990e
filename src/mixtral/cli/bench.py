"""``mixtral bench``: how fast a model is, beside another program on the same files, and what the machine allows."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.cli import output
from mixtral.cli.generate import PackedCacheOption
from mixtral.cli.init import create

if TYPE_CHECKING:
    from mixtral.bench.report import Row
    from mixtral.bench.traffic import Weights
    from mixtral.bench.turns import Command
    from mixtral.bench.work import Work

__all__ = ["run"]


@dataclass(frozen=True, slots=True)
class _Model:
    """Where it is, its sizes, and the options by which it was made, none if it was there."""

    path: Path
    weights: Weights
    made: dict[str, str | int]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be done, and where the results go."""

    work: list[Work]
    sides: list[Command]
    turns: int
    threads: int
    timeout_s: float
    json_path: Path | None
    plot: Path | None
    packed_cache: Path | None


def run(
    work: Annotated[list[str], typer.Argument(metavar="WORK...", help="decode, prefill, batch, context, or several.")],
    model: Annotated[str | None, typer.Option(help="Folder or GGUF file; default: one of random weights.")] = None,
    preset: Annotated[str | None, typer.Option(help="Sizes of random weights; default 8x7b.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Their layers; default 4.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Their format; default q4_k_m, or bf16 where the peer needs it.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the random weights, and say where they are.")] = False,
    peer: Annotated[str | None, typer.Option(help="llama.cpp, transformers or vllm.")] = None,
    peer_python: Annotated[
        str | None, typer.Option("--peer-python", help="Interpreter that has the peer; default: this one.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Of prefill; default 512 and 2048.")] = None,
    sequences: Annotated[list[int] | None, typer.Option(min=1, help="Of batch; default 8 and 32.")] = None,
    depth: Annotated[int, typer.Option(min=1, help="Tokens before the decoded ones in context.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded in a turn.")] = 32,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each side, after one that warms up.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: all processors.")] = None,
    packed_cache: PackedCacheOption = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one answer of a side may take.")] = 1800.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for everything measured, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture: .png, .svg, .pdf; needs matplotlib.")] = None,
) -> None:
    """Measure tokens per second: of a prompt (prefill), one sequence (decode), several (batch), a long one (context).

    With --peer the sides take turns: ours, the peer, ours, the peer; each is a process with the model loaded.
    """
    from mixtral.bench.machine import threads_of_this_process
    from mixtral.bench.work import works

    wanted = works(work, tokens=tokens or (512, 2048), sequences=sequences or (8, 32), depth=depth, steps=steps)
    _check_targets(json_path, plot)
    threads = threads or threads_of_this_process()
    plan = _Plan(wanted, _sides(peer, peer_python), turns, threads, timeout, json_path, plot, packed_cache)
    made = {"preset": preset, "layers": layers, "format": form}
    chosen = {name: value for name, value in made.items() if value is not None}
    found = _given(model, chosen, keep, peer) if model is not None else _made(chosen, keep, peer)
    with _ending_on_signals(), found as opened:
        options = {"model": model, **opened.made, "peer": peer, "peer-python": peer_python}
        options["packed-cache"] = None if packed_cache is None else str(packed_cache)
        _measure(plan, opened, _command(plan, options))


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command like an error: the sides, which may be stopped, and the weights go too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_targets(json_path: Path | None, plot: Path | None) -> None:
    from mixtral.bench.plot import check_plot
    from mixtral.errors import ConfigError

    for option, path in (("json", json_path), ("plot", plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"--{option} is {str(path)!r}; expected a file in an existing folder", param=option)
    if plot is not None:
        check_plot(plot)


def _sides(peer: str | None, python: str | None) -> list[Command]:
    from mixtral.bench.sides import PEERS, our_command, peer_command
    from mixtral.bench.turns import OURS, Command
    from mixtral.errors import ConfigError

    if peer is None and python is not None:
        raise ConfigError("--peer-python is given without --peer; name the peer too", param="peer")
    if peer is not None and peer not in PEERS:
        raise ConfigError(f"--peer is {peer!r}; expected one of {', '.join(PEERS)}", param="peer")
    sides = [Command(OURS, our_command())]
    return sides if peer is None else [*sides, Command(peer, peer_command(peer, python))]


@contextmanager
def _given(model: str, chosen: dict[str, str | int], keep: bool, peer: str | None) -> Iterator[_Model]:
    """A model that is there."""
    from mixtral.api import folder_of
    from mixtral.errors import ConfigError
    from mixtral.weights import find_gguf, is_compact

    told = [f"--{name}" for name in (*chosen, *(["keep"] if keep else []))]
    if told:
        raise ConfigError(f"--model and {', '.join(told)} are given; the latter make random weights", param="model")
    folder = folder_of(model)
    if is_compact(folder):
        raise ConfigError(
            f"{model}: the compact format is not measured; `mixtral quantize {model} FILE.gguf --format q8_0` makes a "
            "file that is",
            param="model",
        )
    files = folder.is_dir() and any(folder.glob("*.safetensors"))
    yield _opened(folder if files else find_gguf(folder) or folder, {}, peer)


@contextmanager
def _made(chosen: dict[str, str | int], keep: bool, peer: str | None) -> Iterator[_Model]:
    """Random weights in a temporary folder."""
    from mixtral.bench.sides import PEERS
    from mixtral.quant.mixes import MIXES

    folders = peer is not None and PEERS[peer].reads == "folder"
    made = {"preset": "8x7b", "layers": 4, "format": "bf16" if folders else "q4_k_m", **chosen}
    preset, form = str(made["preset"]), str(made["format"])
    name = f"random-{preset}-{made['layers']}-layers.{form}"
    folder = Path(tempfile.mkdtemp(prefix="mixtral-bench-"))
    try:
        target = folder / (f"{name}.gguf" if form in MIXES and not folders else name)
        yield _opened(create(target, preset, form, layers=int(made["layers"])).path, made, peer)
    finally:
        if keep and any(folder.iterdir()):
            output.say(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


def _opened(path: Path, made: dict[str, str | int], peer: str | None) -> _Model:
    """The model of these files, if the peer reads such."""
    from mixtral.bench.sides import PEERS
    from mixtral.bench.traffic import weights_of
    from mixtral.errors import ConfigError
    from mixtral.weights.checkpoint import open_checkpoint

    reads = None if peer is None else PEERS[peer].reads
    if reads == "file" and path.is_dir():
        raise ConfigError(
            f"{peer} reads GGUF files, and {path.name} is a folder; choose a format of GGUF files, or `mixtral convert "
            "--to gguf`",
            param="model",
        )
    if reads == "folder" and not (path / "config.json").is_file():
        raise ConfigError(
            f"{peer} reads folders with Hugging Face's names, and {path.name} is none; choose the format bf16, or "
            "`mixtral convert --to hf-per-expert`",
            param="model",
        )
    return _Model(path, weights_of(open_checkpoint(path)), made)


def _measure(plan: _Plan, model: _Model, command: str) -> None:
    """Start the sides and do the work; the lines of the table are put out as soon as they are known."""
    from mixtral.bench.limits import measure
    from mixtral.bench.machine import machine
    from mixtral.bench.report import HEADER, lines, row_of
    from mixtral.bench.turns import check, settings_of, started, take_turns

    weights, config = model.weights, model.weights.config
    check(config, plan.work, plan.turns)
    settings = settings_of(str(model.path), config, plan.work, threads=plan.threads, turns=plan.turns)
    settings["packed_cache"] = None if plan.packed_cache is None else str(plan.packed_cache)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "model": {
            "name": model.path.name,
            "bytes": weights.total,
            "formats_of_experts": list(weights.formats),
            "random": model.made or None,
            "config": dataclasses.asdict(config),
        },
    }
    title = f"{model.path.name}: {weights.total / 1e9:,.2f} GB, {plan.threads} threads"
    output.say(f"{title}, experts in {', '.join(weights.formats)}; medians of {plan.turns} turns")
    rows: list[Row] = []
    try:
        with started(plan.sides, settings, timeout_s=plan.timeout_s, told=output.note) as running:
            about["versions"] = {side.name: side.versions for side in running}
            output.say(HEADER)
            for one in plan.work:
                found = take_turns(
                    running,
                    one,
                    turns=plan.turns,
                    vocab_size=config.vocab_size,
                    limits=lambda: measure(plan.threads),
                    told=output.note,
                )
                rows.append(row_of(found, weights, turns=plan.turns))
                for line in lines(rows[-1]):
                    output.say(line)
    finally:  # it takes long: an error or Ctrl-C loses nothing that is finished
        if rows:
            _write(rows, about, plan, f"{title}, {about['date'][:10]}")


def _write(rows: list[Row], about: dict[str, Any], plan: _Plan, title: str) -> None:
    from mixtral.bench.plot import write_plot
    from mixtral.bench.report import to_json
    from mixtral.errors import ConfigError

    for option, path in (("json", plan.json_path), ("plot", plan.plot)):
        try:
            if path is not None and option == "plot":
                write_plot(path, rows, title)
            elif path is not None:
                path.write_text(json.dumps(to_json(rows, **about), indent=2) + "\n", encoding="utf-8")
        except OSError as problem:  # not every one of them names the file
            raise ConfigError(f"{path}: cannot be written ({problem.strerror})", param=option) from None


def _command(plan: _Plan, options: dict[str, str | int | None]) -> str:
    """A command that does the same, with all that was chosen by default."""
    given: list[tuple[str, str | int | None]] = [*options.items()]
    for option, kind in (("tokens", "prefill"), ("depth", "context")):
        given += [(option, one.prompt) for one in plan.work if one.kind == kind]
    given += [("sequences", one.sequences) for one in plan.work if one.kind == "batch"]
    given += [("steps", max(one.steps for one in plan.work) or None), ("turns", plan.turns), ("threads", plan.threads)]
    words = ["mixtral", "bench", *dict.fromkeys(one.kind for one in plan.work)]
    for name, value in given:
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)
