"""``mixtral quantize``: a smaller GGUF file, or a folder of integers, and with ``--check`` how much worse it is."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.cli import output
from mixtral.cli.convert import copy_beside

if TYPE_CHECKING:
    from mixtral.weights.importance import Coverage

__all__ = ["run"]

_LISTED = 8


def run(
    source: Annotated[str, typer.Argument(metavar="SRC", help='Folder, GGUF file, or "embedded".')],
    target: Annotated[Path, typer.Argument(metavar="DST", help="File to write, NAME.gguf; of integers a folder.")],
    form: Annotated[
        str, typer.Option("--format", help="q8_0, q6_k, q5_k_m, q4_k_m, q3_k_m, q2_k ...; int8, int4_g32 to int3_g128.")
    ],
    importance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What llama-imatrix wrote: the columns that matter most.")
    ] = None,
    check: Annotated[Path | None, typer.Option(help="Text (UTF-8) on which both models are compared.")] = None,
    tokens: Annotated[int, typer.Option(help="At most this many tokens of --check.", min=2, max=65536)] = 2048,
    unpickle: Annotated[bool, typer.Option("--unpickle", help="Read .pth and .pt, from a source you trust.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Write a model in a quantised format; one matrix is in memory at a time, two models with --check."""
    from mixtral.api import folder_of
    from mixtral.errors import ConfigError, RequestError
    from mixtral.plan import count_parameters
    from mixtral.quant.mixes import MIXES
    from mixtral.quant.rtn import INT_FORMS
    from mixtral.tokenizer import gguf_vocabulary
    from mixtral.weights.convert import convert, convert_to_gguf

    if form not in MIXES and form not in INT_FORMS:
        raise ConfigError(
            f"--format is {form!r}; a GGUF file can be {', '.join(MIXES)}; a folder of integers {', '.join(INT_FORMS)}",
            param="format",
        )
    if form in INT_FORMS and importance is not None:
        raise ConfigError(f"--importance is for GGUF formats; {form} takes none", param="importance")

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
        if form in INT_FORMS:
            write = partial(convert, layout="per-expert")
        else:
            write = partial(convert_to_gguf, importance=importance, vocabulary=gguf_vocabulary)
        moved = write(folder_of(source), target, form=form, unpickle=unpickle, overwrite=overwrite, progress=progress)
    seconds = time.perf_counter() - started
    bits = 8 * moved.size_bytes / count_parameters(moved.config).total
    output.say(f"{target}: {form}, {moved.size_bytes / 1e9:,.2f} GB, {bits:.2f} bits per weight, in {seconds:,.1f} s")
    if form in INT_FORMS:
        copy_beside(folder_of(source), target, None, overwrite)
    if moved.coverage is not None:
        _report(moved.coverage)
    if text is not None:
        _compare(source, target, text, tokens, unpickle)


def _report(covered: Coverage) -> None:
    from mixtral.weights.importance import FEW_TOKENS

    tensors = [f"{name} ({count})" if count > 1 else name for name, count in covered.without.items()]
    experts = [f"expert {expert} of layer {layer}" for layer, expert in covered.unseen]
    rows = [
        ("matrices with importance", f"{covered.weighted:,}"),
        ("matrices without", f"{sum(covered.without.values()):,}{_some(tensors)}"),
        ("in formats that take none, or copied", f"{covered.other:,}"),
        ("experts without tokens or entries", f"{len(experts):,}{_some(experts)}"),
    ]
    if covered.scarce:
        rows.append((f"experts with less than {FEW_TOKENS} tokens", f"{len(covered.scarce):,}"))
    output.pairs(f"{covered.importance.path.name}: {covered.importance.entries:,} entries", rows)


def _some(names: list[str]) -> str:
    """The first of them, as the rest of a line that begins with their number."""
    more = ", ..." if len(names) > _LISTED else ""
    return f": {', '.join(names[:_LISTED])}{more}" if names else ""


def _compare(source: str, target: Path, text: str, tokens: int, unpickle: bool) -> None:
    import mixtral
    from mixtral.evaluate.divergence import compare

    # Without the compiled kernels, which also round activations: only the weights are compared.
    llm = mixtral.load(source, dtype="float32", unpickle=unpickle, reference=True)
    # The source spells the text: the embedded model replaces rare ids, and both models must see the same ones.
    ids = llm.tokenizer.encode(text, bos=True)[: min(tokens, llm.config.max_position_embeddings)]
    before = llm.logits(ids).numpy()
    del llm
    found = compare(before, mixtral.load(target, dtype="float32", reference=True).logits(ids).numpy(), ids)
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
