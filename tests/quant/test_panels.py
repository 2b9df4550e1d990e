"""The compiled kernels: packing is a permutation, and products of rounded activations depend on nothing else."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mixtral import ops
from mixtral.errors import CheckpointError
from mixtral.ops import native
from mixtral.ops.native import kernel_levels, module
from mixtral.quant.encode import encode_rows
from mixtral.quant.formats import FORMATS as FORMATS_OF_FILES
from mixtral.quant.mixes import MIXES
from mixtral.quant.modules import PackedExperts, PackedLinear
from mixtral.quant.packed import Blocks, Groups, Packed
from mixtral.quant.panels import PANEL_VERSION, Panels, to_panels
from mixtral.quant.recode import as_blocks
from mixtral.quant.rtn import IntForm, encode_groups

K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
FORMATS = [*K_QUANTS, "Q4_0", "Q8_0", "INT4_G64", "INT4_G128_ZEROS", "INT3_G32", "INT8_G512", "INT8_G32"]
SCALES = {name: FORMATS_OF_FILES[name].halves for name in [*K_QUANTS, "Q4_0", "Q8_0"]}  # where they are in a block
COUNTS = [*range(1, 10), 15, 16, 17, 31, 32, 33, 64, 129, 500]


def values(rows: int, columns: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * scale


def packed(name: str, rows: int = 50, columns: int = 512, seed: int = 0) -> Packed:
    """A random matrix in a format."""
    given = values(rows, columns, seed)
    if name.startswith("Q"):
        return Blocks(name, encode_rows(given, name))
    bits, group = int(name[3]), int(name.split("_")[1][1:])
    if not name.endswith("ZEROS"):
        return encode_groups(given, IntForm(bits, group))
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (rows, columns // group))).half()
    return Groups(bits, codes, scales, zeros=torch.from_numpy(rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8)))


def panels(source: Packed) -> Panels:
    found = to_panels(source)
    assert found is not None
    return found


def rounded(x: torch.Tensor) -> NDArray[np.float64]:
    """A8 in float64, but for the scale and its reciprocal, which the kernels make in float32."""
    found = np.zeros(x.shape)
    for row in range(len(x)):
        for start in range(0, x.shape[1], 256):
            block = x[row, start : start + 256].numpy()
            largest = np.abs(block).max()
            if largest < np.float32(1e-30):
                continue
            inverse = np.float32(127) / largest
            q = np.rint((block * inverse).astype(np.float32))
            found[row, start : start + 256] = q.astype(np.float64) * float(largest / np.float32(127))
    return found


def multiply(matrix: Panels, x: torch.Tensor, level: str, threads: int = 2) -> torch.Tensor:
    out = torch.full((len(x), matrix.shape[0]), float("nan"))
    module().project(x.numpy(), [matrix.matrix], out.numpy(), threads, level=level)
    return out


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_packing_is_a_permutation(name: str, rows: int) -> None:
    source = packed(name, rows)
    found = panels(source)
    assert (found.label, found.shape) == (source.label, source.shape)
    assert torch.equal(found.decode(torch.float32), source.decode(torch.float32))
    if isinstance(source, Blocks) and name.endswith("K"):
        back = found.unpacked()
        assert isinstance(back, Blocks)
        assert torch.equal(back.data, source.data)
    part = torch.empty((min(rows, 9), 512))
    start = rows - len(part)
    found.decode_rows(start, part)
    assert torch.equal(part, source.decode(torch.float32)[start:])
    some = torch.tensor([rows - 1, 0])
    assert torch.equal(found.pick_rows(some, torch.float32), source.pick_rows(some, torch.float32))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512, 96])
@pytest.mark.parametrize("zeros", [False, True])
def test_integers_of_all_widths(bits: int, group: int, zeros: bool) -> None:
    """Also with rows that leave a panel, and a block, unfilled."""
    rng, rows, columns = np.random.default_rng(bits), 37, 2 * group
    codes = torch.from_numpy(rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (rows, columns // group))).half()
    some = torch.from_numpy(rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8)) if zeros else None
    source = Groups(bits, codes, scales, zeros=some)
    found = panels(source)
    assert torch.equal(found.decode(torch.float64), source.decode(torch.float64))
    back = found.unpacked()
    assert isinstance(back, Groups)
    assert torch.equal(back.codes, codes)


# Bytes of a lane in each vector and run of a block of 256 columns, as panels.h lists them: quants, then scales.
WIDTHS = {
    "Q2_K": [4] * 16 + [2] * 10,
    "Q3_K": [4] * 24 + [2] * 9,
    "Q4_K": [4] * 32 + [1] * 8 + [2] * 6,
    "Q5_K": [4] * 40 + [1] * 8 + [2] * 6,
    "Q6_K": [4] * 48 + [1] * 16 + [2],
    "Q4_0": [4] * 32 + [2, 1] * 8,
    "Q8_0": [4] * 64 + [2, 1] * 8,
}


def lanes(name: str, matrix: Panels) -> NDArray[np.uint8]:
    """What panels have for each row [16 * panels, bytes], also for those beyond the last one."""
    rows, columns = matrix.shape
    blocks = matrix.data.numpy().reshape(-(-rows // 16), columns // 256, -1)
    ends = np.cumsum([16 * width for width in WIDTHS[name]])
    assert not blocks[..., ends[-1] :].any()
    parts = np.split(blocks[..., : ends[-1]], ends[:-1], axis=-1)
    split = [part.reshape(*part.shape[:2], 16, -1) for part in parts]
    return np.concatenate(split, axis=-1).transpose(0, 2, 1, 3).reshape(16 * len(blocks), -1)


@pytest.mark.parametrize("name", [*K_QUANTS, "Q4_0", "Q8_0"])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_blocks_of_any_bits(name: str, rows: int) -> None:
    """Every bit of a block has its place; what is beyond the last row is zero."""
    kind = FORMATS_OF_FILES[name]
    data = np.random.default_rng(rows).integers(0, 256, (rows, 512 // kind.values * kind.bytes), dtype=np.uint8)
    for at in SCALES[name]:
        data.reshape(rows, -1, kind.bytes)[..., at + 1] &= 0x7B  # a scale is finite
    source = Blocks(name, torch.from_numpy(data))
    found = panels(source)
    back = found.unpacked()
    same = back.data if isinstance(back, Blocks) else as_blocks(cast(Groups, back), name)
    assert torch.equal(same, source.data)
    assert not lanes(name, found)[rows:].any()
    assert all(lane.any() for lane in lanes(name, found)[:rows])


@pytest.mark.parametrize(("name", "at"), [(name, at) for name in SCALES for at in SCALES[name]])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 31, 49])
def test_a_scale_that_is_no_number(name: str, at: int, scale: float, row: int) -> None:
    source = cast(Blocks, packed(name))
    size = FORMATS_OF_FILES[name].bytes
    source.data[row].view(-1, size)[1, at : at + 2] = torch.tensor([scale]).half().view(torch.uint8)
    with pytest.raises(CheckpointError, match="a scale is not finite; the weights are damaged"):
        to_panels(source)


PANELS_1 = "b1c7bc9411e625ec1b37c3cd94c212ce7c103fd1611a41eee75d8e2e5c214d21"


def test_bytes_of_panels_have_a_version() -> None:
    """Files of packed weights are used by another build only if it makes the same bytes: whoever changes them adds one
    to ``PANEL_VERSION`` and puts the new digest here."""
    digest = hashlib.sha256()
    for name in (*K_QUANTS, "Q4_0", "Q8_0"):
        kind = FORMATS_OF_FILES[name]
        size = 512 // kind.values * kind.bytes
        data = (np.arange(19 * size, dtype=np.uint64) * 2654435761 >> 13).astype(np.uint8) & 0x3B
        digest.update(panels(Blocks(name, torch.from_numpy(data.reshape(19, size)))).data.numpy())
    for bits, group in ((3, 32), (4, 64), (6, 128), (8, 256)):
        codes = (np.arange(19 * 64 * bits, dtype=np.uint64) * 2654435761 >> 13).astype(np.uint8)
        scales = torch.full((19, 512 // group), 0.25).half()
        groups = Groups(bits, torch.from_numpy(codes.reshape(19, -1)), scales, zeros=torch.ones_like(scales).byte())
        digest.update(panels(groups).data.numpy())
    assert (PANEL_VERSION, digest.hexdigest()) == (1, PANELS_1)


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, level: str) -> None:
    """Within rounding of float32 sums of the exact product of rounded activations, for every count of rows."""
    source = packed(name)
    matrix = panels(source)
    weights = source.decode(torch.float64).numpy()
    x = values(max(COUNTS), 512, seed=1, scale=1.0)
    x[3, 7] = 300.0  # an outlier spoils its own block of its own row only
    x[5] = 0.0
    x[6] *= 1e-20
    exact = rounded(x) @ weights.T
    size = np.abs(rounded(x)) @ np.abs(weights).T + 1e-30
    for count in COUNTS:
        found = multiply(matrix, x[:count], level).numpy()
        assert (np.abs(found - exact[:count]) / size[:count]).max() < 1e-6, count


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_depends_on_nothing_but_itself(name: str) -> None:
    """The same bits alone and among others, on every instruction set and number of threads."""
    matrix = panels(packed(name))
    x = values(max(COUNTS), 512, seed=2, scale=1.0)
    alone = torch.cat([multiply(matrix, x[row : row + 1], "", threads=1) for row in range(len(x))])
    for level in kernel_levels():
        for count in COUNTS:
            assert torch.equal(multiply(matrix, x[:count], level, threads=3), alone[:count]), (level, count)
    for start, stop in ((5, 8), (17, 32), (64, 129)):
        assert torch.equal(multiply(matrix, x[start:stop], "", threads=1), alone[start:stop])


@pytest.mark.parametrize("name", ["INT4_G128_ZEROS", "INT8_G128", "INT4_G32"])
@pytest.mark.parametrize("columns", [128, 384, 640])
def test_a_short_last_block(name: str, columns: int) -> None:
    """Where the last block of a row has 128 columns: close to the exact product, and the same bits everywhere."""
    source = packed(name, 50, columns)
    matrix, x = panels(source), values(150, columns, seed=6, scale=1.0)
    expected = multiply(matrix, x, "baseline")
    exact, weights = rounded(x), source.decode(torch.float64).numpy()
    assert (np.abs(expected.numpy() - exact @ weights.T) / (np.abs(exact) @ np.abs(weights).T)).max() < 1e-6
    for level in kernel_levels():
        for count in (1, 12, 40, 150):
            assert torch.equal(multiply(matrix, x[:count], level), expected[:count]), (level, count)


def integer_weights(name: str, part: str, rng: np.random.Generator) -> Packed:
    """Rows whose values are integers: the first all of the largest bits, the second of the smallest, others at random.

    ``part`` is which float16 scale of a K-quant is 1, while the other one is 0.
    """
    if not name.endswith("K"):
        bits = int(name[3])
        codes = torch.from_numpy(rng.integers(0, 256, (20, 512 * bits // 8), dtype=np.uint8))
        codes[0], codes[1] = 255, 0
        ones = torch.ones((20, 512 // int(name.split("_")[1][1:]))).half()
        zeros = torch.from_numpy(rng.integers(0, 1 << bits, ones.shape, dtype=np.uint8))
        zeros[0], zeros[1] = 0, (1 << bits) - 1
        return Groups(bits, codes, ones, zeros=zeros)
    size = FORMATS_OF_FILES[name].bytes
    data = torch.from_numpy(rng.integers(0, 256, (20, 2, size), dtype=np.uint8))
    data[0], data[1] = 255, 0
    if name in (
        "Q3_K",
        "Q6_K",
    ):  # signed scales: the smallest and the largest, with the smallest and the largest quants
        quants, scales = (
            (data[:, :, :96], data[:, :, 96:108]) if name == "Q3_K" else (data[:, :, :192], data[:, :, 192:208])
        )
        for row, lowest in enumerate((True, True, False, False), 2):
            quants[row] = 0 if row % 2 else 255
            scales[row] = {"Q3_K": (255, 0), "Q6_K": (0x7F, 0x80)}[name][lowest]
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]
    for place, number in zip(at, (1.0, 0.0) if part == "scales" else (0.0, 1.0), strict=False):
        data[:, :, place : place + 2] = torch.tensor([number]).half().view(torch.uint8)
    return Blocks(name, data.view(20, 2 * size))


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("name", [*K_QUANTS, "INT3_G32", "INT4_G256", "INT8_G32", "INT8_G256"])
def test_integers_are_exact(name: str, level: str) -> None:
    """Activations that are integers already, up to the largest: no sum overflows or saturates on the way."""
    rng = np.random.default_rng(7)
    x = rng.integers(-127, 128, (20, 512)).astype(np.float32)
    x[::3] = np.where(rng.random((7, 512)) < 0.5, -127, 127)
    x[0], x[1] = 127, -127
    x[:, ::256] = 127  # every block's scale is 1
    for part in ("scales", "minimums") if name in ("Q2_K", "Q4_K", "Q5_K") else ("scales",):
        source = integer_weights(name, part, rng)
        weights = source.decode(torch.float64).numpy().astype(np.int64)
        # As the kernels do: a float32 number for each block, and the sum of the two.
        first, second = (x[:, k].astype(np.int64) @ weights[:, k].T for k in (slice(256), slice(256, 512)))
        expected = first.astype(np.float32) + second.astype(np.float32)
        for count in (1, 2, 4, 8, 20):
            found = multiply(panels(source), torch.from_numpy(x[:count]), level).numpy()
            assert np.array_equal(found, expected[:count]), (part, count)


def test_close_to_the_product_with_the_weights_as_they_are() -> None:
    """Rounding activations costs less than a hundredth, also where one channel is a hundred times larger."""
    for name in FORMATS:
        source = packed(name, 64)
        x = values(32, 512, seed=3, scale=1.0)
        for scale in (1.0, 100.0):
            x[:, 11] *= scale
            exact = x.double() @ source.decode(torch.float64).T
            found = panels(source).multiply(x).double()
            limit = 0.01 if scale == 1 else 0.3  # of the other channels, whose block the large one shares
            rest = exact - x[:, 11:12].double() * source.decode(torch.float64)[:, 11]
            assert ((found - exact).norm() / (rest if scale > 1 else exact).norm()).item() < limit


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_that_are_not_finite_stay_in_their_row(name: str, level: str) -> None:
    matrix = panels(packed(name))
    for rows in (9, 40):
        x = values(rows, 512, seed=4, scale=1.0)
        expected = multiply(matrix, x, level)
        for bad in (float("nan"), float("inf"), -float("inf")):
            spoilt = x.clone()
            spoilt[4, 300] = bad
            found = multiply(matrix, spoilt, level)
            assert bool(found[4].isnan().all())
            rest = [i for i in range(rows) if i != 4]
            assert torch.equal(found[rest], expected[rest])


def experts(name: str, count: int = 4, width: int = 256, hidden: int = 512) -> list[list[Packed]]:
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    return [[packed(name, *shape, seed=10 * part + e) for e in range(count)] for part, shape in enumerate(shapes)]


def route(picks: torch.Tensor) -> ops.Route:
    weights = torch.rand(picks.shape, generator=torch.Generator().manual_seed(9))
    return ops.Route(torch.zeros(len(picks), 4), picks, weights / weights.sum(-1, keepdim=True))


PICKS = {
    "mixed": torch.tensor([[0, 1], [3, 2], [1, 0], [0, 3], [2, 1], [3, 1], [1, 2]] * 11),
    "one expert for all": torch.tensor([[2, 0]] * 70),
    "one token": torch.tensor([[3, 1]]),
    "one choice": torch.tensor([[3], [0], [3]]),
}


@pytest.mark.parametrize("case", PICKS)
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "INT4_G128_ZEROS"])
def test_experts(name: str, case: str) -> None:
    """Close to the decoded experts; the same bits for a token alone, on every level; every number is written."""
    source = experts(name)
    dense = PackedExperts(*source)
    compiled = PackedExperts(*([panels(one) for one in part] for part in source))
    picks = PICKS[case]
    x = values(len(picks), 256, seed=5, scale=1.0)
    chosen = route(picks)
    found = compiled(x, chosen)
    expected = dense(x, chosen)
    assert ((found - expected).norm() / expected.norm()).item() < 0.03  # three roundings of 0.01
    for t in (0, len(picks) - 1):
        alone = ops.Route(*(part[t : t + 1] for part in chosen))
        assert torch.equal(compiled(x[t : t + 1], alone)[0], found[t])
    for level in kernel_levels():
        out = torch.full_like(x, float("nan"))
        arguments = (x.numpy(), chosen.picks_TA.numpy(), chosen.weights_TA.numpy())
        module().experts(*arguments, compiled.compiled(), out.numpy(), 3, level)
        assert torch.equal(out, found), level


def test_swiglu_is_accurate() -> None:
    """Against float64, over the range in which activations lie: rounded to int8 again, nearly all are the same."""
    width = 256
    identity = torch.eye(width)
    up = Blocks("Q8_0", encode_rows(identity, "Q8_0"))
    layer = PackedExperts(*([panels(up)] for _ in range(3)))
    x = torch.linspace(-40, 40, 256)[None]
    chosen = ops.Route(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    inside = rounded(x)
    one = encode_rows(identity, "Q8_0")
    scale = float(Blocks("Q8_0", one).decode(torch.float64).max())
    hidden = inside * scale
    exact = rounded(torch.from_numpy(hidden / (1 + np.exp(-hidden)) * hidden).float()) * scale
    step = np.abs(exact).max() / 127
    off = np.abs(layer(x, chosen).numpy() - exact) / step
    assert off.max() < 1.01
    assert (off > 1e-3).mean() < 0.02  # those that lay halfway between two integers


def test_what_has_no_kernel_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 256, (16, 64), dtype=np.uint8))
    scales = torch.rand(16, 4)
    mixed = torch.from_numpy(rng.permutation(128).astype(np.int32) // 32)
    assert to_panels(Groups(4, codes, scales)) is None
    assert to_panels(Groups(4, codes, scales.half(), order=mixed)) is None
    assert to_panels(Groups(4, codes, torch.rand(16, 8).half())) is None  # groups of 16
    assert to_panels(Blocks("Q4_1", encode_rows(values(16, 256), "Q4_1"))) is None


@pytest.mark.parametrize("name", [name for name in MIXES if name.endswith(("_k", "_s", "_m", "q4_0", "q8_0"))])
def test_every_matrix_of_a_mix_has_a_kernel(name: str) -> None:
    mix = MIXES[name]
    for form in {mix.base, mix.keys, mix.out, mix.head, *(mix.down(layer, 32) for layer in range(32))}:
        assert to_panels(Blocks(form, encode_rows(values(16, 256), form))) is not None, form


def test_wrong_calls_are_refused() -> None:
    compiled = module()
    matrix = panels(packed("Q4_K"))
    good = np.zeros((2, 512), np.float32)
    for x, out in ((good[:, :256].copy(), np.zeros((2, 50), np.float32)), (good, np.zeros((2, 49), np.float32))):
        with pytest.raises(ValueError, match="must"):
            compiled.project(x, [matrix.matrix], out, 1)
    with pytest.raises(ValueError, match="does not run the kernels 'mmx'"):
        compiled.project(good, [matrix.matrix], np.zeros((2, 50), np.float32), 1, level="mmx")
    with pytest.raises(TypeError):
        compiled.project(good.astype(np.float64), [matrix.matrix], np.zeros((2, 50), np.float32), 1)
    with pytest.raises(ValueError, match="multiple of 256"):
        compiled.panel_bytes(0, 16, 320, 0)
    with pytest.raises(ValueError, match="kind must be"):
        compiled.panel_bytes(9, 16, 256, 0)
    with pytest.raises(ValueError, match="whole groups"):
        compiled.panel_bytes(5, 16, 96, 64)
    with pytest.raises(ValueError, match="data must have"):
        compiled.PackedMatrix(0, 16, 256, 0, np.zeros(9, np.uint8))
    with pytest.raises(ValueError, match="sizes out of range"):
        compiled.DenseMatrix(2, (1 << 31) - 1, (1 << 31) - 1, np.zeros(9, np.uint8))
    layer = PackedExperts(*([panels(one) for one in part] for part in experts("Q4_K")))
    out = np.zeros((1, 256), np.float32)
    arguments = (np.zeros((1, 256), np.float32), np.array([[0, 4]], np.int64), np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="an expert that is not there"):
        compiled.experts(*arguments, layer.compiled(), out, 1)


def test_no_rows() -> None:
    layer = PackedLinear(panels(packed("Q4_K")))
    assert layer(torch.empty((0, 512), dtype=torch.bfloat16)).shape == (0, 50)


def test_torch_gets_its_threads_back() -> None:
    class Layer(torch.nn.Module):
        def forward(self, fail: bool) -> tuple[int, int]:
            if fail:
                raise ValueError("no")
            return torch.get_num_threads(), native.threads()

    layer, before = Layer(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        native.take_threads(layer)
        assert layer(fail=False) == (1, 3)
        with pytest.raises(ValueError, match="no"):
            layer(fail=True)
        assert (torch.get_num_threads(), native.threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)


FORKS = """
import os, sys, torch
from mixtral.quant.encode import encode_rows
from mixtral.quant.packed import Blocks
from mixtral.quant.panels import to_panels

matrix = to_panels(Blocks("Q8_0", encode_rows(torch.randn(512, 512), "Q8_0")))
x = torch.randn(64, 512)
expected = matrix.multiply(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(matrix.multiply(x), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_too() -> None:
    """It has none of the parent's threads, and must neither wait for them nor fail."""
    assert subprocess.run([sys.executable, "-c", FORKS], timeout=60, check=False).returncode == 0


def test_several_callers_at_once() -> None:
    matrix = panels(packed("Q4_K"))
    x = values(33, 512, seed=6, scale=1.0)
    expected = matrix.multiply(x)
    with ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda _: matrix.multiply(x), range(100)))
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [8, 32, 128, 40])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_are_decoded_with_the_same_bits_by_both(
    bits: int, group: int, zeros: bool, scale_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled and in torch, some rows and all, into float32 and bfloat16; scales down to the smallest of float16."""
    rng, rows = np.random.default_rng(bits), 300
    columns = 5 * group
    codes = torch.from_numpy(rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8))
    scales = torch.from_numpy(rng.normal(size=(rows, 5)) * 10.0 ** rng.integers(-7, 4, (rows, 5))).to(scale_dtype)
    some = torch.from_numpy(rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8)) if zeros else None
    source = Groups(bits, codes, scales, zeros=some)
    found = {dtype: source.decode(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    part = torch.empty((9, columns), dtype=torch.bfloat16)
    source.decode_rows(291, part)
    assert torch.equal(part, found[torch.bfloat16][291:])
    monkeypatch.setattr("mixtral.quant.packed.available", lambda: False)
    for dtype, values in found.items():
        assert_same_bits(values, source.decode(dtype))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    width = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(width), expected.view(width))
