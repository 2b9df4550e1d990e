"""Int3, int4 and Q4_0 with searched scales: native code against the reference, and what the search promises."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf.quants import dequantize, quantize

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant import native
from mixtral.quant.bits import pack_bits
from mixtral.quant.encode import encode_rows
from mixtral.quant.groups import BITS, GROUPS, encode_integers
from mixtral.quant.packed import Groups
from mixtral.quant.recode import as_blocks

Floats = npt.NDArray[np.float32]
SUBNORMAL = np.float32(1e-42)


def special_rows() -> Floats:
    """Rows of 256 whose groups are zeros of either sign, one huge value, subnormal numbers, ties, few levels."""
    rows = np.zeros((16, 256))
    rows[1] = -0.0
    rows[2] = np.where(np.arange(256) % 2, 0.0, -0.0)
    rows[3, 7], rows[4, 200] = 2e5, -2e5
    rows[5] = np.where(np.arange(256) % 2, 1e-12, 1e5)
    rows[6], rows[7] = 1e-42, np.linspace(-1e-38, 1e-38, 256)
    rows[8], rows[9] = 3.0, -3.0
    rows[10] = np.arange(256) % 3 - 1
    rows[11], rows[12] = np.linspace(1, 2, 256), -np.linspace(1, 2, 256)
    # Scales among the smallest float16 numbers, of which the lowest is 2^-24.
    rows[13], rows[14] = np.linspace(-4e-7, 4e-7, 256), np.linspace(-3e-5, 2e-5, 256)
    rows[15, ::2] = 0.5
    return rows.astype(np.float32)


def hard_values() -> Iterator[tuple[str, Floats]]:
    random = np.random.default_rng(21)
    normal = random.standard_normal((33, 512))
    yield "normal", (normal * 0.02).astype(np.float32)
    yield "one row", normal[:1, :128].astype(np.float32)
    yield "odd rows", normal[:7, :384].astype(np.float32)
    yield "heavy tails", random.standard_t(1.5, (9, 768)).astype(np.float32)
    yield "sparse", (normal * (random.random(normal.shape) < 0.03)).astype(np.float32)
    yield "shifted", (normal + random.standard_normal((33, 1)) * 10).astype(np.float32)
    yield "near the smallest float16", (normal * 10.0 ** random.uniform(-9, -4, (33, 1))).astype(np.float32)
    yield "all sizes", (normal * 10.0 ** random.integers(-40, 5, normal.shape)).clip(-2e5, 2e5).astype(np.float32)
    yield "few levels", np.rint(normal).astype(np.float32)
    yield "halves", (np.rint(normal * 4) / 2).astype(np.float32)
    yield "special", special_rows()


HARD = list(hard_values())


def importances(width: int) -> Iterator[Floats | None]:
    random = np.random.default_rng(22)
    yield None
    yield random.chisquare(1, width).astype(np.float32)
    # From the smallest float32 to the largest, half of them zero.
    wide = (10.0 ** random.uniform(-45, 38.5, width)).astype(np.float32)
    yield np.where(random.random(width) < 0.5, wide, np.float32(0))


def by_reference(values: Floats, bits: int, group: int, importance: Floats | None = None) -> tuple[Floats, Floats]:
    """The packed codes and the bits of the scales."""
    codes, scales = encode_integers(values, bits, group, importance)
    return pack_bits(torch.from_numpy(codes), bits).numpy(), scales  # type: ignore[return-value]


def decoded(values: Floats, bits: int, group: int, importance: Floats | None = None) -> Floats:
    codes, scales = native.encode_groups(values, bits, group, importance=importance, threads=1)
    groups = Groups(bits, torch.from_numpy(codes), torch.from_numpy(scales.view(np.float16)))
    return groups.decode(torch.float32).numpy()


@pytest.mark.parametrize(("label", "values"), HARD, ids=[label for label, _ in HARD])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_every_level_gives_the_bytes_of_the_reference(bits: int, group: int, label: str, values: Floats) -> None:
    for importance in importances(values.shape[1]):
        codes, scales = by_reference(values, bits, group, importance)
        for level in native.levels():
            found = native.encode_groups(values, bits, group, importance=importance, threads=2, level=level)
            said = f"{label}, level {level}, importance {importance is not None}"
            assert np.array_equal(found[0], codes), said
            assert np.array_equal(found[1], scales), said


@pytest.mark.parametrize(("label", "values"), HARD, ids=[label for label, _ in HARD])
def test_q4_0_is_int4_in_groups_of_32(label: str, values: Floats) -> None:
    for importance in importances(values.shape[1]):
        codes, scales = (torch.from_numpy(part) for part in by_reference(values, 4, 32, importance))
        expected = as_blocks(Groups(4, codes, scales.view(torch.float16)), "Q4_0").numpy()
        for level in native.levels():
            found = native.encode(values, "Q4_0", importance=importance, threads=2, level=level)
            assert np.array_equal(found, expected), f"{label}, level {level}, importance {importance is not None}"


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_threads_do_not_change_the_bytes(bits: int, group: int) -> None:
    """More rows than one portion of work (65,536 values), and a last portion that is not full."""
    values = np.random.default_rng(23).standard_normal((261, 640)).astype(np.float32)
    one = native.encode_groups(values, bits, group, threads=1)
    for threads in (2, 3, 16):
        found = native.encode_groups(values, bits, group, threads=threads)
        assert np.array_equal(found[0], one[0])
        assert np.array_equal(found[1], one[1])
    last = native.encode_groups(values[260:], bits, group, threads=3)
    assert np.array_equal(last[0][0], one[0][260])
    assert np.array_equal(last[1][0], one[1][260])


@pytest.mark.parametrize("bits", BITS)
def test_a_grid_is_kept(bits: int) -> None:
    """Multiples of a scale that float16 holds, subnormal ones included, as far as a group has the lowest integer."""
    random, half = np.random.default_rng(24), 1 << (bits - 1)
    integers = random.integers(-half, half, (40, 256)).astype(np.float32)
    integers[:, ::32] = -half
    for sign in (1, -1):
        steps = sign * np.float16(2.0) ** np.arange(-24, 16).astype(np.float32)
        steps = np.where(np.arange(40) % 2, steps, steps * np.float32(1.25 if bits == 4 else 1.5))
        steps = steps.astype(np.float16).astype(np.float32)
        values = integers * steps[:, None]
        for group in GROUPS:
            assert np.array_equal(decoded(values, bits, group), values)


def test_what_float16_cannot_tell_from_zero_is_zero() -> None:
    for number in (0.0, -0.0, SUBNORMAL, -SUBNORMAL, 1e-30, 1e-9):
        for bits in BITS:
            codes, scales = native.encode_groups(np.full((1, 128), number, np.float32), bits, 32, threads=1)
            assert not scales.any()
            assert (codes == pack_bits(torch.full((1, 128), 1 << (bits - 1), dtype=torch.uint8), bits).numpy()).all()


def lost(values: Floats, found: Floats, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weighted squared error of each block of 32."""
    rest = found.astype(np.float64) - values
    return np.asarray((weights * rest**2).reshape(-1, 32).sum(1))


@pytest.mark.parametrize(("label", "values"), HARD, ids=[label for label, _ in HARD])
def test_no_block_of_q4_0_is_worse_than_rounded_to_nearest(label: str, values: Floats) -> None:
    """Than the blocks of the gguf package, in the measure that the search uses."""
    kind = gguf.GGMLQuantizationType.Q4_0
    with np.errstate(all="ignore"):
        plain = dequantize(quantize(values, kind), kind)
    found = dequantize(native.encode(values, "Q4_0", threads=1), kind)
    exact = values.astype(np.float64)
    before, after = lost(values, plain, exact**2), lost(values, found, exact**2)
    assert (after <= before * (1 + 1e-5)).all()
    if label in ("normal", "sparse"):
        assert after.sum() < 0.85 * before.sum()


@pytest.mark.parametrize("bits", BITS)
def test_importance_lowers_the_error_that_it_weighs(bits: int) -> None:
    random = np.random.default_rng(25)
    values = random.standard_normal((64, 512)).astype(np.float32)
    importance = random.chisquare(1, 512).astype(np.float32)
    plain, weighed = decoded(values, bits, 32), decoded(values, bits, 32, importance)
    weights = importance * values.astype(np.float64) ** 2
    assert lost(values, weighed, weights).sum() < 0.95 * lost(values, plain, weights).sum()
    # Only ratios inside a group count.
    assert np.array_equal(decoded(values, bits, 32, importance * np.float32(2.0**30)), weighed)
    assert np.array_equal(decoded(values, bits, 32, np.full(512, 0.7, np.float32)), plain)


@pytest.mark.parametrize("level", native.levels())
def test_the_first_bad_value_is_named_as_by_the_reference(level: str) -> None:
    values = np.random.default_rng(26).standard_normal((300, 768)).astype(np.float32)
    values[50, 700] = values[200, 1] = 1e30
    values[60, 3] = 6e5
    told = []
    for encode in (encode_integers, lambda *args: native.encode_groups(*args, threads=3, level=level)):
        with pytest.raises(CheckpointError, match=r"row 50, columns 640 to 703: .* int4_g64 .*float16") as one:
            encode(values, 4, 64)
        told.append(str(one.value))
        for wrong in (np.nan, np.inf, -np.inf):
            bad = values.copy()
            bad[120, 5] = bad[299, 767] = wrong
            with pytest.raises(CheckpointError, match="row 120, column 5 is not finite; int3_g32") as two:
                encode(bad, 3, 32)
            told.append(str(two.value))
        with pytest.raises(CheckpointError, match=r"row 9, columns 0 to 127"):
            encode(values[51:], 4, 128)
    assert told[:4] == told[4:]


def test_bad_arguments_are_refused() -> None:
    values = np.zeros((2, 256), np.float32)
    for bits, group in ((5, 32), (8, 32), (4, 16), (3, 256)):
        for encode in (encode_integers, lambda *args: native.encode_groups(*args, threads=1)):
            with pytest.raises(ConfigError, match=f"no encoder for {bits} bits in groups of {group}"):
                encode(values, bits, group)
    for wrong in (values[:, :100], values.astype(np.float16), values[0]):
        with pytest.raises(CheckpointError, match="in groups of 64 encodes float32"):
            native.encode_groups(wrong, 4, 64, threads=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="threads is 0"):
        native.encode_groups(values, 4, 64, threads=0)
    with pytest.raises(ConfigError, match="no level 'mmx'"):
        native.encode_groups(values, 4, 64, threads=1, level="mmx")
    importance = np.where(np.arange(256) == 3, -1, 1).astype(np.float32)
    with pytest.raises(CheckpointError, match="column 3"):
        native.encode_groups(values, 4, 64, threads=1, importance=importance)
    assert native.encode_groups(np.empty((0, 256), np.float32), 3, 64, threads=2)[0].shape == (0, 96)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_1", "Q4_K", "BF16"])
def test_rows_of_any_layout_and_dtype(name: str) -> None:
    values = torch.randn((6, 512), generator=torch.Generator().manual_seed(2)).bfloat16().float()
    expected = encode_rows(values, name)
    for same in (values.bfloat16(), values.t().contiguous().t(), values.repeat(1, 2)[:, :512], values.requires_grad_()):
        assert torch.equal(encode_rows(same, name), expected)
    wider = torch.stack((values.detach(), values.detach()), -1).flatten(1)
    assert torch.equal(encode_rows(wider[:, ::2], name), expected)
