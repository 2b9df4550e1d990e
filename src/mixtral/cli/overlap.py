"""``mixtral overlap``: what the held-out suites of the town desk share with the documents that a run has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mixtral.cli import output
from mixtral.errors import ConfigError

__all__ = ["run"]


def run(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `mixtral train pretrain`.")],
    suite: Annotated[list[str] | None, typer.Option(help="Suite to compare; may be repeated; default: all.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Documents of each suite.")] = 1000,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Held-out split.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the held-out documents.")] = 1,
) -> None:
    """Compare held-out prompts with everything that was trained: equal ones, and sequences of 13 tokens."""
    from mixtral.desk.write import SUITES
    from mixtral.evaluate.overlap import overlaps, to_markdown

    trained_seed, mixture, trained = _read(folder)
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
        trained_seed=trained_seed,
        mixture=mixture,
        on_part=on_part,
    )
    output.write(to_markdown(rows))


def _read(folder: Path) -> tuple[int, dict[str, int], int]:
    """Seed, mixture and number of the documents that a run has trained, from its record."""
    path = folder / "record.json"
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        data = record["data"]
        found = int(record["seeds"]["data"]), dict(data["mixture_percent"]), int(data["documents"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: expected the record of a run of `mixtral train pretrain`", param="folder") from None
    if found[2] < 1:
        raise ConfigError(f"{path}: the run has not trained anything yet", param="folder")
    return found
