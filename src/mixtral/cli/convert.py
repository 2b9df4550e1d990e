"""``mixtral convert``: a checkpoint of any layout, written in another one."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.cli import output

if TYPE_CHECKING:
    from mixtral.weights.names import Layout

__all__ = ["LAYOUTS", "check_options", "copy_beside", "run"]

LAYOUTS: dict[str, Layout] = {"hf": "fused", "hf-per-expert": "per-expert", "consolidated": "consolidated"}


def run(
    source: Annotated[str, typer.Argument(metavar="SRC", help='Folder, GGUF file, or "embedded".')],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, new or empty; or file.gguf.")],
    to: Annotated[str, typer.Option("--to", help="hf (fused names), hf-per-expert, consolidated, gguf.")],
    form: Annotated[
        str | None, typer.Option("--format", help="Of gguf: q8_0, q4_k_m ...; of hf-per-expert: int4_g128 ...")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Not gguf: bfloat16, float16, float32; default: as is.")] = None,
    vocab: Annotated[str | None, typer.Option(help="v1 or v3: move to that vocabulary.")] = None,
    unpickle: Annotated[bool, typer.Option("--unpickle", help="Read .pth and .pt, from a source you trust.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DST.")] = False,
) -> None:
    """Write a checkpoint in another layout; values stay bit for bit, unless --dtype or --format rounds them.

    Into a folder, the tokenizer and other small files beside the weights are copied too, unless --vocab changes it.
    """
    from mixtral.api import folder_of
    from mixtral.tokenizer import gguf_vocabulary
    from mixtral.weights import dtype_of
    from mixtral.weights.convert import convert, convert_to_gguf
    from mixtral.weights.upgrade import VOCABULARIES

    check_options(to, form, dtype, vocab)
    wanted = VOCABULARIES[vocab] if vocab else None
    started = time.perf_counter()
    if to == "gguf":
        write = partial(convert_to_gguf, vocabulary=gguf_vocabulary)
    else:
        write = partial(convert, layout=LAYOUTS[to], dtype=dtype_of(dtype))
    with output.progress("writing") as progress:
        moved = write(
            folder_of(source),
            target,
            form=form,
            vocab_size=wanted,
            unpickle=unpickle,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    size = moved.size_bytes / 1e9
    output.say(f"{source}: {moved.layout}, {moved.tensors:,} tensors")
    output.say(f"{target}: {to}, {size:,.2f} GB in {seconds:,.1f} s ({size / seconds:,.2f} GB/s)")
    if to != "gguf":
        copy_beside(folder_of(source), target, wanted, overwrite)


def check_options(to: str, form: str | None, dtype: str | None, vocab: str | None) -> None:
    from mixtral.errors import ConfigError
    from mixtral.weights.upgrade import VOCABULARIES

    if to not in (*LAYOUTS, "gguf"):
        raise ConfigError(f"--to is {to!r}; expected one of {', '.join([*LAYOUTS, 'gguf'])}", param="to")
    unused = (("--dtype", dtype, to == "gguf"), ("--format", form, to not in ("gguf", "hf-per-expert")))
    for option, given, other in unused:
        if given is not None and other:
            raise ConfigError(f"{option} is {given!r}, but --to is {to}; use the other one of --dtype and --format")
    if vocab is not None and vocab not in VOCABULARIES:
        raise ConfigError(f"--vocab is {vocab!r}; expected one of {', '.join(VOCABULARIES)}", param="vocab")


def copy_beside(source: Path, target: Path, vocab_size: int | None, overwrite: bool) -> None:
    """Copy the tokenizer and other small files beside the weights of a folder, and say which."""
    from mixtral.weights import respelling_of, write_respelling
    from mixtral.weights.checkpoint import read_any_config
    from mixtral.weights.companions import companions, copy_companions

    names = companions(source)
    same = vocab_size is None or vocab_size == read_any_config(source).vocab_size
    write_respelling(target, respelling_of(source) if same else {})
    if not same:
        if names:
            output.say(f"not copied, as they belong to the old vocabulary: {', '.join(names)}")
        return
    done = copy_companions(names, source, target, overwrite=overwrite)
    if done.names:
        output.say(f"copied beside it: {', '.join(done.names)}")
    for name, reason in done.skipped.items():
        output.say(f"not copied: {name}: {reason}")
