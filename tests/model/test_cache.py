"""The paged cache: where tokens lie does not matter, and nobody reads or writes another's pages."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.model import PAGE_SIZE, Batch, Mixtral, PagedCache
from mixtral.ops import attention

Read = Callable[..., list[Tensor]]


def qkv(config: MixtralConfig, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups, heads, size = config.num_key_value_heads, config.num_attention_heads, config.head_dim
    q, k, v = (torch.randn((tokens, count, size), generator=generator) for count in (heads, groups, groups))
    return q, k, v


def nan_cache(config: MixtralConfig, pages: int) -> PagedCache:
    cache = PagedCache(config, pages=pages, device="cpu", dtype=torch.float32)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def test_storage(tiny_config: MixtralConfig) -> None:
    cache = PagedCache(tiny_config, pages=3, device="cpu", dtype=torch.bfloat16)
    for stored in (cache.keys, cache.values):
        assert (tuple(stored.shape), stored.dtype) == ((2, 3 * PAGE_SIZE, 2, 16), torch.bfloat16)


@pytest.mark.parametrize(
    "pages", [[0, 1, 2], [1, 2, 3], [2, 1, 0], [3, 0, 2], [0, 2, 3]], ids=lambda pages: "-".join(map(str, pages))
)
@pytest.mark.parametrize("cuts", [[130], [1, 129], [64, 66], [63, 1, 1, 65], [128, 1, 1], [100, 30, 50]])
def test_attends_over_everything_stored(pages: list[int], cuts: list[int], tiny_config: MixtralConfig) -> None:
    """Pages in any order, consecutive or not, and any cut of the sequence; every layer has its own storage."""
    cache = nan_cache(tiny_config, 4)
    whole = [qkv(tiny_config, sum(cuts), seed) for seed in range(2)]
    start = 0
    for count in cuts:
        view = cache.view([(pages, start, count)])
        for layer, (q, k, v) in enumerate(whole):
            end = start + count
            found = view.attend(layer, q[start:end], k[start:end], v[start:end])
            torch.testing.assert_close(found, attention(q[start:end], k[:end], v[:end]), atol=1e-5, rtol=0)
        start += count
    unused = ({0, 1, 2, 3} - set(pages)).pop()
    assert torch.isnan(cache.keys[:, unused * PAGE_SIZE : (unused + 1) * PAGE_SIZE]).all()


def test_sequences_of_a_batch_do_not_see_each_other(tiny_config: MixtralConfig) -> None:
    """A prompt, a decoded token and the middle of a prompt in one batch."""
    cache = nan_cache(tiny_config, 7)
    lengths, stored = [5, 71, 130], [0, 70, 60]
    pages = [[6], [3, 0], [1, 5, 2]]
    whole = [qkv(tiny_config, length, seed) for seed, length in enumerate(lengths)]
    for sequence in (1, 2):
        before = stored[sequence]
        cache.view([(pages[sequence], 0, before)]).attend(0, *(part[:before] for part in whole[sequence]))
    counts = [length - before for length, before in zip(lengths, stored, strict=True)]
    new = [torch.cat([one[part][before:] for one, before in zip(whole, stored, strict=True)]) for part in range(3)]
    found = cache.view(list(zip(pages, stored, counts, strict=True))).attend(0, *new)
    for out, (q, k, v), before in zip(found.split(counts), whole, stored, strict=True):
        torch.testing.assert_close(out, attention(q[before:], k, v), atol=1e-5, rtol=0)
    assert torch.isnan(cache.keys[1]).all()


def test_decoding_token_by_token_equals_the_whole_prompt(tiny_model: Mixtral, read: Read) -> None:
    """B7: sequences of different length end one after the other."""
    prompts = [[i * 7 % 320 for i in range(length)] for length in (70, 3, 40)]
    for prompt, found in zip(prompts, read(tiny_model, prompts, chunk=1), strict=True):
        (alone,) = read(tiny_model, [prompt])
        assert (found - alone).abs().max() < 1e-5 * alone.abs().max()


def test_positions_that_restart_in_a_chunk_are_another_sequence(tiny_model: Mixtral, read: Read) -> None:
    """B7: positions count from the start of the sequence, not of the chunk; the wrong ones show."""
    ids = torch.tensor([i * 7 % 320 for i in range(80)])
    (expected,) = read(tiny_model, [ids.tolist()])
    for offset, right in ((60, True), (0, False)):
        cache = nan_cache(tiny_model.config, 2)
        with torch.inference_mode():
            tiny_model(Batch(ids[:60], torch.arange(60), cache.view([([0, 1], 0, 60)])))
            later = Batch(ids[60:], torch.arange(20) + offset, cache.view([([0, 1], 60, 20)]))
            difference = (tiny_model.logits(tiny_model(later).hidden_TD) - expected[60:]).abs().max()
        assert difference < 1e-4 if right else difference > 1e-2


def test_later_tokens_do_not_reach_back(tiny_model: Mixtral, read: Read) -> None:
    ids = random.Random(0).choices(range(320), k=90)
    (before,) = read(tiny_model, [ids])
    (after,) = read(tiny_model, [[*ids[:50], (ids[50] + 1) % 320, *ids[51:]]])
    assert (before[:50] - after[:50]).abs().max() < 1e-4
    assert ((before[50:] - after[50:]).abs().amax(1) > 1e-3).all()


def test_cleared_pages_hold_zeros(tiny_config: MixtralConfig) -> None:
    cache = nan_cache(tiny_config, 4)
    cache.clear([3, 1])
    for stored in (cache.keys, cache.values):
        pages = stored.unflatten(1, (4, PAGE_SIZE))
        assert (pages[:, [1, 3]] == 0).all()
        assert pages[:, [0, 2]].isnan().all()
    assert cache.nbytes == 2 * cache.keys.nbytes
