"""``mixtral overlap``: what the held-out suites of the town desk share with the documents that a run has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mixtral.cli import output
from mixtral.errors import ConfigError

if TYPE_CHECKING:
    from mixtral.train.config import DataConfig

__all__ = ["run"]


def run(
    of: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run of `mixtral train pretrain`, or its configuration file."),
    ],
    suite: Annotated[list[str] | None, typer.Option(help="Suite to compare; may be repeated; default: all.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Documents of each suite.")] = 1000,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Held-out split.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the held-out documents.")] = 1,
) -> None:
    """Compare held-out prompts with everything that the run trained: equal ones, and sequences of 13 tokens.

    Of a configuration file with all that a run to its end trains. What a model of [start] was trained on is not in it.
    """
    from mixtral.desk.write import SUITES, generator_id
    from mixtral.evaluate.overlap import overlaps, to_markdown
    from mixtral.train.config import read_pretrain_config

    if of.is_file():
        planned = read_pretrain_config(of)
        config, trained = planned.data, planned.run.steps * planned.data.documents_per_step
        generators: Any = [[0, generator_id()]]
        begun = planned.start.path if planned.start else None
    else:
        config, trained, generators, begun = _read(of)
    if begun is not None:
        output.note(f"the run begins with {begun}: what that was trained on is not compared; compare its own run too")
    if generators != [[0, generator_id()]]:
        output.note(
            f"not all documents of {of} were written by this version of the generator, or its record does not say "
            "by which; compared is what this version writes"
        )
    parts = [trained * part // 10 for part in range(1, 11)]

    def on_part(done: int) -> None:
        while parts and done >= parts[0]:
            parts.pop(0)
            output.note(f"{done:,} of {trained:,} training documents read")

    rows = overlaps(
        list(dict.fromkeys(suite or SUITES)),
        count,
        seed=seed,
        split=split,
        trained=trained,
        trained_seed=config.seed,
        mixture_of=lambda number: config.mixture_at(number // config.documents_per_step),
        on_part=on_part,
    )
    output.write(to_markdown(rows))


def _read(folder: Path) -> tuple[DataConfig, int, Any, str | None]:
    """What decides the documents of a run, how many it has trained, what wrote them, and what it began with, from its
    record."""
    from mixtral.train.config import DataConfig

    path = folder / "record.json"
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        data = record["data"]
        found = DataConfig(
            seed=record["seeds"]["data"],
            documents_per_step=record["training"]["documents_per_step"],
            mixture=data["mixture_percent"],
            later=data.get("mixture_later", {}),
        )
        trained = int(data["documents"])
        begun = None if record.get("base", "none") == "none" else str(record["base"]["path"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: expected the record of a run of `mixtral train pretrain`", param="folder") from None
    if trained < 1:
        raise ConfigError(f"{path}: the run has not trained anything yet", param="folder")
    return found, trained, data.get("generators"), begun
