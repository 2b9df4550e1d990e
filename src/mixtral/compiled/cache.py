"""Keys and values in pages as the compiled kernels store them (``native/include/mixtral/attention.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError
from mixtral.ops.memory import empty
from mixtral.ops.native import level, module, threads

__all__ = ["KV_DTYPES", "CompiledCache", "CompiledView"]

KV_DTYPES = {"bfloat16": 0, "float32": 1, "int8": 2}
"""What keys and values can be stored as; int8 has a scale for each token and head."""


class CompiledCache:
    """Storage for ``pages`` pages of 64 tokens of every layer: uint8 [L, pages, G, bytes]."""

    def __init__(self, config: MixtralConfig, *, pages: int, kv_dtype: str) -> None:
        if kv_dtype not in KV_DTYPES:
            raise ConfigError(f"kv_dtype is {kv_dtype!r}; expected one of {', '.join(KV_DTYPES)}", param="kv_dtype")
        self.kind, self.head_dim = KV_DTYPES[kv_dtype], config.head_dim
        block = module().block_bytes(config.head_dim, self.kind)
        shape = (config.num_hidden_layers, pages, config.num_key_value_heads, block)
        self.blocks = empty(shape, torch.uint8)
        self.layers = [layer.numpy() for layer in self.blocks]

    @property
    def nbytes(self) -> int:
        """Size of all pages."""
        return self.blocks.nbytes

    def clear(self, pages: Sequence[int]) -> None:
        """Overwrite pages with zeros."""
        self.blocks[:, list(pages)] = 0

    def view(self, spans: Sequence[tuple[Sequence[int], int, int]]) -> CompiledView:
        """As ``PagedCache.view``."""
        return CompiledView(self, spans)


class CompiledView:
    """The pages of one batch."""

    def __init__(self, cache: CompiledCache, spans: Sequence[tuple[Sequence[int], int, int]]) -> None:
        self._cache = cache
        self._spans: Any = module().Spans([(list(pages), stored, count) for pages, stored, count in spans])

    def attend_rows(self, layer: int, qkv: Tensor, angles: tuple[Tensor, Tensor], heads: int) -> Tensor:
        """Rotate the queries and keys of ``qkv`` [T, (H + 2G) K], store keys and values, attend: [T, H K]."""
        cache = self._cache
        out = torch.empty((len(qkv), heads * cache.head_dim))
        cosines, sines = angles
        module().attend(
            qkv.numpy(),
            cosines.numpy(),
            sines.numpy(),
            self._spans,
            cache.layers[layer],
            out.numpy(),
            cache.head_dim,
            cache.kind,
            threads(),
            level(),
        )
        return out
