"""Every GGML format is decoded to the bits that the `gguf` package gives, for any shape, stride, piece and device."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant import decode as decode_module
from mixtral.quant.decode import all_finite, decode, decode_into
from mixtral.quant.formats import FORMATS

NAMES = tuple(FORMATS)
# Where the float16 numbers of a block are. IQ1_M spreads its scale over four words; MXFP4 has an exponent instead.
HALVES = {
    **dict.fromkeys(("F16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
# Zeros, the subnormal ends, the smallest and largest normal numbers, infinities, quiet and signalling NaN.
SPECIAL = np.array(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01], np.uint16
)


def random_bytes(name: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Random blocks, uint8 [*shape[:-1], shape[-1] * bytes]; half of the float16 numbers are special ones."""
    size = FORMATS[name].bytes
    generator = np.random.default_rng([seed, FORMATS[name].id])
    blocks = generator.integers(0, 256, (*shape, size), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        chosen = generator.choice(SPECIAL, shape)[..., None].view(np.uint8)
        blocks[..., at : at + 2] = np.where(generator.random((*shape, 1)) < 0.5, chosen, blocks[..., at : at + 2])
    return blocks.reshape(*shape[:-1], -1)


def by_gguf(data: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[name])


def same_bits(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Equal as bit patterns, so that -0 is not 0; any NaN equals any NaN."""
    values = found.numpy()
    if values.shape != expected.shape or values.dtype != expected.dtype:
        return False
    equal = values.view(np.uint32) == expected.view(np.uint32)
    return bool((equal | (np.isnan(values) & np.isnan(expected))).all())


def tensor(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data)


def test_the_comparison_sees_a_bit() -> None:
    one = np.array([1.0, 0.0, np.nan], np.float32)
    assert same_bits(tensor(one), one.copy())
    assert not same_bits(tensor(one), np.array([np.nextafter(np.float32(1), 2), 0.0, np.nan], np.float32))
    assert not same_bits(tensor(one), np.array([1.0, -0.0, np.nan], np.float32))
    assert not same_bits(tensor(one), np.array([1.0, 0.0, np.inf], np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_random_blocks(name: str) -> None:
    data = random_bytes(name, 24, 16)
    expected = by_gguf(data, name)
    if name in HALVES:
        assert np.isnan(expected).any()
        assert np.isinf(expected).any()
    assert same_bits(decode(tensor(data), name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_uniform_blocks(name: str) -> None:
    """All bits clear, all set, and each byte value throughout the block."""
    data = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 2 * FORMATS[name].bytes, axis=1)
    found = decode(tensor(data), name)
    assert same_bits(found, by_gguf(data, name))
    assert bool((found[0] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_each_bit_alone(name: str) -> None:
    """One bit of a block at a time, with scales of 1.5: a value that looks at the wrong bit shows itself."""
    size = FORMATS[name].bytes
    data = np.packbits(np.eye(8 * size, dtype=np.uint8), axis=1, bitorder="little")
    for at in HALVES.get(name, ()):
        data[:, at : at + 2] = np.array([0x3E00], np.uint16).view(np.uint8)
    assert same_bits(decode(tensor(data), name), by_gguf(data, name))


def test_every_exponent_of_mxfp4() -> None:
    data = random_bytes("MXFP4", 256, 1)
    data[:, 0] = np.arange(256)
    assert same_bits(decode(tensor(data), "MXFP4"), by_gguf(data, "MXFP4"))


@pytest.mark.parametrize("name", NAMES)
def test_leading_dimensions(name: str) -> None:
    data = random_bytes(name, 2, 1, 3, 4)
    expected = by_gguf(data, name)
    assert expected.shape == (2, 1, 3, 4 * FORMATS[name].values)
    assert same_bits(decode(tensor(data), name), expected)
    assert same_bits(decode(tensor(data[0, 0, 0]), name), expected[0, 0, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 1), (3, 0)])
def test_nothing_to_decode(name: str, shape: tuple[int, ...]) -> None:
    data = torch.empty(*shape[:-1], shape[-1] * FORMATS[name].bytes, dtype=torch.uint8)
    found = decode(data, name)
    assert found.shape == (*shape[:-1], shape[-1] * FORMATS[name].values)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_K", "Q6_K", "IQ2_XS", "MXFP4"])
def test_other_dtypes_are_a_cast(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "CHUNK_VALUES", 5 * FORMATS[name].values)
    data = tensor(random_bytes(name, 7, 4))
    found = decode(data, name, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found.nan_to_num(nan=7.0), tensor(by_gguf(data.numpy(), name)).to(dtype).nan_to_num(nan=7.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("blocks", "pieces"), [(1, 60), (3, 30), (4, 15), (5, 15), (11, 10), (12, 5), (59, 2), (60, 1), (61, 1)]
)
def test_pieces_of_any_size(name: str, blocks: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit below, at and above a row of 4 blocks, a matrix of 12 and the tensor of 60."""
    data = random_bytes(name, 5, 3, 4)
    expected = by_gguf(data, name)
    sizes = []
    original = decode_module._DECODERS[name]

    def recording(piece: torch.Tensor, out: torch.Tensor) -> None:
        sizes.append(len(piece))
        original(piece, out)

    monkeypatch.setattr(decode_module, "CHUNK_VALUES", blocks * FORMATS[name].values)
    monkeypatch.setattr(decode_module, "_DECODERS", {name: recording})
    assert same_bits(decode(tensor(data), name), expected)
    assert max(sizes) <= blocks
    assert sum(sizes) == 60
    assert len(sizes) == pieces


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_not_aligned_or_not_together(name: str) -> None:
    data = random_bytes(name, 6, 4)
    expected = by_gguf(data, name)
    size = FORMATS[name].bytes
    for offset in (1, 2, 3, 5):
        raw = bytearray(offset) + bytearray(data.tobytes())
        shifted = torch.frombuffer(raw, dtype=torch.uint8)[offset:].view(6, -1)
        assert same_bits(decode(shifted, name), expected)
        mapped = torch.frombuffer(raw, dtype=torch.uint8, offset=offset).view(6, -1)
        assert same_bits(decode(mapped, name), expected)
        assert same_bits(decode(mapped[0, :size], name), expected[0, : FORMATS[name].values])
    apart = tensor(np.asfortranarray(data))
    assert not apart.is_contiguous()
    assert same_bits(decode(apart, name), expected)
    assert same_bits(decode(apart[:, :size], name), by_gguf(data[:, :size], name))
    assert same_bits(decode(tensor(data)[:, size : 3 * size], name), by_gguf(data[:, size : 3 * size], name))
    assert same_bits(decode(tensor(data)[::2], name), expected[::2])
    assert same_bits(decode(tensor(data)[:1].expand(3, -1), name), expected[[0, 0, 0]])


def test_strided_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "CHUNK_VALUES", 3 * 256)
    data = tensor(random_bytes("Q4_K", 4, 3, 5)).transpose(0, 1)
    assert same_bits(decode(data, "Q4_K"), by_gguf(data.numpy(), "Q4_K"))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_small_tensor(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    raw = random_bytes(name, *shape, seed=data.draw(st.integers(0, 2**32)))
    offset = data.draw(st.integers(0, 9))
    shifted = torch.frombuffer(bytearray(offset) + bytearray(raw.tobytes()), dtype=torch.uint8, offset=offset)
    assert same_bits(decode(shifted.view(raw.shape), name), by_gguf(raw, name))


@pytest.mark.parametrize("name", NAMES)
def test_the_input_stays_as_it_is(name: str) -> None:
    data = tensor(random_bytes(name, 3, 4))
    before = data.clone()
    decode(data, name)
    assert torch.equal(data, before)


def test_decode_into_a_part_of_a_parameter() -> None:
    data = random_bytes("Q6_K", 3, 2)
    stacked = torch.nn.Parameter(torch.full((4, 3, 512), 7.0))
    decode_into(tensor(data), "Q6_K", stacked[2])
    assert same_bits(stacked[2].detach(), by_gguf(data, "Q6_K"))
    assert bool((stacked[[0, 1, 3]] == 7.0).all())


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (torch.zeros(2, 511), r"Q4_K rows of \[2, 288\] bytes decode to a contiguous \[2, 512\]; got \[2, 511\]"),
        (torch.zeros(512, 2).t(), r"got \[2, 512\], not contiguous"),
        (torch.zeros(2, 512, dtype=torch.int32), "cannot decode into torch.int32 on cpu"),
        (torch.zeros(2, 512, device="meta"), "cannot decode into torch.float32 on meta"),
    ],
)
def test_a_wrong_target_is_refused(out: torch.Tensor, told: str) -> None:
    data = torch.full((2, 288), 60, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=told):
        decode_into(data, "Q4_K", out)
    assert out.device.type == "meta" or not bool(out.any())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_cut_off_is_refused(name: str) -> None:
    size = FORMATS[name].bytes
    for width in (1, size - 1, size + 1, 5 * size + 1):
        with pytest.raises(CheckpointError, match=f"{name} keeps .* but a row has {width:,} bytes"):
            decode(torch.zeros(2, width, dtype=torch.uint8), name)


@pytest.mark.parametrize(
    "data", [torch.zeros(144), torch.zeros(144, dtype=torch.int8), torch.zeros((), dtype=torch.uint8)]
)
def test_what_is_no_row_of_bytes_is_refused(data: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"Q4_K is decoded from rows of uint8 .* got torch\."):
        decode(data, "Q4_K")


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"that are in memory; got torch\.uint8 .* on meta"):
        decode(torch.zeros(2, 144, dtype=torch.uint8, device="meta"), "Q4_K")


@pytest.mark.parametrize("name", ["Q4_k", "", "TQ1_0", "float32"])
def test_an_unknown_format_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown number format {name!r}; expected one of F32, F16,"):
        decode(torch.zeros(2, 144, dtype=torch.uint8), name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_hold_the_values_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"cannot decode to {dtype}; expected one of float32, float16, bfloat16"):
        decode(torch.zeros(2, 144, dtype=torch.uint8), "Q4_K", dtype=dtype)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_gives_the_same_bits() -> None:
    device = torch.accelerator.current_accelerator()
    for name in NAMES:
        data = random_bytes(name, 8, 16)
        expected = by_gguf(data, name)
        found = decode(tensor(data).to(device), name)
        assert found.device.type == device.type
        assert same_bits(found.cpu(), expected), name
        across = torch.empty(expected.shape, device=device)
        decode_into(tensor(data), name, across)
        assert same_bits(across.cpu(), expected), name


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_numbers_are_known_by_their_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, and a row that is not finite among 40 that are, in pieces and at once."""
    rows = random_bytes(name, 400, 1 if FORMATS[name].values > 1 else 8)
    good = np.isfinite(by_gguf(rows, name)).all(axis=1)
    assert good.any()
    assert [all_finite(tensor(row[None]), name) for row in rows] == good.tolist()
    if good.all():
        assert name == "MXFP4"  # whose scales are all numbers
        return
    mixed = np.concatenate([rows[good][:30], rows[~good][:1], rows[good][:10]])
    for values in (256, 512, decode_module.CHUNK_VALUES):
        monkeypatch.setattr(decode_module, "CHUNK_VALUES", values)
        assert not all_finite(tensor(mixed), name)
        assert all_finite(tensor(rows[good]), name)
    assert all_finite(tensor(rows[:0]), name)
