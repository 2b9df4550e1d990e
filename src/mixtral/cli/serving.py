"""Options that ``mixtral serve`` and ``mixtral batch`` share, and the message to the engine that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.errors import ConfigError

if TYPE_CHECKING:
    from mixtral.wire import Start

__all__ = [
    "AdaptersOption",
    "CacheMemoryOption",
    "ContextOption",
    "SequencesOption",
    "ServedNameOption",
    "StepTokensOption",
    "read_adapters",
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
AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]PATH",
        help="LoRA adapter that requests choose by NAME, may be repeated; without NAME: one for all requests.",
    ),
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
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_tokens_beside_answers": "max_tokens_beside_answers",
    "enable_prefix_caching": "prefix_cache",
}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def start_of(options: Mapping[str, Any], **more: Any) -> Start:
    """What an engine is to load and how it is to run, from the options of a command; ``more`` are other fields.

    Raises:
        ConfigError: the memory is no size, or the adapters do not go together.
    """
    from mixtral.wire import Start

    memory = options["kv_cache_memory"]
    cache_bytes = None if memory is None else read_bytes("--kv-cache-memory", memory)
    given = {field: options[option] for option, field in _START.items() if option in options}
    if given.get("packed_cache") is not None:
        given["packed_cache"] = str(Path(given["packed_cache"]).absolute())
    adapter, adapters = read_adapters(options["adapter"] or [])
    return Start(cache_bytes=cache_bytes, adapter=adapter, adapters=adapters, **given, **more)


def read_adapters(texts: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The path of an adapter for all requests, or paths by the names that requests choose: ``PATH`` or ``NAME=PATH``.

    A path with ``=`` in it needs a ``/`` before that.

    Raises:
        ConfigError: a name or path is missing, a name is given twice, or there are several paths without names.
    """
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            if len(texts) > 1:
                raise ConfigError(
                    f"--adapter {text}: there are several adapters; expected NAME=PATH, so that requests can choose",
                    param="adapter",
                )
            return str(Path(text).absolute()), {}
        if not name or not path:
            raise ConfigError(f"--adapter {text}: expected NAME=PATH, or PATH alone", param="adapter")
        if name in named:
            raise ConfigError(f"--adapter {text}: the name {name!r} is given twice", param="adapter")
        named[name] = str(Path(path).absolute())
    return None, named


def read_bytes(option: str, text: str) -> int:
    """A size such as ``4G``, ``512MiB`` or a plain number of bytes; units are powers of 1024.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,15})\s?([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{option} is {text!r}; expected a size such as 4G or 512M", param=option)
    return int(match[1]) * _UNITS[match[2].lower()]
