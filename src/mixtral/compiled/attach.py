"""Putting a loaded model on compiled kernels."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import cast

from torch import nn

from mixtral.compiled.cache import KV_DTYPES, CompiledCache
from mixtral.compiled.layers import CompiledHead, CompiledLayer, CompiledNorm
from mixtral.errors import ConfigError
from mixtral.model.mixtral import DecoderLayer, Linear, Mixtral
from mixtral.ops.native import level, take_threads
from mixtral.quant.packed import Packed
from mixtral.quant.panels import Panels

__all__ = ["compile_model"]

_log = logging.getLogger("mixtral")
_NAMES = {"torch.bfloat16": "bfloat16", "torch.float16": "float32", "torch.float32": "float32"}


def compile_model(model: Mixtral, *, kv_dtype: str | None = None) -> Mixtral:
    """Put a CPU model on compiled kernels, in place: inference only, parameters and their names stay.

    ``kv_dtype`` is one of ``KV_DTYPES``, by default bfloat16 for bfloat16 models and float32 for others.

    Raises:
        ConfigError: the compiled module is missing, or the dtype or instruction set is unknown.
    """
    kind = kv_dtype or _NAMES[str(model.dtype)]
    if kind not in KV_DTYPES:
        raise ConfigError(f"kv_dtype is {kind!r}; expected one of {', '.join(KV_DTYPES)}", param="kv_dtype")
    told = level()
    decoder = model.model
    for number, layer in enumerate(decoder.layers):
        decoder.layers[number] = CompiledLayer(cast(DecoderLayer, layer))
    decoder.norm = CompiledNorm(decoder.norm)
    if isinstance(model.lm_head, Linear):
        model.lm_head = CompiledHead(model.lm_head)
    model.new_cache = partial(_cache, model, kind)
    take_threads(decoder)
    _log.info("kernels %s: %s; keys and values %s", told, _formats(model), kind)
    return model


def _cache(model: Mixtral, kind: str, pages: int) -> CompiledCache:
    return CompiledCache(model.config, pages=pages, kv_dtype=kind)


def _formats(model: nn.Module) -> str:
    """What the matrices are, and which of them have no kernel."""
    packed = Counter(
        part.label if isinstance(part, Panels) else f"{part.label} (no kernel: decoded where it is used)"
        for name, part in model.named_modules()
        if isinstance(part, Packed) and "embed_tokens" not in name
    )
    plain = Counter(str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dim() > 1)
    return ", ".join(f"{count} matrices {name}" for name, count in sorted((packed + plain).items()))
