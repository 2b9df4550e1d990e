"""``mixtral adapter``: what a LoRA adapter holds, other forms of it, and merging it into a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.cli import output
from mixtral.cli.convert import LAYOUTS, check_options, copy_beside

if TYPE_CHECKING:
    from mixtral.adapters import Factors
    from mixtral.adapters.peft import AdapterFile

__all__ = ["app", "experts", "export", "import_", "inspect", "merge"]

app = typer.Typer(help="Look into LoRA adapters, write them in other forms, and merge them.", rich_markup_mode=None)

_FORMS = ("peft", "per-expert", "mistral")
_PROBE = (
    "Good morning. I would like a double room for three nights from the fifth of May, with breakfast. How much is it, "
    "and when does the last tram leave for the harbour? Please answer in one sentence."
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help='The base: a folder, GGUF file, or "embedded".')]
AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Folder of PEFT's form, or with mistral-finetune's lora.safetensors.")
]
ScalingOption = Annotated[
    float | None, typer.Option(help="Of lora.safetensors, if params.json beside it does not say it (usually 2).")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is in DST.")]


@app.command("inspect")
def inspect(model: ModelArgument, adapter: AdapterArgument, scaling: ScalingOption = None) -> None:
    """What an adapter adds to which matrices of a base."""
    found = _read(model, adapter, scaling)
    numbers = sum(pair.a.numel() + pair.b.numel() for pair in found.factors.values())
    rows = [("form", found.kind), ("base, as it says", found.base or "-"), ("numbers", f"{numbers:,}")]
    if found.dropout:
        rows.append(("dropout in training", f"{found.dropout:g}"))
    output.pairs(str(adapter), [*rows, *_targets(found.factors)])


@app.command("import")
def import_(
    model: ModelArgument,
    adapter: AdapterArgument,
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    scaling: ScalingOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write an adapter of another form (older PEFT, single experts, mistral-finetune) in the form of PEFT 0.19 on."""
    from mixtral.adapters.peft import write_adapter
    from mixtral.api import folder_of
    from mixtral.weights.checkpoint import read_any_config

    found = _read(model, adapter, scaling)
    config = read_any_config(folder_of(model))
    write_adapter(target, config, found.factors, base=found.base, dropout=found.dropout, overwrite=overwrite)
    output.pairs(f"{target}: from {found.kind}", _targets(found.factors))


@app.command("export")
def export(
    model: ModelArgument,
    adapter: AdapterArgument,
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    to: Annotated[
        str, typer.Option("--to", help="peft (0.19 on), per-expert (PEFT, w1 to w3 of each expert), mistral.")
    ] = "peft",
    base: Annotated[
        str | None, typer.Option(help="Not mistral: name of the base to write into it; default: what it says.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of mistral: that of the model it is for; default: bfloat16.")
    ] = None,
    scaling: ScalingOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write an adapter for another program."""
    from mixtral.adapters.peft import write_adapter
    from mixtral.adapters.spread import write_mistral, write_per_expert
    from mixtral.api import folder_of
    from mixtral.errors import ConfigError
    from mixtral.weights import dtype_of
    from mixtral.weights.checkpoint import read_any_config

    if to not in _FORMS:
        raise ConfigError(f"--to is {to!r}; expected one of {', '.join(_FORMS)}", param="to")
    if dtype is not None and to != "mistral":
        raise ConfigError(f"--dtype is {dtype!r}, but --to {to} is always float32; leave it out", param="dtype")
    if base is not None and to == "mistral":
        raise ConfigError(f"--base is {base!r}, but --to mistral names no base; leave it out", param="base")
    kind = dtype_of(dtype or "bfloat16")
    found = _read(model, adapter, scaling)
    config, name = read_any_config(folder_of(model)), base or found.base
    if to == "peft":
        write_adapter(target, config, found.factors, base=name, dropout=found.dropout, overwrite=overwrite)
    elif to == "per-expert":
        write_per_expert(target, config, found.factors, base=name, overwrite=overwrite)
    elif kind is not None:
        write_mistral(target, config, found.factors, dtype=kind, overwrite=overwrite)
    output.say(f"{target}: {to}, {len(found.factors)} matrices or stacks adapted")


@app.command("merge")
def merge(
    model: ModelArgument,
    adapter: AdapterArgument,
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, new or empty; or file.gguf.")],
    to: Annotated[str, typer.Option("--to", help="hf (fused names), hf-per-expert, consolidated, gguf.")] = "hf",
    form: Annotated[
        str | None,
        typer.Option("--format", help="Quantise the sum; gguf: q8_0, q4_k_m ...; hf-per-expert: int4_g128 ..."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Not gguf: bfloat16, float16, float32; default: as is.")] = None,
    into_quantised: Annotated[
        bool, typer.Option("--into-quantised", help="Allow a quantised base, whose weights are rounded again.")
    ] = False,
    check: Annotated[
        Path | None, typer.Option(help="Text (UTF-8) on which the result is compared with base and adapter.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="At most this many tokens of the text.", min=2, max=65536)] = 512,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Compare weights alone, which needs little memory.")
    ] = False,
    scaling: ScalingOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Add an adapter to a checkpoint, one matrix at a time, and say how much of it the result holds."""
    from mixtral.api import folder_of
    from mixtral.weights import dtype_of

    check_options(to, form, dtype, None)
    text, kind = _text(check, "check"), dtype_of(dtype)
    source, found = folder_of(model), _read(model, adapter, scaling)
    started = time.perf_counter()
    options = {"form": form, "overwrite": overwrite} | ({} if to == "gguf" else {"dtype": kind})
    size = _write(source, target, to, found.factors, into_quantised=into_quantised, **options)
    seconds = time.perf_counter() - started
    output.say(f"{target}: {to}{f', {form}' if form else ''}, {size / 1e9:,.2f} GB in {seconds:,.1f} s")
    if to != "gguf":
        copy_beside(source, target, None, overwrite)
    _show_drift(source, target, found.factors)
    if not no_check:
        _compare(model, target, text, tokens, found)


def _write(
    source: Path, target: Path, to: str, factors: Mapping[str, Factors], *, into_quantised: bool, **options: Any
) -> int:
    """Write the sum; the bytes of its tensors."""
    from mixtral.adapters.merge import merging
    from mixtral.tokenizer import gguf_vocabulary
    from mixtral.weights.convert import convert, convert_to_gguf

    change = merging(factors, into_packed=into_quantised)
    with output.progress("merging") as progress:
        if to == "gguf":
            to_gguf = partial(convert_to_gguf, vocabulary=gguf_vocabulary)
            return to_gguf(source, target, change=change, progress=progress, **options).size_bytes
        return convert(source, target, layout=LAYOUTS[to], change=change, progress=progress, **options).size_bytes


@app.command("experts")
def experts(
    model: ModelArgument,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="Text (UTF-8) of the task, a document per empty line.")],
    share: Annotated[float, typer.Option(help="Choose the fewest experts whose scores have this share.")] = 0.2,
    by: Annotated[str, typer.Option(help="token: how often chosen; gate: with how much weight.")] = "token",
    tokens: Annotated[int, typer.Option(help="At most this many tokens of the text.", min=1)] = 131072,
    random: Annotated[
        int | None, typer.Option(help="The control: as many experts, drawn with this seed.", min=0, max=2**63 - 1)
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write scores and choice there.")] = None,
) -> None:
    """Score the experts on a text and choose those worth training (ESFT)."""
    import json

    import mixtral
    from mixtral.adapters.select import check_share, choose, random_like, score_documents
    from mixtral.errors import ConfigError

    if by not in ("token", "gate"):
        raise ConfigError(f"--by is {by!r}; expected token or gate", param="by")
    check_share(share)  # before the model is loaded and the text scored, which takes long
    documents = [part for part in _text(text, "text").split("\n\n") if part.strip()]
    llm, count = mixtral.load(model, reference=True), 0
    ids: list[list[int]] = []
    for document in documents:
        found = llm.tokenizer.encode(document, bos=True)[: min(tokens - count, llm.context)]
        ids, count = [*ids, found] if found else ids, count + len(found)
    scores = score_documents(llm.generator.model, ids).scores(by)
    chosen = choose(scores, share)
    if random is not None:
        chosen = random_like(chosen, llm.config.num_local_experts, random)
    rows = [
        (str(layer), " ".join(f"{score:.2f}{'*' if e in picked else ' '}" for e, score in enumerate(row)))
        for layer, (row, picked) in enumerate(zip(scores.tolist(), chosen.experts, strict=True))
    ]
    output.pairs(f"score by {by} of every expert on {count:,} tokens; * is chosen", rows)
    total = sum(len(layer) for layer in chosen.experts)
    output.say(f"{total} of {len(rows) * llm.config.num_local_experts} experts")
    if json_path is not None:
        told = {"by": by, "share": share, "tokens": count, "random": random, "scores": scores.tolist()}
        told["experts"] = [list(layer) for layer in chosen.experts]
        json_path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _read(model: str, adapter: Path, scaling: float | None) -> AdapterFile:
    from mixtral.adapters.peft import read_adapter
    from mixtral.api import folder_of
    from mixtral.weights.checkpoint import read_any_config

    return read_adapter(adapter, read_any_config(folder_of(model)), scaling=scaling)


def _targets(factors: Mapping[str, Factors]) -> list[tuple[str, str]]:
    from mixtral.adapters.factors import target_of

    groups: dict[tuple[str, int, float], int] = {}
    for parameter, pair in factors.items():
        key = (target_of(parameter), pair.rank, pair.scale)
        groups[key] = groups.get(key, 0) + 1
    return [
        (target, f"{count} layers, rank {rank}, scale {scale:g}") for (target, rank, scale), count in groups.items()
    ]


def _text(path: Path | None, param: str) -> str:
    from mixtral.errors import RequestError

    if path is None:
        return _PROBE
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 (byte {error.start})", param=param) from None
    if not text.strip():
        raise RequestError(f"{path}: holds no text", param=param)
    return text


def _show_drift(source: Path, target: Path, factors: Mapping[str, Factors]) -> None:
    from mixtral.adapters.merge import drifts
    from mixtral.weights.convert import opened

    with opened(source) as (base, _), opened(target) as (result, _):
        found = drifts(base, result, factors)
    rows = [
        (name, f"added {100 * one.change:.3g} % of the weights; rounding is {100 * one.loss:.3g} % of that")
        for name, one in found.items()
    ]
    output.pairs("adapter in the weights", rows)
    lost = [name for name, one in found.items() if one.loss > 1]
    if lost:
        output.note(f"mixtral: warning: of {', '.join(lost)} more is lost to rounding than the adapter adds")


def _compare(model: str, target: Path, text: str, tokens: int, found: AdapterFile) -> None:
    """The logits of the result beside those of base and adapter, all in plain torch and float32."""
    import mixtral
    from mixtral.adapters import attach_factors
    from mixtral.evaluate.divergence import compare

    options: dict[str, Any] = {"dtype": "float32", "reference": True}
    llm = mixtral.load(model, **options)
    count = min(tokens, llm.context)
    # The base spells the text: the embedded model replaces rare ids, and both models must see the same ones.
    ids = llm.tokenizer.encode(text, bos=True)[:count] if llm.has_tokenizer else list(range(min(count, llm.vocab_size)))
    base = llm.logits(ids).numpy()
    attach_factors(llm.generator.model, found.factors)  # products of their own: another way than the one of merging
    wanted = llm.logits(ids).numpy()
    del llm
    made = mixtral.load(target, **options).logits(ids).numpy()
    error, effect = compare(wanted, made, ids), compare(wanted, base, ids)
    output.pairs(
        f"logits on {len(ids):,} tokens, beside base and adapter",
        [
            ("largest error", f"{abs(made - wanted).max():.3g}"),
            ("KL divergence, mean", f"{error.kl_mean:.3g} nats; of the base without adapter {effect.kl_mean:.3g}"),
            ("same most likely token", f"{100 * error.same_top:.2f} %"),
        ],
    )
