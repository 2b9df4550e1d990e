"""``mixtral train``: pretraining on generated text, SFT and DPO on the user's, and export of a run as a model."""

from __future__ import annotations

import math
import os
import signal
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.cli import output, ranks
from mixtral.errors import MixtralError

if TYPE_CHECKING:
    from mixtral.train.fine import FineTuning
    from mixtral.train.lines import BadLinesError
    from mixtral.train.loop import StepReport

__all__ = ["Progress", "Stop", "app", "dpo", "export", "pretrain", "sft"]

_RECENT = 0.1  # weight of the newest step in the mean time of a step

Out = Annotated[Path, typer.Option(help="Folder of the run; one that holds states is continued.")]
MaxSeconds = Annotated[
    float | None, typer.Option("--max-seconds", min=0.0, help="Save and end after this time; default: no limit.")
]
Parallel = Annotated[str | None, typer.Option("--parallel", metavar="AXES", help=ranks.HELP)]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, mps ...; default: cpu, with --parallel accelerators if any.")
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write event files for TensorBoard.")]
Config = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file: model, data, optim, run, adapter ...")
]
ModelPath = Annotated[str | None, typer.Option("--model", help='Folder, GGUF file, or "embedded" (the default).')]
Data = Annotated[str | None, typer.Option("--data", help="JSONL file to train.")]
Validation = Annotated[str | None, typer.Option("--validation", help="JSONL file to evaluate on.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Times that the file is trained; default 3.")]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="At its peak; default 3e-4.")]
WithAdapter = Annotated[bool, typer.Option("--adapter", help="Train a low-rank adapter, not all weights.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any value of the configuration.")
]

app = typer.Typer(help="Pretrain a model, fine-tune one, and export the result.", rich_markup_mode=None)


@app.command("pretrain")
def pretrain(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file: model, data, optim, run.")],
    out: Out,
    max_seconds: MaxSeconds = None,
    tensorboard: TensorBoard = False,
    parallel: Parallel = None,
    device: Device = None,
) -> None:
    """Train from nothing, or from the model of [start], or go on with a run. Ctrl-C or SIGTERM ends it after the step,
    saved."""
    from mixtral.train.config import read_pretrain_config
    from mixtral.train.pretrain import pretrain as train

    settings = read_pretrain_config(config)
    base = _begun_with(settings.start.path, out) if settings.start else None
    out.mkdir(parents=True, exist_ok=True)
    if _launched(context, parallel):
        return
    with (
        ranks.joined(parallel, device) as mesh,
        _told(
            out, settings.run.steps, tensorboard=tensorboard and mesh.is_first, one_of_many=not mesh.is_alone
        ) as told,
    ):
        run = train(settings, out, mesh=mesh, base=base, **told.hooks(max_seconds))
    if mesh.is_first:
        told.done(out, run.steps_done, run.tokens_total)


@app.command("sft")
def sft(
    context: typer.Context,
    out: Out,
    config: Config = None,
    model: ModelPath = None,
    data: Data = None,
    validation: Validation = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    adapter: WithAdapter = False,
    set_values: Set = None,
    max_seconds: MaxSeconds = None,
    tensorboard: TensorBoard = False,
    parallel: Parallel = None,
    device: Device = None,
) -> None:
    """Fine-tune a model on conversations and texts. All lines are checked first; the same command goes on with a run.

    Lines are {"messages": [...], "tools": [...]} in OpenAI's format, or {"text": "..."}.
    """
    from mixtral.train.sft import sft as train
    from mixtral.train.tune import SftConfig

    values = _values(config, model, data, validation, epochs, learning_rate, adapter, set_values)
    settings = SftConfig.from_dict(values, source=config.name if config else "options")
    if not _launched(context, parallel):
        _fine_tune(train, settings, out, "documents", max_seconds, parallel, device, tensorboard=tensorboard)


@app.command("dpo")
def dpo(
    context: typer.Context,
    out: Out,
    config: Config = None,
    model: ModelPath = None,
    data: Data = None,
    validation: Validation = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    adapter: WithAdapter = False,
    set_values: Set = None,
    max_seconds: MaxSeconds = None,
    tensorboard: TensorBoard = False,
    parallel: Parallel = None,
    device: Device = None,
) -> None:
    """Train a model to prefer one answer to another. All lines are checked first; the same command goes on with a run.

    Lines are {"prompt": ..., "chosen": ..., "rejected": ...}: a prompt of messages or text, answers of one message or
    text.
    """
    from mixtral.train.dpo import dpo as train
    from mixtral.train.tune import DpoConfig

    values = _values(config, model, data, validation, epochs, learning_rate, adapter, set_values)
    settings = DpoConfig.from_dict(values, source=config.name if config else "options")
    if not _launched(context, parallel):
        _fine_tune(train, settings, out, "pairs", max_seconds, parallel, device, tensorboard=tensorboard)


@app.command("export")
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the model or the adapter.")],
    dtype: Annotated[str | None, typer.Option(help="Of an ordinary checkpoint: bfloat16, float16, float32.")] = None,
    averaged: Annotated[bool, typer.Option("--averaged", help="The averaged weights (optim.ema).")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into DST though it is not empty; a model there goes.")
    ] = False,
) -> None:
    """Write the newest state of a run as a folder: a model, or the adapter that was trained.

    A run on the embedded model, or from nothing, becomes int8 groups, as the embedded model has them, or with --dtype
    an ordinary checkpoint. Other runs of whole models become one in any case, by default in bfloat16.
    """
    from mixtral.adapters.peft import base_of
    from mixtral.train.export import export_run

    what = export_run(run_folder, destination, dtype=dtype, averaged=averaged, overwrite=overwrite)
    options = f"--model {base_of(destination)} --adapter" if "adapter" in what else "--model"
    output.say(f"{destination}: written, {what}; try `mixtral chat {options} {destination}`")


def _begun_with(path: str, out: Path) -> Path | None:
    """The model of [start]. A run that has states goes on without it, if it is gone."""
    from mixtral.api import folder_of

    try:
        return folder_of(path)
    except MixtralError:
        if any(out.glob("step-*")):
            return None
        raise


def _launched(context: typer.Context, parallel: str | None) -> bool:
    """Whether this command was to start the ranks, which is done then: they have trained to their end."""
    if not ranks.is_to_launch(parallel):
        return False
    with Stop.on_signals() as stop:
        ranks.launched(ranks.arguments_of(context), parallel, lambda: stop.wanted)
    return True


def _values(
    config: Path | None,
    model: str | None,
    data: str | None,
    validation: str | None,
    epochs: int | None,
    learning_rate: float | None,
    adapter: bool,
    set_values: list[str] | None,
) -> dict[str, Any]:
    """The tables of the file, changed by the options."""
    from mixtral.train.config import read_toml
    from mixtral.train.tune import with_changes

    given = {
        "model.path": model,
        "data.train": data,
        "data.validation": validation,
        "run.epochs": epochs,
        "optim.learning_rate": learning_rate,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= dict(_setting(text) for text in set_values or ())
    values = with_changes(read_toml(config) if config else {}, changes, config.name if config else "options")
    if adapter:
        values.setdefault("adapter", {})
    return values


def _setting(text: str) -> tuple[str, Any]:
    """``run.epochs=2``: the value as TOML has it, or else as text."""
    name, equals, value = text.partition("=")
    from mixtral.errors import ConfigError

    if not equals:
        raise ConfigError(f"--set is {text!r}; expected TABLE.KEY=VALUE", param="set")
    try:
        return name.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
    except (ValueError, RecursionError) as error:  # more digits than Python reads, or brackets without end
        raise ConfigError(f"--set {name.strip()}: not TOML ({error})", param="set") from None


def _fine_tune(
    train: Callable[..., FineTuning[Any, Any, Any]],
    settings: Any,
    out: Path,
    what: str,
    max_seconds: float | None,
    parallel: str | None,
    device: str | None,
    *,
    tensorboard: bool,
) -> None:
    from mixtral.api import folder_of
    from mixtral.train.lines import BadLinesError

    base = folder_of(settings.model.path)
    with (
        ranks.joined(parallel, device) as mesh,
        _told(
            out, settings.run.steps, tensorboard=tensorboard and mesh.is_first, one_of_many=not mesh.is_alone
        ) as told,
    ):

        def ready(run: FineTuning[Any, Any, Any]) -> None:
            told.steps = run.config.run.steps
            if not mesh.is_first:
                return
            trained = sum(parameter.numel() for parameter in run.optimizer.parameters.values())
            output.say(f"{settings.data.train}: {run.lines.told(what)}")
            output.say(f"{settings.model.path}: training {run.what}, {trained:,} numbers, {told.steps} steps")

        try:
            run = train(settings, out, base, on_ready=ready, mesh=mesh, **told.hooks(max_seconds))
        except BadLinesError as error:
            raise (_listed(error) if mesh.is_first else error) from None
    if mesh.is_first:
        told.done(out, run.steps_done, run.tokens_total)


def _listed(error: BadLinesError) -> Exception:
    """Put out every bad line; the error that ends the command."""
    from mixtral.errors import TrainingError

    for number, text in error.problems:
        output.note(f"{error.path}:{number}: {' '.join(text.split())}")
    return TrainingError(error.summary())


class _Told:
    """What a run tells while it goes on: the progress lines, TensorBoard, and the wish to stop."""

    def __init__(self, progress: Progress, board: Any, stop: Stop) -> None:
        self._progress, self._board, self._stop = progress, board, stop

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self._progress.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._progress.steps = steps

    def hooks(self, max_seconds: float | None) -> dict[str, Any]:
        """The arguments of a recipe."""
        return {
            "on_step": self._step,
            "on_validation": self._validation,
            "max_seconds": max_seconds,
            "stopping": lambda: self._stop.wanted,
        }

    def done(self, out: Path, steps_done: int, tokens: int) -> None:
        """Put out how far the run is."""
        rest = "" if steps_done >= self.steps else f" of {self.steps}; the same command goes on from here"
        output.say(f"{out}: {steps_done} steps, {tokens:,} tokens{rest}")

    def _step(self, report: StepReport) -> None:
        self._progress.show(report)
        if self._board is not None:
            self._board.step(report)

    def _validation(self, step: int, loss: float) -> None:
        self._progress.show_validation(step, loss)
        if self._board is not None:
            self._board.validation(step, loss)


@contextmanager
def _told(out: Path, steps: int, *, tensorboard: bool, one_of_many: bool = False) -> Iterator[_Told]:
    board = None
    if tensorboard:
        from mixtral.train.board import Board

        board = Board(out)
    with Stop.on_signals(one_of_many=one_of_many) as stop:
        try:
            yield _Told(Progress(steps, stop), board, stop)
        finally:
            if board is not None:
                board.close()


class Stop:
    """Whether the run shall end after the present step."""

    def __init__(self) -> None:
        self.wanted = False

    @classmethod
    @contextmanager
    def on_signals(cls, *, one_of_many: bool = False) -> Iterator[Stop]:
        """SIGINT and SIGTERM set ``wanted`` once; a second signal does what it did before.

        To one of many ranks signals come from the terminal and from the launcher: it lasts until the launcher ends it,
        or is gone itself.
        """
        stop = _OrphanStop(os.getppid()) if one_of_many else cls()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def on_signal(number: int, frame: FrameType | None) -> None:
            stop.wanted = True
            if not one_of_many:
                restore()

        for number in before:
            signal.signal(number, on_signal)
        try:
            yield stop
        finally:
            restore()


class _OrphanStop(Stop):
    """The same for a rank, which has nothing to train for without its launcher."""

    def __init__(self, parent: int) -> None:
        self._parent, self._asked = parent, False

    @property
    def wanted(self) -> bool:
        """Whether a signal came, or the launcher is gone."""
        return self._asked or os.getppid() != self._parent

    @wanted.setter
    def wanted(self, value: bool) -> None:
        self._asked = value


class Progress:
    """One line per step and per saved state. If it cannot be written any more, the run ends with its state saved."""

    def __init__(self, steps: int, stop: Stop) -> None:
        self.steps = steps
        self._stop = stop
        self._seconds: float | None = None

    def show(self, report: StepReport) -> None:
        """Put out the line of a finished step."""
        before = report.seconds if self._seconds is None else self._seconds
        self._seconds = before + _RECENT * (report.seconds - before)
        self._say(self.line(report, self._seconds))

    def show_validation(self, step: int, loss: float) -> None:
        """Put out the line of a saved state."""
        self._say(f"step {step}/{self.steps}  saved  validation loss {loss:.4f}")

    def line(self, report: StepReport, seconds_per_step: float) -> str:
        """Step, losses, speed, loads of the least and most used expert (1 is balance), what else the routers tell, and
        the time left."""
        left = round((self.steps - report.step) * seconds_per_step)
        return (
            f"step {report.step}/{self.steps}  loss {report.loss:.4f}  {report.highlights()}"
            f"{report.tokens / report.seconds:,.0f} tok/s  "
            f"balance {report.balance:.3f}  load {report.load_min:.2f}..{report.load_max:.2f}  "
            f"{self._health(report)}left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )

    def _health(self, report: StepReport) -> str:
        shown = "" if math.isnan(report.entropy) else f"entropy {report.entropy:.3f}  "
        if report.agreement < 1:
            shown += f"agreement {report.agreement:.3f}  "
        counts = {"dead": report.dead, "collapsed": report.collapsed, "skipped": report.skipped}
        return shown + "".join(f"{name} {count}  " for name, count in counts.items() if count)

    def _say(self, line: str) -> None:
        try:
            output.say(line)
        except (output.PipeClosedError, OSError):  # a full disk is no reason to lose what was trained
            self._stop.wanted = True
