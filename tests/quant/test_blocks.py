"""The formats that are written without a search: the bytes of the `gguf` package, and errors within their bounds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant import blocks
from mixtral.quant.blocks import ENCODED, encode, tiles
from mixtral.quant.decode import decode
from mixtral.quant.formats import FORMATS

SCALED = ("Q4_1", "Q5_0", "Q5_1", "Q8_0")
WIDTH = 256


def by_gguf(values: np.ndarray, name: str) -> np.ndarray:
    """The rows as uint8, by the reference. It is run a row at a time: the rows must not know of each other."""
    with np.errstate(all="ignore"):
        rows = [quantize(row, gguf.GGMLQuantizationType[name]).view(np.uint8) for row in np.ascontiguousarray(values)]
    return np.stack([row.reshape(-1) for row in rows])


def rows_of(kind: str) -> np.ndarray:
    generator = np.random.default_rng(3)
    values = generator.standard_normal((24, WIDTH)).astype(np.float32)
    if kind == "scales":  # from numbers whose scale is a subnormal float32, over subnormal float16, to large
        return values * np.logspace(-44, 4, 24, dtype=np.float64)[:, None].astype(np.float32)
    if kind == "constant":
        return np.repeat(values[:, :1], WIDTH, axis=1) * np.logspace(-30, 3, 24)[:, None].astype(np.float32)
    if kind == "zero":
        return np.stack([np.zeros(WIDTH), -np.zeros(WIDTH)]).astype(np.float32)
    if kind == "outlier":
        values[np.arange(24), generator.integers(0, WIDTH, 24)] = np.logspace(-2, 5, 24) * np.where(
            values[:, 0] < 0, -1, 1
        )
        return values
    if kind == "one-sided":
        return np.abs(values) * np.where(np.arange(24) % 2, 1, -1)[:, None].astype(np.float32)
    if kind == "coarse":  # few distinct values: ties between largest ones, and results that end in exactly one half
        return generator.integers(-8, 9, (24, WIDTH)).astype(np.float32) / 2
    return values


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("kind", ["normal", "scales", "constant", "zero", "outlier", "one-sided", "coarse"])
def test_bytes_equal_the_reference(name: str, kind: str) -> None:
    values = rows_of(kind)
    if name == "F16":
        values = values.clip(-65504, 65504)
    before = values.copy()
    assert np.array_equal(encode(torch.from_numpy(values), name).numpy(), by_gguf(values, name))
    assert np.array_equal(values.view(np.uint32), before.view(np.uint32))


def test_q8_0_rounds_halves_away_from_zero() -> None:
    below = np.nextafter(np.float32(0.5), np.float32(0))
    row = np.zeros(32, np.float32)
    row[:9] = [127, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, below, -below]
    codes = encode(torch.from_numpy(row), "Q8_0")[2:].view(torch.int8)
    assert codes[:9].tolist() == [127, 1, -1, 2, -2, 3, -3, 0, 0]


def test_of_two_farthest_values_the_first_sets_the_sign() -> None:
    row = np.zeros(32, np.float32)
    row[[5, 9]] = [3, -3]
    for values in (row, -row):
        assert np.array_equal(encode(torch.from_numpy(values), "Q5_0").numpy(), by_gguf(values[None], "Q5_0")[0])
    assert encode(torch.from_numpy(row), "Q5_0")[1] >= 128 > encode(torch.from_numpy(-row), "Q5_0")[1]


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_of_two_zeros_the_first_is_the_minimum(name: str) -> None:
    for first, second in ((0, 1), (3, 20), (8, 31), (16, 17), (5, 13)):
        row = torch.ones(32)
        row[first], row[second] = -0.0, 0.0
        assert encode(row, name)[2:4].tolist() == [0x00, 0x80]
        row[first], row[second] = 0.0, -0.0
        assert encode(row, name)[2:4].tolist() == [0x00, 0x00]


@settings(deadline=None, max_examples=150)
@given(
    values=arrays.arrays(
        np.float32, (2, 32), elements=st.floats(-1024, 1024, width=32).map(lambda value: value + 0.0), fill=st.nothing()
    ),
    name=st.sampled_from(ENCODED),
)
def test_any_finite_rows(values: np.ndarray, name: str) -> None:
    assert np.array_equal(encode(torch.from_numpy(values), name).numpy(), by_gguf(values, name))


@settings(deadline=None, max_examples=300)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_bf16_takes_every_bit_pattern(bits: list[int]) -> None:
    """Rounding to even, numbers that round to infinity, infinities, and NaN of every payload."""
    values = np.array([[*bits, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7F7FFFFF, 0x7F800000, 0x3F808000]], np.uint32)
    found = encode(torch.from_numpy(values.view(np.float32)), "BF16")
    assert np.array_equal(found.numpy(), by_gguf(values.view(np.float32), "BF16"))
    back = decode(found, "BF16")
    assert np.array_equal(np.isnan(back.numpy()), np.isnan(values.view(np.float32)))


def test_every_float16_and_every_midpoint() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact = halves.astype(np.float32)
    finite = exact[np.isfinite(exact)]
    middles = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    nearby = np.concatenate([middles, np.nextafter(middles, np.float32(1e9)), np.nextafter(middles, np.float32(-1e9))])
    for values in (exact, nearby):
        found = encode(torch.from_numpy(values), "F16").numpy().view(np.float16)
        expected = values.astype(np.float16)
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(found), nan)
        assert np.array_equal(found.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("kind", ["normal", "outlier", "one-sided", "coarse", "zero"])
def test_error_is_within_half_a_step(name: str, kind: str) -> None:
    values = rows_of(kind).clip(-65504, 65504)
    exact = values.astype(np.float64).reshape(-1, 32)
    low, high = exact.min(1, keepdims=True), exact.max(1, keepdims=True)
    size = np.maximum(-low, high)
    # Half a step, and the rounding of the scale to float16 under the largest code. A format centred on zero has no
    # code for the opposite of its farthest value: there it may miss by a whole step.
    bound = {
        "F32": 0 * size,
        "F16": np.abs(exact) * 2.0**-11 + 2.0**-25,
        "BF16": np.abs(exact) * 2.0**-8,
        "Q5_0": size / 16 * (1 + 16 * 2.0**-11),
        "Q8_0": size / 127 * (0.5 + 127 * 2.0**-11),
        "Q4_1": (high - low) / 15 * (0.5 + 15 * 2.0**-11) + np.abs(low) * 2.0**-11,
        "Q5_1": (high - low) / 31 * (0.5 + 31 * 2.0**-11) + np.abs(low) * 2.0**-11,
    }[name]
    back = decode(encode(torch.from_numpy(values), name), name).numpy().reshape(-1, 32)
    error = np.abs(back - exact)
    assert (error <= bound * (1 + 1e-5) + 1e-6).all()
    if kind == "normal" and name in SCALED:
        assert error.max() > 0.3 * bound.max()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_decoded_blocks_encode_to_themselves(name: str) -> None:
    """Once rounded, the plain formats and Q8_0 keep their bytes."""
    values = torch.from_numpy(rows_of("normal"))
    once = encode(values, name)
    assert torch.equal(encode(decode(once, name), name), once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODED)
def test_narrow_input_counts_as_float32(name: str, dtype: torch.dtype) -> None:
    values = torch.from_numpy(rows_of("normal")).to(dtype)
    assert torch.equal(encode(values, name), encode(values.float(), name))


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("limit", [1, 64, 96, 512, 4096])
def test_shapes_strides_and_pieces(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ENCODE_VALUES", max(limit, FORMATS[name].values))
    values = torch.from_numpy(rows_of("normal")).view(2, 3, 4, WIDTH)[..., :96]
    expected = by_gguf(values.reshape(-1, 96).numpy(), name).reshape(2, 3, 4, -1)
    assert np.array_equal(encode(values, name).numpy(), expected)
    assert np.array_equal(encode(values.transpose(0, 2), name).numpy(), expected.swapaxes(0, 2))
    apart = values.transpose(2, 3).contiguous().transpose(2, 3)
    assert apart.stride(-1) != 1
    assert np.array_equal(encode(apart, name).numpy(), expected)
    single = values[0, 0, :, :32].t().contiguous().t()
    assert np.array_equal(encode(single, name).numpy(), by_gguf(single.numpy(), name))
    assert np.array_equal(encode(torch.nn.Parameter(values[0, 0, 0].clone()), name).numpy(), expected[0, 0, 0])
    assert encode(values[:0], name).shape == (0, 3, 4, expected.shape[-1])
    assert encode(values[..., :0], name).shape == (2, 3, 4, 0)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(name: str, number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ENCODE_VALUES", 128)
    values = torch.from_numpy(rows_of("normal")).view(4, 6, WIDTH).clone()
    values[2, 1, 77] = values[3, 0, 5] = number
    with pytest.raises(
        CheckpointError, match=rf"^row 13, column 77 of \[4, 6, 256\]: {number:g}: {name} holds finite numbers only"
    ):
        encode(values, name)


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_beyond_float16_is_refused(name: str) -> None:
    values = torch.zeros(3, 64)
    values[1, 40], values[1, 41] = 3e38, -3e38
    with pytest.raises(
        CheckpointError, match=rf"row 1, column 32 of \[3, 64\].*block of {name} whose scale or minimum"
    ):
        encode(values, name)


def test_a_number_beyond_f16_is_refused_but_infinity_is_kept() -> None:
    values = torch.tensor([[1.0, 65519.0], [float("inf"), 65520.0]])
    with pytest.raises(CheckpointError, match=r"row 1, column 1 of \[2, 2\]: 65520: beyond the range of F16"):
        encode(values, "F16")
    assert decode(encode(values[:, :1], "F16"), "F16").tolist() == [[1.0], [float("inf")]]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("width", [1, 31, 33, 100])
def test_a_row_that_does_not_fill_its_blocks_is_refused(name: str, width: int) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} packs 32 values .* \[2, {width}\]"):
        encode(torch.zeros(2, width), name)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(32, dtype=torch.float64),
        torch.zeros(32, dtype=torch.int32),
        torch.zeros(32, device="meta"),
        torch.tensor(1.0),
    ],
)
def test_what_is_no_row_of_floats_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="encode takes rows of float32, float16 or bfloat16 that are in memory; got"):
        encode(values, "Q8_0")


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "MXFP4", "q8_0", ""])
def test_a_format_that_is_not_written_here_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"'{name}' cannot be written as plain blocks; expected one of F32, F16, BF16"
    ):
        encode(torch.zeros(256), name)


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7, 23, 24, 100])
def test_tiles_cover_everything_once_and_in_order(limit: int) -> None:
    source = torch.arange(24 * 2).view(2, 3, 4, 2)
    target = torch.zeros(2, 3, 4, 5)
    seen = []
    for piece, place in tiles(source, target, limit):
        assert len(piece) == len(place) <= limit
        assert piece.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        seen += piece[:, 0].tolist()
        place += piece[:, :1]
    assert seen == list(range(0, 48, 2))
    assert torch.equal(target, source[..., :1].expand(2, 3, 4, 5).float())
