"""The command ``mixtral``: its table of commands, and how errors become one line and an exit code.

Exit codes: 0 done, 1 a fault of this program or a reader that went away, 2 wrong input (user or file) or output that
cannot be written, 70 an engine process that ends again and again, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from mixtral.cli import (
    adapter,
    batch,
    bench,
    chat,
    convert,
    evaluate,
    generate,
    init,
    inspect,
    output,
    overlap,
    quantize,
    serve,
    train,
    verify,
)
from mixtral.errors import EngineError, MixtralError

__all__ = ["app", "main"]

app = typer.Typer(
    name="mixtral",
    help="Run, serve, train and understand Mixtral sparse mixture-of-experts models.",
    add_completion=False,
    rich_markup_mode=None,  # plain help texts: quick, and the same in every terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.run)
app.command("chat")(chat.run)
app.command("inspect")(inspect.run)
app.command("convert")(convert.run)
app.command("quantize")(quantize.run)
app.command("verify")(verify.run)
app.command("init")(init.run)
app.command("bench")(bench.run)
app.command("batch")(batch.run)
app.command("serve", context_settings=serve.CONTEXT)(serve.run)
app.command("evaluate")(evaluate.run)
app.command("overlap")(overlap.run)
app.add_typer(train.app, name="train")
app.add_typer(adapter.app, name="adapter")


def _show_version(wanted: bool) -> None:
    if wanted:
        from mixtral import __version__

        output.say(f"mixtral {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: the process's arguments) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    output.prepare()
    try:
        return _run(given)
    except output.PipeClosedError:
        output.silence()
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as problem:
        if _wants_debug(given):
            traceback.print_exception(problem)
        return _report(problem)


def _run(arguments: Sequence[str]) -> int:
    if not arguments:
        arguments = ["--help"]
    result = typer.main.get_command(app).main(list(arguments), prog_name="mixtral", standalone_mode=False)
    return result if isinstance(result, int) else 0


def _report(problem: Exception) -> int:
    """Print an error as one line; returns the exit code."""
    if isinstance(problem, MixtralError):
        output.error(str(problem))
        return 70 if isinstance(problem, EngineError) else 2
    if isinstance(problem, typer.TyperException):
        output.error(problem.format_message())
        return 2
    if isinstance(problem, OSError) and problem.filename is not None:
        output.error(f"{problem.filename}: {problem.strerror}")
        return 2
    output.error(f"internal: {type(problem).__name__}: {problem}. `mixtral --debug ...` shows where")
    return 1


def _wants_debug(arguments: Sequence[str]) -> bool:
    """Whether ``--debug`` stands before the command."""
    for argument in arguments:
        if not argument.startswith("-"):
            return False
        if argument == "--debug":
            return True
    return False
