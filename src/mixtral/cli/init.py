"""``mixtral init``: a model of random weights in the sizes of a preset, for measuring and for trying out programs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.cli import output

if TYPE_CHECKING:
    from mixtral.bench.random_model import Created

__all__ = ["create", "run"]


def run(
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder, or the GGUF file to write, NAME.gguf.")],
    preset: Annotated[str, typer.Option(help="Sizes: 8x7b, 8x22b or tiny.")] = "8x7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers; default: all of the preset.")] = None,
    experts: Annotated[int | None, typer.Option(min=2, help="Experts; default: those of the preset.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="bf16, f16, f32; q8_0, q6_k, q4_k_m ...; int8, int4_g32 to int3_g128.")
    ] = "bf16",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in DST.")] = False,
) -> None:
    """Write a model of random weights: what it says means nothing, but it is as large and as fast as a trained one.

    In a folder, bf16, f16, f32 and integers are safetensors, and all else is one GGUF file. Nothing is encoded, so the
    disk sets the time.
    """
    started = time.perf_counter()
    made = create(target, preset, form, layers=layers, experts=experts, seed=seed, overwrite=overwrite)
    seconds, size = time.perf_counter() - started, made.size_bytes / 1e9
    speed = f"in {seconds:,.1f} s ({size / seconds:,.2f} GB/s)"
    output.say(f"{made.path}: {form}, {made.tensors:,} tensors, {size:,.2f} GB {speed}")


def create(
    target: Path,
    preset: str,
    form: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Created:
    """Write a model with some numbers of a preset changed, showing progress.

    Raises:
        ConfigError, CheckpointError: as ``preset`` and ``create_model``.
    """
    from mixtral.bench.random_model import create_model
    from mixtral.config import preset as preset_of
    from mixtral.tokenizer import gguf_vocabulary

    config = preset_of(preset)
    config = config.replace(
        num_hidden_layers=layers or config.num_hidden_layers,
        num_local_experts=experts or config.num_local_experts,
    )
    name = f"random-{preset.lower()}-{config.num_hidden_layers}-layers"
    with output.progress("writing") as progress:
        return create_model(
            config,
            target,
            form=form,
            name=name,
            vocabulary=gguf_vocabulary,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
