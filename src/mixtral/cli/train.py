"""``mixtral train``: pretrain on the generated text, and export a run as a model that can be loaded."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.cli import output, ranks

if TYPE_CHECKING:
    from mixtral.train.pretrain import StepReport

__all__ = ["Progress", "Stop", "app", "export", "pretrain"]

_RECENT = 0.1  # weight of the newest step in the mean time of a step

app = typer.Typer(help="Pretrain a model, and export it.", rich_markup_mode=None)


@app.command("pretrain")
def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file: model, data, optim, run.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that holds states is continued.")],
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=0.0, help="Save and end after this time; default: no limit.")
    ] = None,
    parallel: Annotated[str | None, typer.Option("--parallel", metavar="AXES", help=ranks.HELP)] = None,
) -> None:
    """Train from nothing, or go on with a run. Ctrl-C or SIGTERM ends it after the step, saved."""
    from mixtral.train.config import read_pretrain_config
    from mixtral.train.pretrain import pretrain as train

    settings = read_pretrain_config(config)
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["train", "pretrain", str(config), "--out", str(out), "--parallel", parallel or ""]
    arguments += [] if max_seconds is None else ["--max-seconds", str(max_seconds)]
    with Stop.on_signals() as stop:
        if ranks.launched_ranks(parallel, arguments, lambda: stop.wanted):
            return
        progress = Progress(settings.run.steps, stop)
        with ranks.joined(parallel) as (mesh, is_orphan):
            run = train(
                settings,
                out,
                on_step=progress.show,
                on_validation=progress.show_validation,
                max_seconds=max_seconds,
                stopping=lambda: stop.wanted or is_orphan(),
                mesh=mesh,
            )
    if not mesh.is_first:
        return
    steps = settings.run.steps
    rest = "" if run.steps_done >= steps else f" of {steps}; the same command goes on from here"
    output.say(f"{out}: {run.steps_done} steps, {run.tokens_total:,} tokens{rest}")


@app.command("export")
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the model; its files are replaced.")],
) -> None:
    """Write the newest state of a run as a model folder: int8 groups, as the embedded model has them."""
    from mixtral.train.export import export_run

    export_run(run_folder, destination)
    output.say(f"{destination}: written; try `mixtral chat --model {destination}`")


class Stop:
    """Whether the run shall end after the present step."""

    def __init__(self) -> None:
        self.wanted = False

    @classmethod
    @contextmanager
    def on_signals(cls) -> Iterator[Stop]:
        """SIGINT and SIGTERM set ``wanted`` once; a second signal does what it did before."""
        stop = cls()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def on_signal(number: int, frame: FrameType | None) -> None:
            stop.wanted = True
            restore()

        for number in before:
            signal.signal(number, on_signal)
        try:
            yield stop
        finally:
            restore()


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
        """Step, losses, speed, the shares of the least and most used expert (1 is balance), and the time left."""
        left = round((self.steps - report.step) * seconds_per_step)
        return (
            f"step {report.step}/{self.steps}  loss {report.loss:.4f}  {report.tokens / report.seconds:,.0f} tok/s  "
            f"balance {report.balance:.3f}  load {report.load_min:.2f}..{report.load_max:.2f}  "
            f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )

    def _say(self, line: str) -> None:
        try:
            output.say(line)
        except (output.PipeClosedError, OSError):  # a full disk is no reason to lose what was trained
            self._stop.wanted = True
