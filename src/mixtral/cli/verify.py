"""``mixtral verify``: whether a checkpoint is whole, and the sha256 of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtral.cli import output

__all__ = ["run"]


def run(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or GGUF file.")],
    against: Annotated[Path | None, typer.Option(help="A list as sha256sum writes it, to compare with.")] = None,
    unpickle: Annotated[bool, typer.Option("--unpickle", help="Read .pth and .pt, from a source you trust.")] = False,
) -> None:
    """Read everything: headers, shapes, every value, every file. Prints lines as sha256sum does; exit code 2 if not."""
    from mixtral.files.sums import read_sums
    from mixtral.weights.verify import verify

    sums = None if against is None else read_sums(against)
    with output.progress("reading") as progress:
        found, files = verify(source, sums=sums, unpickle=unpickle, progress=progress)
    for name, digest in files.items():
        output.say(f"{digest}  {name}")
    output.note(f"{source}: {found.layout}, {len(found.entries):,} tensors, every value finite")
