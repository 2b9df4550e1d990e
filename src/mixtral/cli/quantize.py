"""``mixtral quantize``: a smaller GGUF file, and with ``--check`` how much worse it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mixtral.cli import output

__all__ = ["run"]


def run(
    source: Annotated[str, typer.Argument(metavar="SRC", help='Folder, GGUF file, or "embedded".')],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The file to write: NAME.gguf.")],
    form: Annotated[str, typer.Option("--format", help="q8_0, q6_k, q5_k_m, q4_k_m, q4_k_s, q3_k_m, q2_k, q4_0 ...")],
    check: Annotated[Path | None, typer.Option(help="Text (UTF-8) on which both models are compared.")] = None,
    tokens: Annotated[int, typer.Option(help="At most this many tokens of --check.", min=2, max=65536)] = 2048,
    unpickle: Annotated[bool, typer.Option("--unpickle", help="Read .pth and .pt, from a source you trust.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Write a model in a quantised format; one matrix is in memory at a time, two models with --check."""
    from mixtral.api import folder_of
    from mixtral.errors import RequestError
    from mixtral.plan import count_parameters
    from mixtral.tokenizer import gguf_vocabulary
    from mixtral.weights.convert import convert_to_gguf

    text = None
    if check is not None:
        try:
            text = check.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{check}: not UTF-8 (byte {error.start})", param="check") from None
        if not text.strip():
            raise RequestError(f"{check}: holds no text", param="check")
    started = time.perf_counter()
    with output.progress("quantising") as progress:
        moved = convert_to_gguf(
            folder_of(source),
            target,
            form=form,
            vocabulary=gguf_vocabulary,
            unpickle=unpickle,
            overwrite=overwrite,
            progress=progress,
        )
    seconds, size = time.perf_counter() - started, target.stat().st_size
    bits = 8 * moved.size_bytes / count_parameters(moved.config).total
    output.say(f"{target}: {form}, {size / 1e9:,.2f} GB, {bits:.2f} bits per weight, in {seconds:,.1f} s")
    if text is not None:
        _compare(source, target, text, tokens, unpickle)


def _compare(source: str, target: Path, text: str, tokens: int, unpickle: bool) -> None:
    import mixtral
    from mixtral.evaluate.divergence import compare

    llm = mixtral.load(source, dtype="float32", unpickle=unpickle)
    # The source spells the text: the embedded model replaces rare ids, and both models must see the same ones.
    ids = llm.tokenizer.encode(text, bos=True)[: min(tokens, llm.config.max_position_embeddings)]
    before = llm.logits(ids).numpy()
    del llm
    found = compare(before, mixtral.load(target, dtype="float32").logits(ids).numpy(), ids)
    first, second = found.perplexity
    output.pairs(
        f"on {len(ids):,} tokens",
        [
            ("perplexity before", f"{first:.4f}"),
            ("perplexity after", f"{second:.4f}"),
            ("KL divergence, mean", f"{found.kl_mean:.6f} nats"),
            ("KL divergence, 99 %", f"{found.kl_99:.6f} nats"),
            ("same most likely token", f"{100 * found.same_top:.2f} %"),
        ],
    )
