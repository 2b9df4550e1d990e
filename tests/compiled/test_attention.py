"""Compiled attention over pages: against float64, and the same bits in any company."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtral import ops
from mixtral.ops.native import kernel_levels, module

STORES = {"bfloat16": 0, "float32": 1, "int8": 2}
# Norm of the error beside that of the result, for random keys and values.
LIMITS = {"bfloat16": 6e-3, "float32": 2e-6, "int8": 2e-2}


@dataclass(frozen=True)
class Sizes:
    """Query heads, key heads, head size."""

    heads: int = 4
    groups: int = 2
    size: int = 32


class Pages:
    """The store of one layer; memory that was never written is NaN, or 255."""

    def __init__(self, sizes: Sizes, store: str, pages: int, level: str = "") -> None:
        self.sizes, self.kind, self.level = sizes, STORES[store], level
        shape = (pages, sizes.groups, module().block_bytes(sizes.size, self.kind))
        self.blocks = np.full(shape, 0xFF, np.uint8)

    def attend(
        self, qkv: Tensor, positions: list[int], spans: list[tuple[list[int], int, int]], threads: int = 2
    ) -> Tensor:
        out = torch.full((len(qkv), self.sizes.heads * self.sizes.size), float("nan"))
        cosines, sines = ops.rope_angles(torch.tensor(positions), self.sizes.size, 1e4)
        arguments = (qkv.numpy(), cosines.numpy(), sines.numpy(), module().Spans(spans), self.blocks, out.numpy())
        module().attend(*arguments, self.sizes.size, self.kind, threads, self.level)
        return out


def random_qkv(sizes: Sizes, tokens: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((tokens, (sizes.heads + 2 * sizes.groups) * sizes.size), generator=generator) * scale


def exact(sizes: Sizes, qkv: Tensor, first: int = 0) -> NDArray[np.float64]:
    """Rotated in float32 as always, the rest in float64, from row ``first`` on: [T - first, H K]."""
    tokens = len(qkv)
    parts = qkv.unflatten(-1, (-1, sizes.size))
    angles = ops.rope_angles(torch.arange(tokens), sizes.size, 1e4)
    q = ops.rope(parts[:, : sizes.heads], *angles).double().numpy()
    k = ops.rope(parts[:, sizes.heads : sizes.heads + sizes.groups].contiguous(), *angles).double().numpy()
    v = parts[:, sizes.heads + sizes.groups :].double().numpy()
    out = np.zeros((tokens - first, sizes.heads, sizes.size))
    for h in range(sizes.heads):
        g = h // (sizes.heads // sizes.groups)
        scores = q[first:, h] @ k[:, g].T / np.sqrt(sizes.size)
        scores[np.arange(tokens) > np.arange(first, tokens)[:, None]] = -np.inf
        shares = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = shares / shares.sum(1, keepdims=True) @ v[:, g]
    return out.reshape(tokens - first, -1)


def pages_for(tokens: int, seed: int = 0, more: int = 2) -> tuple[list[int], int]:
    """Pages in mixed order, and how many there are."""
    count = -(-tokens // 64)
    return random.Random(seed).sample(range(count + more), count), count + more


def whole(sizes: Sizes, qkv: Tensor, store: str, level: str = "", threads: int = 2) -> Tensor:
    pages, total = pages_for(len(qkv))
    return Pages(sizes, store, total, level).attend(qkv, list(range(len(qkv))), [(pages, 0, len(qkv))], threads)


SHAPES = [Sizes(), Sizes(8, 1, 16), Sizes(6, 1, 48), Sizes(5, 5, 6), Sizes(14, 2, 20), Sizes(4, 1, 128)]


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_against_float64(sizes: Sizes, store: str, level: str) -> None:
    qkv = random_qkv(sizes, 150)
    expected = exact(sizes, qkv)
    found = whole(sizes, qkv, store, level).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < LIMITS[store]
    for row in (0, 1, 63, 64, 149):
        assert np.linalg.norm(found[row] - expected[row]) / np.linalg.norm(expected[row]) < 2 * LIMITS[store]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_the_same_bits_on_every_instruction_set(sizes: Sizes, store: str) -> None:
    qkv = random_qkv(sizes, 130, seed=1, scale=3.0)
    expected = whole(sizes, qkv, store, kernel_levels()[0])
    for level in kernel_levels()[1:]:
        for threads in (1, 3):
            assert torch.equal(whole(sizes, qkv, store, level, threads), expected), level


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1023, 1024, 1025, 2100])
def test_chunks_and_threads_change_no_bit(length: int, store: str) -> None:
    """A prompt at once, token by token at its end, and in odd chunks; pages elsewhere; one to four threads."""
    sizes = Sizes(4, 1, 16)
    qkv = random_qkv(sizes, length, seed=2)
    expected = whole(sizes, qkv, store)
    source = random.Random(length)
    for case, threads in enumerate((1, 2, 4)):
        pages, total = pages_for(length, seed=case, more=3)
        memory = Pages(sizes, store, total)
        start = 0
        while start < length:
            left = length - start
            count = min(left, 1 if left <= 3 or (case == 0 and left < 70) else source.randint(1, 700))
            found = memory.attend(
                qkv[start : start + count], list(range(start, start + count)), [(pages, start, count)], threads
            )
            assert torch.equal(found, expected[start : start + count]), (start, count)
            start += count


@pytest.mark.parametrize("store", STORES)
def test_company_changes_no_bit(store: str) -> None:
    """Prompts, the middle of a prompt and single tokens of several sequences in one batch."""
    sizes, lengths, batches = Sizes(4, 2, 16), [1100, 70, 3, 1], [[64, 70, 2, 0], [1035, 0, 0, 1], [1, 0, 1, 0]]
    parts = [random_qkv(sizes, length, seed=i) for i, length in enumerate(lengths)]
    alone = [whole(sizes, part, store) for part in parts]
    counts = [-(-length // 64) for length in lengths]
    order = random.Random(3).sample(range(sum(counts)), sum(counts))
    pages = [[order.pop() for _ in range(count)] for count in counts]
    memory, done = Pages(sizes, store, sum(counts)), [0] * 4
    for batch in batches:
        live = [(i, done[i], count) for i, count in enumerate(batch) if count]
        found = memory.attend(
            torch.cat([parts[i][start : start + count] for i, start, count in live]),
            [p for _, start, count in live for p in range(start, start + count)],
            [(pages[i], start, count) for i, start, count in live],
        )
        for (i, start, count), rows in zip(live, found.split([count for _, _, count in live]), strict=True):
            assert torch.equal(rows, alone[i][start : start + count])
            done[i] += count
    assert done == lengths


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("store", STORES)
def test_numbers_that_are_not_finite_reach_later_tokens_only(store: str, level: str) -> None:
    """A token is seen by itself and those after it, and by nobody before it, even in the same page."""
    sizes = Sizes(4, 2, 16)
    qkv = random_qkv(sizes, 140, seed=4)
    expected = whole(sizes, qkv, store, level)
    for at in (71, 72):
        for part in (slice(0, 64), slice(64, 96), slice(96, 128)):  # queries, keys, values
            for bad in (float("nan"), float("inf")):
                spoilt = qkv.clone()
                spoilt[at, part] = bad
                found = whole(sizes, spoilt, store, level)
                assert torch.equal(found[:at], expected[:at])
                assert bool(found[at].isnan().all()) or (bad == float("inf") and part.start == 96)
                if part.start == 0:
                    assert torch.equal(found[at + 1 :], expected[at + 1 :])


@pytest.mark.parametrize("depth", [8192, pytest.param(65536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("store", STORES)
def test_a_late_large_score_takes_all(store: str, depth: int) -> None:
    """The last key but one outweighs everything that came before it."""
    sizes = Sizes(2, 1, 16)
    qkv = random_qkv(sizes, depth, seed=5, scale=0.3)
    qkv[:, 32:48] *= 0.01
    flat = torch.zeros(1, 16)
    flat[0, 0], flat[0, 8] = 40.0, 0.0
    # Rotations differ by one step only: nearly parallel.
    qkv[-1, :16], qkv[-1, 16:32], qkv[-2, 32:48] = flat, flat, flat
    found, expected = whole(sizes, qkv, store).numpy(), exact(sizes, qkv, depth - 100)
    assert np.linalg.norm(found[-1] - expected[-1]) / np.linalg.norm(expected[-1]) < LIMITS[store]
    near = qkv[-2, 48:].double().numpy()
    assert np.abs(expected[-1][:16] - near).max() < 1e-2
    error = np.linalg.norm(found[-100:] - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(error) < (0.05 if store == "int8" else 3 * LIMITS[store])


def test_pages_of_others_are_left_alone() -> None:
    sizes = Sizes()
    memory = Pages(sizes, "bfloat16", 4)
    memory.attend(random_qkv(sizes, 70), list(range(70)), [([3, 1], 0, 70)])
    assert (memory.blocks[[0, 2]] == 0xFF).all()
    assert (memory.blocks[[1, 3]] != 0xFF).any(axis=(1, 2)).all()


def test_wrong_calls_are_refused() -> None:
    sizes = Sizes()
    memory, qkv = Pages(sizes, "float32", 2), random_qkv(sizes, 3)
    positions = [0, 1, 2]
    for spans, words in (
        ([([2], 0, 3)], "not in the store"),
        ([([0], 0, 2)], "qkv must be"),
        ([([0], 63, 3)], "too few pages"),
        ([([0], (1 << 63) - 1, 3)], "too few pages"),
        ([([-1], 0, 3)], "negative"),
        ([([0], 0, 0)], "count > 0"),
        ([([0], -1, 3)], "stored >= 0"),
    ):
        with pytest.raises(ValueError, match=words):
            memory.attend(qkv, positions, spans)
    with pytest.raises(ValueError, match="head size must be even"):
        module().block_bytes(7, 0)
    with pytest.raises(ValueError, match="store must be"):
        module().block_bytes(8, 3)
    memory.blocks = memory.blocks[:, :, :-1].copy()
    with pytest.raises(ValueError, match="blocks of"):
        memory.attend(qkv, positions, [([0], 0, 3)])
