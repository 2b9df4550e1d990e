"""Kernels take every bit pattern of their inputs: nothing is undefined, and every instruction set finds the same.

With `make sanitize` these are the inputs that integer overflow and conversions out of range would show up with.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral.ops.native import kernel_levels, module
from mixtral.quant.formats import FORMATS
from mixtral.quant.packed import Blocks, Groups, Packed
from mixtral.quant.panels import to_panels

STORES = {"bfloat16": 0, "float32": 1, "int8": 2}
# As int32: zeros, the smallest, subnormal, one, the largest, infinities, and numbers that are none, with all payloads.
EDGES = [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF]


def any_bits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Float32 of random bits; a quarter of them edges, of either sign."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    edges = rng.choice(np.array(EDGES, np.uint32), shape) | rng.integers(0, 2, shape, dtype=np.uint32) << np.uint32(31)
    return torch.from_numpy(np.where(rng.random(shape) < 0.25, edges, bits).view(np.float32))


def usual(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed(rows: int, columns: int) -> Tensor:
    """Usual rows, rows of any bits, and usual rows with a few numbers of any bits."""
    x = usual((rows, columns), 1)
    x[::3] = any_bits((len(x[::3]), columns), 2)
    x[1::3, ::37] = any_bits(tuple(x[1::3, ::37].shape), 3)
    return x


def assert_same(found: Tensor, expected: Tensor, label: object = "") -> None:
    """The same bits; numbers that are none may differ in theirs."""
    assert torch.equal(found.isnan(), expected.isnan()), label
    assert torch.equal(found.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32)), label


def random_weights(name: str, rows: int, columns: int) -> Packed:
    """A matrix of random bytes in a format of files, but for scales that are no numbers: they are refused."""
    rng = np.random.default_rng(7)
    if name.endswith("K"):
        size = FORMATS[name].size_bytes((columns,))
        data = rng.integers(0, 256, (rows, size), dtype=np.uint8)
        for at in FORMATS[name].halves:
            data.reshape(rows, -1, FORMATS[name].bytes)[..., at + 1] &= 0xBF
        return Blocks(name, torch.from_numpy(data))
    bits, group = int(name[3]), int(name.split("_G")[1])
    codes = torch.from_numpy(rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8))
    finite = rng.integers(0, 1 << 16, (rows, columns // group), dtype=np.uint16) & np.uint16(0xBFFF)
    zeros = torch.from_numpy(rng.integers(0, 1 << bits, finite.shape, dtype=np.uint8))
    return Groups(bits, codes, torch.from_numpy(finite).view(torch.float16), zeros=zeros)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "INT4_G64", "INT8_G256"])
def test_products_with_packed_weights(name: str) -> None:
    matrix = to_panels(random_weights(name, 21, 512))
    assert matrix is not None
    x = mixed(40, 512)
    results = []
    for level in kernel_levels():
        out = torch.zeros((40, 21))
        module().project(x.numpy(), [matrix.matrix], out.numpy(), 2, level=level)
        results.append(out)
    for level, found in zip(kernel_levels()[1:], results[1:], strict=True):
        assert_same(found, results[0], level)
    for row in range(0, 40, 3):  # an infinity spoils its row
        assert not bool(x[row].isfinite().all())
        assert not bool(results[0][row].isfinite().any())


def rows_alone(matrix: object, x: Tensor, width: int, level: str, **extra: object) -> Tensor:
    """The product of each row of x by itself."""
    out = torch.zeros((len(x), width))
    for row in range(len(x)):
        more = extra | {"residual": extra["residual"][row : row + 1]} if extra else {}  # type: ignore[index]
        module().project(x[row : row + 1].numpy(), [matrix], out[row : row + 1].numpy(), 1, level=level, **more)
    return out


@pytest.mark.parametrize("any_weights", [False, True])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["bf16", "f16", "f32"])
def test_products_with_plain_weights(kind: int, any_weights: bool) -> None:
    bits = any_bits((19, 67 if kind == 2 else 34), 5).numpy() if any_weights else usual((19, 67), 5).numpy()
    weights = bits.view(np.uint8).reshape(-1)[: 19 * 67 * (4 if kind == 2 else 2)].copy()
    if not any_weights and kind < 2:
        dtype = torch.bfloat16 if kind == 0 else torch.float16
        weights = torch.from_numpy(bits).to(dtype).view(torch.uint8).reshape(-1).numpy().copy()
    matrix, x, norm, beside = module().DenseMatrix(kind, 19, 67, weights), mixed(30, 67), usual((67,)), mixed(30, 19)
    more = {"norm": norm.numpy(), "eps": 1e-5, "residual": beside.numpy()}
    for extra in ({}, more):
        results = []
        for level in kernel_levels():
            out = torch.zeros((30, 19))
            module().project(x.numpy(), [matrix], out.numpy(), 2, level=level, **extra)
            results.append(out)
        for level, found in zip(kernel_levels()[1:], results[1:], strict=True):
            own_order = kind == 0 and level == "amx"
            assert_same(found, rows_alone(matrix, x, 19, level, **extra) if own_order else results[0], level)


@pytest.mark.parametrize("packed", [True, False])
def test_experts(packed: bool) -> None:
    """A router of any bits still picks each expert once, and the lower one first where no comparison holds."""
    shapes = ((256, 512), (256, 512), (512, 256))
    if packed:
        parts = [[to_panels(random_weights("Q4_K", *shape)).matrix] * 3 for shape in shapes]  # type: ignore[union-attr]
    else:
        parts = [
            [module().DenseMatrix(2, *shape, any_bits(shape, 11).view(torch.uint8).reshape(-1).numpy())] * 3
            for shape in shapes
        ]
    experts, x = module().ExpertSet(*parts), mixed(12, 512)
    router = usual((3, 512), 3)
    router[1] = any_bits((512,), 4)
    results = []
    for level in kernel_levels():
        out, logits, shares = torch.zeros_like(x), torch.zeros((12, 3)), torch.zeros((12, 2))
        picks = torch.full((12, 2), -1, dtype=torch.int64)
        arguments = (x.numpy(), router.numpy(), experts, out.numpy(), logits.numpy(), picks.numpy(), shares.numpy())
        module().mixture(*arguments, 2, residual=x.numpy(), level=level)
        assert all(len(set(row)) == 2 and set(row) <= {0, 1, 2} for row in picks.tolist())
        results.append((out, logits, picks, shares))
    for level, (out, logits, picks, shares) in zip(kernel_levels()[1:], results[1:], strict=True):
        assert torch.equal(picks, results[0][2])
        for found, expected in zip((out, logits, shares), (results[0][i] for i in (0, 1, 3)), strict=True):
            assert_same(found, expected, level)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [6, 32])
def test_attention(size: int, store: str) -> None:
    qkv = mixed(70, 8 * size)
    angles = any_bits((70, size // 2), 8).clamp(-1, 1).nan_to_num(0.5)
    results = []
    for level in kernel_levels():
        pages = np.full((2, 2, module().block_bytes(size, STORES[store])), 0x7F, np.uint8)
        out = torch.zeros((70, 4 * size))
        spans = module().Spans([([1, 0], 0, 70)])
        arguments = (qkv.numpy(), angles.numpy(), angles.numpy(), spans, pages, out.numpy(), size, STORES[store], 2)
        module().attend(*arguments, level)
        results.append(out)
    for level, found in zip(kernel_levels()[1:], results[1:], strict=True):
        assert_same(found, results[0], level)
