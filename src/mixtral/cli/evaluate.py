"""``mixtral evaluate``: score a model on the held-out suites of the town desk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixtral.cli import answers, output
from mixtral.cli.generate import (
    AdapterOption,
    DecodeOption,
    DeviceOption,
    DtypeOption,
    KvCacheOption,
    ModelOption,
    ReferenceOption,
    ThreadsOption,
)
from mixtral.errors import ConfigError

if TYPE_CHECKING:
    from mixtral.evaluate.desk import SuiteScore

__all__ = ["run"]


def run(
    model: ModelOption = "embedded",
    suite: Annotated[list[str] | None, typer.Option(help="Suite to score; may be repeated; default: all.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Documents of each suite.")] = 100,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Held-out split.")] = "validation",
    seed: Annotated[int, typer.Option(help="Seed of the documents.")] = 1,
    grammar: Annotated[
        bool, typer.Option("--grammar", help="Enforce the form of answers: schemas of records, functions on offer.")
    ] = False,
    samples: Annotated[
        int,
        typer.Option(min=1, max=32, help="Answers that vote on each sum, at temperature 0.7; 1 is one greedy answer."),
    ] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the scores as JSON.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    decode: DecodeOption = False,
    reference: ReferenceOption = False,
    kv_cache_dtype: KvCacheOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Score a model on held-out documents. Greedy answers, checked; with intervals and trivial baselines."""
    from mixtral.api import load
    from mixtral.desk.write import SUITES
    from mixtral.evaluate.desk import score, to_json, to_markdown

    chosen = list(dict.fromkeys(suite or SUITES))
    unknown = [name for name in chosen if name not in SUITES]
    if unknown:
        raise ConfigError(f"unknown suite {unknown[0]!r}; expected one of {', '.join(SUITES)}", param="suite")
    if samples > 1 and (grammar or not all(name.startswith("sums/") for name in chosen)):
        raise ConfigError("--samples is for suites of sums, without --grammar; name them with --suite", param="samples")
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise ConfigError(f"--json is {str(json_path)!r}; expected a file in an existing folder", param="json")
    held = {"device": device, "dtype": dtype, "decode": decode, "reference": reference, "kv_dtype": kv_cache_dtype}
    llm = load(model, threads=threads, adapter=adapter, **held)  # type: ignore[arg-type]

    def on_batch(name: str, answered: int, total: int) -> None:
        output.note(f"{name}: {answered} of {total} answered")

    if samples > 1:
        answerer, decoding = answers.voter(llm, samples, on_batch), f"majority of {samples} at {answers.TEMPERATURE}"
    elif grammar:
        answerer, decoding = answers.formed_answerer(llm, on_batch), "greedy, form enforced"
    else:
        answerer, decoding = answers.answerer(llm, on_batch), "greedy"
    scores: list[SuiteScore] = []
    try:
        for name in chosen:
            scores += score(answerer, [name], count, seed=seed, split=split)
    finally:  # scoring takes long: an error or Ctrl-C loses no suite that is finished
        if scores:
            output.write(to_markdown(scores))
    if json_path is not None:
        try:
            json_path.write_text(to_json(scores, split=split, seed=seed, decoding=decoding), encoding="utf-8")
        except OSError as problem:  # not every one of them names the file
            raise ConfigError(f"{json_path}: cannot be written ({problem.strerror})", param="json") from None
