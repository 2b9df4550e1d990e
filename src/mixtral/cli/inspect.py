"""``mixtral inspect``: what a checkpoint or a preset is, without loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.cli import output

if TYPE_CHECKING:
    from mixtral.config import MixtralConfig

__all__ = ["describe", "run"]

# What a GGUF file says of where it comes from.
_TOLD = ("general.name", "general.file_type", "general.license", "quantize.imatrix.file", "quantize.imatrix.dataset")


def run(
    subject: Annotated[str, typer.Argument(metavar="PATH|PRESET|embedded", help="Folder, GGUF file, 8x7b, ...")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor of the files.")] = False,
    unpickle: Annotated[bool, typer.Option("--unpickle", help="Read .pth and .pt, from a source you trust.")] = False,
) -> None:
    """Say what a model is: sizes, parameters, memory, files, and what is odd about them."""
    found = describe(subject, unpickle=unpickle)
    listed = found["files"].pop("list", {})
    if tensors:
        found["tensors"] = listed
    if as_json:
        output.write_json(found, indent=2)
        return
    output.pairs(found["name"], [(name, str(value)) for name, value in found["config"].items()])
    output.pairs("parameters", [(name, f"{value:>19,}") for name, value in found["parameters"].items()])
    output.pairs("weights in memory", [(name, _bytes(value)) for name, value in found["memory_bytes"].items()])
    cache = found["kv_cache"]
    output.pairs(
        "key-value cache (16 bit)",
        [
            ("per token", _bytes(cache["bytes_per_token"])),
            (f"full context, {cache['context']:,} tokens", _bytes(cache["bytes_full_context"])),
        ],
    )
    output.pairs("tokenizer", [("version", found["tokenizer"] or "none fits; only token ids can be used")])
    if found["files"]:
        output.pairs("files", [(name, _shown(name, value)) for name, value in found["files"].items()])
    if "odd" in found:
        output.pairs(
            "odd", [(str(number), text) for number, text in enumerate(found["odd"], 1)] or [("nothing odd", "")]
        )
    if tensors:
        rows = [(name, f"{item['format']:8} {item['shape']}") for name, item in listed.items()]
        output.pairs("tensors", rows or [("none", "there are no files with weights")])


def describe(subject: str, *, unpickle: bool = False) -> dict[str, Any]:
    """Everything the command knows about a folder, a preset or "embedded", as JSON values.

    Raises:
        ConfigError: there is no such folder or preset, or ``config.json`` is wrong.
        CheckpointError: the weight files are missing, damaged or incomplete.
    """
    from mixtral.config import PRESETS, preset
    from mixtral.errors import ConfigError

    if subject != "embedded" and not Path(subject).exists():
        if subject.lower() in PRESETS:
            return _describe(subject.lower(), preset(subject))
        raise ConfigError(
            f'{subject!r} is no folder and no preset; expected a folder, a GGUF file, "embedded", or one of '
            f"{', '.join(PRESETS)}"
        )
    from mixtral.api import folder_of
    from mixtral.weights.checkpoint import read_any_config

    folder = folder_of(subject)
    config = read_any_config(folder)
    found = _describe(subject, config)
    found["files"], found["odd"] = _files(folder, config, unpickle)
    return found


def _describe(name: str, config: MixtralConfig) -> dict[str, Any]:
    import dataclasses

    from mixtral.plan import PRECISIONS, count_parameters, kv_bytes_per_token, memory_bytes
    from mixtral.tokenizer import Tokenizer

    counts = count_parameters(config)
    per_token = kv_bytes_per_token(config)
    return {
        "name": name,
        "config": dataclasses.asdict(config),
        "parameters": {
            "total": counts.total,
            "active per token": counts.active,
            "read per decoded token": counts.read_per_token,
            "experts": counts.experts,
            "one expert, all layers": counts.expert_in_all_layers,
            "attention": counts.attention,
            "routers": counts.routers,
            "norms": counts.norms,
            "embedding and head": counts.embedding + counts.head,
        },
        "memory_bytes": {precision: memory_bytes(config, precision) for precision in PRECISIONS},
        "kv_cache": {
            "bytes_per_token": per_token,
            "context": config.max_position_embeddings,
            "bytes_full_context": per_token * config.max_position_embeddings,
        },
        "tokenizer": Tokenizer.version_for(config.vocab_size),
        "files": {},
    }


def _files(folder: Path, config: MixtralConfig, unpickle: bool) -> tuple[dict[str, Any], list[str]]:
    """Layout, tensors, dtypes and sizes, from the headers alone (empty for a folder with a config only); oddities."""
    from mixtral.files.read import Entry
    from mixtral.weights import find_gguf, is_compact
    from mixtral.weights.checkpoint import open_checkpoint
    from mixtral.weights.compact import compact_header
    from mixtral.weights.integer import CodedEntry
    from mixtral.weights.oddities import config_oddities, oddities
    from mixtral.weights.save import weight_files

    entries: Mapping[str, Entry]
    if folder.is_dir() and not any((folder / name).exists() for name in weight_files(folder)) and not find_gguf(folder):
        return {}, config_oddities(folder, config)
    metadata: Mapping[str, Any] = {}
    if folder.is_dir() and is_compact(folder):
        entries, layout = compact_header(folder, config).entries, "compact (int8, shared rows)"
        odd = config_oddities(folder, config)
    else:
        checkpoint = open_checkpoint(folder, unpickle=unpickle)
        entries, layout, metadata = checkpoint.entries, checkpoint.layout, checkpoint.metadata
        methods = {entry.coding.method for entry in entries.values() if isinstance(entry, CodedEntry)}
        layout = f"{layout}, integers of {methods.pop()}" if methods else layout
        odd = oddities(checkpoint)
    shards = {entry.shard for entry in entries.values()}
    files = {
        "layout": layout,
        "tensors": len(entries),
        "dtypes": dict(Counter(entry.dtype for entry in entries.values()).most_common()),
        "shards": len(shards),
        "bytes": sum(shard.stat().st_size for shard in shards),
        **{key: metadata[key] for key in _TOLD if isinstance(metadata.get(key), str | int | float)},
        "list": {name: {"format": entry.dtype, "shape": list(entry.shape)} for name, entry in entries.items()},
    }
    return files, odd


def _shown(name: str, value: Any) -> str:
    if name == "bytes":
        return _bytes(value)
    if isinstance(value, dict):
        return ", ".join(f"{count} x {dtype}" for dtype, count in value.items())
    return str(value)


def _bytes(number: int) -> str:
    """A size for people: GB as sold and GiB as installed."""
    for unit, binary, power in (("GB", "GiB", 3), ("MB", "MiB", 2), ("kB", "KiB", 1)):
        if number >= 1024**power:
            return f"{number / 1000**power:,.2f} {unit} = {number / 1024**power:,.2f} {binary}"
    return f"{number} bytes"
