"""Keys and values of earlier tokens, in pages of 64 tokens, and the view of them that one batch uses.

A sequence owns a list of pages; token p lies in page ``pages[p // 64]`` at place ``p % 64``. Sequences with 70 and 3
tokens and the page lists [4, 0] and [2] therefore use page 4 whole, six places of page 0 and three of page 2. Who owns
which page is decided outside (``engine.pages``); this file only stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.ops import attention

__all__ = ["PAGE_SIZE", "CacheView", "PagedCache"]

PAGE_SIZE = 64


class PagedCache:
    """Storage for ``pages`` pages of every layer: two tensors [L, pages * 64, G, K] of the model's dtype."""

    def __init__(self, config: MixtralConfig, *, pages: int, device: torch.device | str, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, pages * PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Size of all pages."""
        return self.keys.nbytes + self.values.nbytes

    def clear(self, pages: Sequence[int]) -> None:
        """Overwrite pages with zeros."""
        for page in pages:
            for part in (self.keys, self.values):
                part[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = 0

    def view(self, spans: Sequence[tuple[Sequence[int], int, int]]) -> CacheView:
        """The view for one batch. ``spans`` lists, in the order of its tokens, for every sequence its page ids, the
        number of tokens already stored, and the number of tokens in this batch; the pages hold both."""
        return CacheView(self, spans)


class CacheView:
    """Stores a batch's keys and values and attends over them and everything stored before. One use per layer."""

    def __init__(self, cache: PagedCache, spans: Sequence[tuple[Sequence[int], int, int]]) -> None:
        self._cache = cache
        self._counts = [count for _, _, count in spans]
        self._reads: list[slice | Tensor] = []
        writes = []
        device = cache.keys.device
        for pages, stored, count in spans:
            places = _places(pages, stored + count)
            writes.append(places[stored:])
            first = int(places[0])
            consecutive = int(places[-1]) - first == stored + count - 1 and _ascending(pages)
            self._reads.append(slice(first, first + stored + count) if consecutive else places.to(device))
        self._writes = torch.cat(writes).to(device)

    def attend(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        """Append the batch's keys and values in ``layer``, then causal attention of every token: [T, H, K]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._writes] = k_TGK
        values[self._writes] = v_TGK
        outs = [
            attention(q, keys[read], values[read])
            for q, read in zip(torch.split(q_THK, self._counts), self._reads, strict=True)
        ]
        return torch.cat(outs) if len(outs) > 1 else outs[0]


def _places(pages: Sequence[int], count: int) -> Tensor:
    starts = torch.tensor(list(pages), dtype=torch.int64)[:, None] * PAGE_SIZE
    return (starts + torch.arange(PAGE_SIZE)).reshape(-1)[:count]


def _ascending(pages: Sequence[int]) -> bool:
    return all(later == earlier + 1 for earlier, later in pairwise(pages))
