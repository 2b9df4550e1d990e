"""Integers in groups: packing, the search of scales, and exact moves between packed forms."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.bits import pack_bits, unpack_bits
from mixtral.quant.encode import encode_rows
from mixtral.quant.packed import Blocks, Groups
from mixtral.quant.recode import as_blocks, as_groups
from mixtral.quant.rtn import INT_FORMS, IntForm, encode_groups, int_form


def values(rows: int = 6, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_bits_lie_one_after_the_other(bits: int) -> None:
    numbers = torch.randint(0, 1 << bits, (3, 5, 64), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack_bits(numbers, bits)
    assert packed.shape == (3, 5, 64 * bits // 8)
    for row in itertools.product(range(3), range(5)):
        stream = int.from_bytes(packed[row].numpy().tobytes(), "little")
        assert [stream >> i * bits & (1 << bits) - 1 for i in range(64)] == numbers[row].tolist()
    assert torch.equal(unpack_bits(packed, bits), numbers)
    with pytest.raises(CheckpointError, match="no multiple"):
        pack_bits(numbers[..., :3], 3)


@pytest.mark.parametrize("name", INT_FORMS)
def test_encoding_is_close_and_as_small_as_promised(name: str) -> None:
    form, given = INT_FORMS[name], values(8, 512)
    groups = encode_groups(given, form)
    group = form.group or 512
    assert (groups.bits, groups.group, groups.shape) == (form.bits, group, (8, 512))
    assert groups.zeros is groups.order is None
    assert groups.size_bytes == 8 * (512 * form.bits // 8 + 512 // group * 2)
    error = ((groups.decode(torch.float32) - given).norm() / given.norm()).item()
    assert error < {8: 0.012, 4: 0.12, 3: 0.24}[form.bits]


@pytest.mark.parametrize("bits", [3, 4])
def test_search_is_no_worse_than_rounding_to_the_extreme(bits: int) -> None:
    """By its own measure, group for group: the plain scale is among those that it tries."""
    given = values(64, 128)
    half = 1 << (bits - 1)
    groups = given.view(-1, 32)
    weights = groups.square() + (groups.square().mean(-1, keepdim=True) if bits == 3 else 0)
    extreme = groups.gather(1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -half).half().float()
    plain = (groups / scale).round().clamp(-half, half - 1) * scale
    found = encode_groups(given, IntForm(bits, 32)).decode(torch.float32).view(-1, 32)

    def lost(decoded: torch.Tensor) -> torch.Tensor:
        return (weights * (decoded - groups).square()).sum(-1)

    assert lost(found).sum() < 0.9 * lost(plain).sum()
    assert bool((lost(found) <= lost(plain) * (1 + 1e-5)).all())


def test_int8_in_groups_of_32_is_q8_0() -> None:
    given = values(8, 512)
    blocks = Blocks("Q8_0", encode_rows(given, "Q8_0"))
    assert torch.equal(encode_groups(given, INT_FORMS["int8_g32"]).decode(torch.float32), blocks.decode(torch.float32))


def test_exact_where_integers_suffice() -> None:
    """Numbers that are on a grid stay as they are."""
    grid = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(1)).float() / 64
    grid[:, ::32] = -8 / 64
    assert torch.equal(encode_groups(grid, IntForm(4, 32)).decode(torch.float32), grid)
    zeros = torch.zeros(4, 64)
    assert torch.equal(encode_groups(zeros, IntForm(4, 32)).decode(torch.float32), zeros)


def test_part_by_part_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = values(64, 256)
    whole = encode_groups(given, IntForm(8, 64))
    monkeypatch.setattr("mixtral.quant.rtn.CHUNK_VALUES", 700)
    assert torch.equal(encode_groups(given, IntForm(8, 64)).decode(torch.float32), whole.decode(torch.float32))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_any_dtype_and_layout(bits: int) -> None:
    given = values().bfloat16()
    expected = encode_groups(given.float(), IntForm(bits, 32))
    for same in (given, given.t().contiguous().t(), given.double(), given.float().requires_grad_()):
        found = encode_groups(same, IntForm(bits, 32))
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale_bytes, expected.scale_bytes)


def test_without_the_compiled_module_nothing_else_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixtral

    monkeypatch.delattr(mixtral, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "mixtral._native", None)
    for name in ("int3_g32", "int4_g128"):
        with pytest.raises(ConfigError, match="pip install"):
            encode_groups(values(), INT_FORMS[name])
    with pytest.raises(ConfigError, match="pip install"):
        encode_rows(values(), "Q4_0")
    assert encode_groups(values(), INT_FORMS["int8_g32"]).bits == 8


def test_refused() -> None:
    with pytest.raises(CheckpointError, match="does not divide into groups of 128"):
        encode_groups(values(2, 96), INT_FORMS["int4_g128"])
    for bad in (float("nan"), float("inf"), 1e9):
        given = values(2, 64)
        given[1, 3] = bad
        with pytest.raises(CheckpointError, match="not finite, or too large"):
            encode_groups(given, INT_FORMS["int4_g32"])
        with pytest.raises(CheckpointError, match="not finite, or too large"):
            encode_groups(given, INT_FORMS["int8_g32"])
    with pytest.raises(ConfigError, match="int5_g32"):
        int_form("int5_g32")


def test_blocks_and_groups_are_the_same_numbers() -> None:
    for name, bits in (("Q4_0", 4), ("Q8_0", 8)):
        blocks = Blocks(name, encode_rows(values(), name))
        groups = as_groups(blocks, bits, 32)
        assert groups is not None
        assert torch.equal(groups.decode(torch.float32), blocks.decode(torch.float32))
        assert torch.equal(as_blocks(groups, name), blocks.data)
        assert as_groups(blocks, bits, 64) is None
    assert as_groups(Blocks("Q4_1", encode_rows(values(), "Q4_1")), 4, 32) is None


def test_wider_and_smaller_groups_hold_the_same_numbers() -> None:
    small = encode_groups(values(), IntForm(3, 128))
    for bits, group in ((4, 128), (4, 32), (8, 64), (3, 32)):
        found = as_groups(small, bits, group)
        assert found is not None
        assert (found.bits, found.group) == (bits, group)
        assert torch.equal(found.decode(torch.float32), small.decode(torch.float32))
    assert as_groups(small, 2, 128) is None
    assert as_groups(small, 3, 256) is None
    assert torch.equal(Blocks("Q4_0", as_blocks(small, "Q4_0")).decode(torch.float32), small.decode(torch.float32))
    assert torch.equal(Blocks("Q8_0", as_blocks(small, "Q8_0")).decode(torch.float32), small.decode(torch.float32))


def drawn(*, zeros: bool = False, order: bool = False, dtype: torch.dtype = torch.float16) -> Groups:
    rng = np.random.default_rng(3)
    codes = torch.from_numpy(rng.integers(0, 256, (4, 32), dtype=np.uint8))
    scales = torch.from_numpy(rng.uniform(0.01, 0.02, (4, 2))).to(dtype)
    some = torch.from_numpy(rng.integers(0, 16, (4, 2), dtype=np.uint8)) if zeros else None
    mixed = torch.from_numpy(rng.permutation(64).astype(np.int32) // 32) if order else None
    return Groups(4, codes, scales, zeros=some, order=mixed)


def test_what_blocks_cannot_hold() -> None:
    for groups in (drawn(zeros=True), drawn(order=True), drawn(dtype=torch.float32)):
        with pytest.raises(CheckpointError, match="cannot be kept exactly as Q4_0"):
            as_blocks(groups, "Q4_0")


def test_zeros_and_order() -> None:
    groups = drawn(zeros=True)
    wider = as_groups(groups, 8, 16)
    assert wider is not None
    assert torch.equal(wider.decode(torch.float32), groups.decode(torch.float32))
    mixed = drawn(zeros=True, order=True)
    assert as_groups(mixed, 4, 32) is mixed
    assert as_groups(mixed, 8, 32) is None
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(mixed.pick_rows(rows, torch.float32), mixed.decode(torch.float32)[rows])
    part = torch.empty(2, 64)
    mixed.decode_rows(1, part)
    assert torch.equal(part, mixed.decode(torch.float32)[1:3])


def test_moving_a_model_never_rounds_its_scales() -> None:
    groups = drawn(zeros=True)
    before = groups.decode(torch.float32)
    groups.to(torch.bfloat16)
    assert torch.equal(groups.decode(torch.float32), before)
