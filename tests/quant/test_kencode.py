from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize

from mixtral.errors import CheckpointError, ConfigError
from mixtral.quant.formats import FORMATS
from mixtral.quant.kencode import K_FORMATS, encode_k
from mixtral.quant.search import Symmetric

Floats = npt.NDArray[np.float32]

# Root mean square error over that of the values, in percent: normal values, Laplace, Student's t with 4 degrees.
ERRORS = {
    "Q2_K": (27.86, 31.83, 31.60),
    "Q3_K": (14.75, 17.32, 18.03),
    "Q4_K": (7.19, 8.55, 8.79),
    "Q5_K": (3.53, 4.19, 4.29),
    "Q6_K": (1.71, 2.10, 2.25),
}


def decode(blocks: npt.NDArray[np.uint8], name: str) -> Floats:
    return dequantize(blocks, gguf.GGMLQuantizationType[name])


def through(values: Floats, name: str, importance: Floats | None = None) -> Floats:
    return decode(encode_k(values, name, importance), name)


def relative_error(values: Floats, name: str, importance: Floats | None = None) -> float:
    """Root mean square error, each column counting as its importance, over the root mean square of the values."""
    weights = np.ones(values.shape[1]) if importance is None else importance
    rest = through(values, name, importance).astype(np.float64) - values
    return float(np.sqrt((weights * rest**2).sum() / (weights * values.astype(np.float64) ** 2).sum()))


def samples(kind: int) -> Floats:
    random = np.random.default_rng(0)
    size = (64, 2048)
    drawn = random.standard_normal(size), random.laplace(size=size), random.standard_t(4, size=size)
    return drawn[kind].astype(np.float32)


@pytest.mark.parametrize("kind", range(3), ids=["normal", "laplace", "student"])
@pytest.mark.parametrize("name", K_FORMATS)
def test_the_error_stays_where_it_was_measured(name: str, kind: int) -> None:
    values = samples(kind)
    blocks = encode_k(values, name)
    assert blocks.shape == (64, 8 * FORMATS[name].bytes)
    expected = ERRORS[name][kind] / 100
    assert 0.97 * expected < relative_error(values, name) < 1.005 * expected


@pytest.mark.parametrize("name", K_FORMATS)
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    values = samples(0)[:16]
    importance = np.random.default_rng(1).chisquare(1, 2048).astype(np.float32)
    plain = through(values, name).astype(np.float64) - values
    weighed = through(values, name, importance).astype(np.float64) - values
    assert (importance * weighed**2).sum() < 0.9 * (importance * plain**2).sum()
    # Only ratios inside a super-block count.
    assert np.array_equal(through(values, name, importance * np.float32(2.0**30)), through(values, name, importance))
    # No importance at all is the same for all: the plain error is then lower than with the standard weights.
    even = through(values, name, np.zeros(2048, np.float32)).astype(np.float64) - values
    assert (even**2).sum() < (plain**2).sum()


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])
def test_the_search_beats_scales_that_span_the_range(name: str) -> None:
    """Against a plain encoder: scale and low from the extremes, unrounded, which is more than any block can hold."""
    values = samples(0)[:16]
    form = K_FORMATS[name][0]
    groups = values.reshape(-1, form.values).astype(np.float64)
    low = np.minimum(groups.min(1, keepdims=True), 0)
    step = (groups.max(1, keepdims=True) - low) / (2 ** {"Q2_K": 2, "Q4_K": 4, "Q5_K": 5}[name] - 1)
    rest = np.rint((groups - low) / step) * step + low - groups
    assert relative_error(values, name) < 0.96 * np.sqrt((rest**2).mean() / (groups**2).mean())


@pytest.mark.parametrize("name", K_FORMATS)
def test_the_choice_is_the_same_at_every_power_of_two(name: str) -> None:
    """Away from the smallest float16s, values times a power of two give the result times it: no integer changes."""
    values = samples(0)[:4]
    assert np.array_equal(through(values * np.float32(64), name), through(values, name) * 64)


@pytest.mark.parametrize("name", K_FORMATS)
def test_edge_rows_keep_their_meaning(name: str) -> None:
    rows = np.zeros((6, 256), np.float32)
    rows[1], rows[2] = 3.0, -3.0
    rows[3, 7], rows[4, 200] = 5.0, -5.0
    rows[5] = 1e-30
    result = through(rows, name)
    assert np.isfinite(result).all()
    assert not result[0].any()
    assert np.allclose(result[1:3], rows[1:3], rtol=0.001, atol=1e-4)
    assert np.allclose(result[3:5], rows[3:5], atol=5.0 * 2.0**-11)
    assert not result[5].any()


@pytest.mark.parametrize("name", K_FORMATS)
def test_an_outlier_costs_its_own_sub_block_alone(name: str) -> None:
    values = samples(0)[:1, :256].copy()
    values[0, 5] = 40.0
    rest = through(values, name) - values
    assert abs(rest[0, 5]) < 1.5
    others = rest[0, 32:]
    assert np.sqrt((others**2).mean()) < {"Q2_K": 1.2, "Q3_K": 0.5, "Q4_K": 0.3, "Q5_K": 0.3, "Q6_K": 0.06}[name]


@pytest.mark.parametrize("name", K_FORMATS)
@pytest.mark.parametrize("size", [1e-4, 1e-5])
def test_values_near_the_smallest_float16_are_kept(name: str, size: float) -> None:
    """The common scale is then one of few float16s; integer scales make up for it. 2^-24 is the finest step of all."""
    values = samples(0)[:8] * np.float32(size)
    rest = through(values, name) - values
    allowed = ERRORS[name][0] / 100 * size * 1.25 + 2.0**-24 / 2
    assert np.sqrt((rest.astype(np.float64) ** 2).mean()) < allowed


@pytest.mark.parametrize("name", K_FORMATS)
def test_large_values_fit_up_to_the_largest_scale(name: str) -> None:
    form = K_FORMATS[name][0]
    # A low is stored once, a scale times the largest integer of a value.
    steps = form.half if isinstance(form, Symmetric) else 1
    largest = np.float32(65504.0 * form.most * steps)
    values = samples(0)[:2, :512]
    values = values / np.abs(values).max() * largest * np.float32(0.75)
    assert relative_error(values, name) < 1.05 * relative_error(samples(0)[:2, :512], name)
    values[1, 300] = largest * np.float32(100)
    with pytest.raises(CheckpointError, match=rf"row 1, columns 256 to 511: .*{name}.*float16"):
        encode_k(values, name)
    with pytest.raises(CheckpointError, match="float16"):
        encode_k(np.full((1, 256), 3e38, np.float32), name)


def test_many_blocks_are_the_blocks_one_by_one() -> None:
    """Blocks know nothing of each other, nor of the portions that the encoder works in."""
    values = np.random.default_rng(3).standard_normal((700, 768)).astype(np.float32)
    importance = np.random.default_rng(4).chisquare(1, 768).astype(np.float32)
    together = encode_k(values, "Q2_K", importance).reshape(700, 3, -1)
    for row, column in ((0, 0), (682, 1), (682, 2), (683, 0), (699, 2)):
        part = slice(column * 256, column * 256 + 256)
        alone = encode_k(values[row : row + 1, part], "Q2_K", importance[part])
        assert np.array_equal(alone[0], together[row, column])


def test_strided_rows_and_no_rows() -> None:
    values = samples(0)[:8]
    assert np.array_equal(encode_k(values[::2], "Q6_K"), encode_k(values[::2].copy(), "Q6_K"))
    assert encode_k(np.empty((0, 512), np.float32), "Q4_K").shape == (0, 288)


def test_bad_input_is_refused() -> None:
    values = np.zeros((3, 512), np.float32)
    with pytest.raises(ConfigError, match="'Q4_0'; there are Q2_K, Q3_K"):
        encode_k(values, "Q4_0")
    with pytest.raises(CheckpointError, match="float64"):
        encode_k(values.astype(np.float64), "Q4_K")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"\[512\]"):
        encode_k(values[0], "Q4_K")
    with pytest.raises(CheckpointError, match="packs 256 values"):
        encode_k(values[:, :500], "Q4_K")
    for wrong in (np.nan, np.inf, -np.inf):
        values[:] = 0
        values[1, 400] = values[2, 3] = wrong
        with pytest.raises(CheckpointError, match="row 1, column 400 is not finite"):
            encode_k(values, "Q4_K")


def test_bad_importance_is_refused() -> None:
    values = np.zeros((1, 256), np.float32)
    with pytest.raises(CheckpointError, match=r"float32 \[256\].*got float32 \[255\]"):
        encode_k(values, "Q4_K", np.ones(255, np.float32))
    with pytest.raises(CheckpointError, match="got float64"):
        encode_k(values, "Q4_K", np.ones(256))  # type: ignore[arg-type]
    for wrong in (-1.0, np.nan, np.inf):
        importance = np.ones(256, np.float32)
        importance[17] = wrong
        with pytest.raises(CheckpointError, match="column 17"):
            encode_k(values, "Q4_K", importance)
