"""``mixtral batch``: answer a file of requests, as the HTTP interface would, without a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mixtral.cli import output
from mixtral.cli.generate import (
    DecodeOption,
    DeviceOption,
    DtypeOption,
    KvCacheOption,
    ModelOption,
    PackedCacheOption,
    ReferenceOption,
    ThreadsOption,
)
from mixtral.cli.serving import (
    AdaptersOption,
    CacheMemoryOption,
    ContextOption,
    SequencesOption,
    ServedNameOption,
    StepTokensOption,
    start_of,
)

__all__ = ["run"]

_NOTE_S = 10.0


def run(
    context: typer.Context,
    requests: Annotated[Path, typer.Argument(help="File with one request per line, in OpenAI's batch format.")],
    answers: Annotated[Path, typer.Argument(help="File for the answers; an interrupted run goes on with it.")],
    errors: Annotated[Path, typer.Option(help="File for what could not be answered.")],
    model: ModelOption = "embedded",
    served_model_name: ServedNameOption = None,
    max_model_len: ContextOption = None,
    max_num_seqs: SequencesOption = 64,
    max_num_batched_tokens: StepTokensOption = 512,
    kv_cache_memory: CacheMemoryOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    decode: DecodeOption = False,
    reference: ReferenceOption = False,
    kv_cache_dtype: KvCacheOption = None,
    packed_cache: PackedCacheOption = None,
    adapter: AdaptersOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Answer a file of requests; a run that was interrupted goes on where it was."""
    from mixtral.build import build_engine
    from mixtral.engine.loop import EngineThread
    from mixtral.server import Client, ServerConfig
    from mixtral.server.batch import BatchFiles, run_batch

    start = start_of(context.params)
    files = BatchFiles(requests, answers, errors)
    # An engine in this process that failed is not built again: the next run goes on instead.
    engine = Client(lambda: EngineThread(lambda: build_engine(start)), ServerConfig(engine_deaths=1))
    progress = _Progress()
    done, failed = run_batch(engine, files, at_once=2 * max_num_seqs, on_line=progress)
    output.note(f"{done} answers in {answers}, {failed} errors in {errors}")


class _Progress:
    """Says every now and then how many lines are done."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= _NOTE_S:
            self._said = time.monotonic()
            output.note(f"{done} of {total} lines")
