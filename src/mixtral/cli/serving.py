"""Options that ``mixtral serve`` and ``mixtral batch`` share, and the message to the engine that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.errors import ConfigError

if TYPE_CHECKING:
    from mixtral.wire import Start

__all__ = [
    "CacheMemoryOption",
    "ContextOption",
    "SequencesOption",
    "ServedNameOption",
    "StepTokensOption",
    "read_bytes",
    "start_of",
]

ServedNameOption = Annotated[
    str | None, typer.Option("--served-model-name", help="Name in the API; default: that of the model.")
]
ContextOption = Annotated[
    int | None, typer.Option("--max-model-len", help="Tokens of prompt and answer; default: the model's context.")
]
SequencesOption = Annotated[int, typer.Option("--max-num-seqs", help="Answers that are written at once.")]
StepTokensOption = Annotated[int, typer.Option("--max-num-batched-tokens", help="Tokens that one step computes.")]
CacheMemoryOption = Annotated[
    str | None,
    typer.Option("--kv-cache-memory", help="For keys and values, such as 4G; default: what four contexts need."),
]
# Options -> fields of Start.
_START = {
    "model": "model",
    "served_model_name": "name",
    "device": "device",
    "dtype": "dtype",
    "threads": "threads",
    "decode": "decode",
    "reference": "reference",
    "kv_cache_dtype": "kv_dtype",
    "packed_cache": "packed_cache",
    "adapter": "adapter",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "enable_prefix_caching": "prefix_cache",
}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def start_of(options: Mapping[str, Any], **more: Any) -> Start:
    """What an engine is to load and how it is to run, from the options of a command; ``more`` are other fields.

    Raises:
        ConfigError: the memory is no size.
    """
    from mixtral.wire import Start

    memory = options["kv_cache_memory"]
    cache_bytes = None if memory is None else read_bytes("--kv-cache-memory", memory)
    given = {field: options[option] for option, field in _START.items() if option in options}
    for field in ("packed_cache", "adapter"):
        if given.get(field) is not None:
            given[field] = str(Path(given[field]).absolute())
    return Start(cache_bytes=cache_bytes, **given, **more)


def read_bytes(option: str, text: str) -> int:
    """A size such as ``4G``, ``512MiB`` or a plain number of bytes; units are powers of 1024.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,15})\s?([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{option} is {text!r}; expected a size such as 4G or 512M", param=option)
    return int(match[1]) * _UNITS[match[2].lower()]
