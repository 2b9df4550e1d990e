from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize, quantize

from mixtral.errors import CheckpointError, ConfigError
from mixtral.ops.native import available
from mixtral.quant import native
from mixtral.quant.formats import FORMATS
from mixtral.quant.kencode import K_FORMATS, encode_k

Floats = npt.NDArray[np.float32]
ROUNDED = ("Q8_0",)


def edge_rows() -> Floats:
    rows = np.zeros((12, 256))
    rows[1], rows[2] = 3.0, -3.0
    rows[3, 7], rows[4, 200] = 5.0, -5.0
    rows[5], rows[6] = 1e-30, -1e-42
    rows[7], rows[8] = np.linspace(1, 2, 256), -np.linspace(1, 2, 256)
    rows[9] = np.arange(256) % 3 - 1
    rows[10] = np.where(np.arange(256) % 2, 1e-12, 1e6)
    rows[11] = -0.0
    return rows.astype(np.float32)


def hard_values() -> Iterator[tuple[str, Floats]]:
    """Names and rows: usual weights, and what tests the limits of float16, of float32 and of least squares."""
    random = np.random.default_rng(7)
    normal = random.standard_normal((48, 512))
    yield "normal", normal.astype(np.float32)
    yield "one block", normal[:1, :256].astype(np.float32)
    yield "odd blocks", normal[:5, :256].astype(np.float32)
    yield "heavy tails", random.standard_t(1.5, (24, 768)).astype(np.float32)
    yield "sparse", (normal * (random.random(normal.shape) < 0.03)).astype(np.float32)
    yield "shifted", (normal + random.standard_normal((48, 1)) * 10).astype(np.float32)
    yield "near the smallest float16", (normal * 10.0 ** random.uniform(-9, -4, (48, 1))).astype(np.float32)
    yield "all sizes", (normal * 10.0 ** random.integers(-40, 5, normal.shape)).astype(np.float32)
    yield (
        "sub-blocks of all sizes",
        (normal * np.repeat(10.0 ** random.uniform(-22, 2, (48, 32)), 16, axis=1)).astype(np.float32),
    )
    yield "few levels", np.rint(normal).astype(np.float32)
    yield "edges", edge_rows()


HARD = list(hard_values())


def importances(width: int) -> Iterator[Floats | None]:
    random = np.random.default_rng(8)
    yield None
    yield random.chisquare(1, width).astype(np.float32)
    # From the smallest float32 to the largest, half of them zero.
    wide = (10.0 ** random.uniform(-45, 38.5, width)).astype(np.float32)
    yield np.where(random.random(width) < 0.5, wide, np.float32(0))


def test_the_compiled_module_is_there() -> None:
    """Tests run on an installed project, and the installation builds it."""
    assert available()
    assert native.levels()[0] == "baseline"


@pytest.mark.parametrize(("label", "values"), HARD, ids=[label for label, _ in HARD])
@pytest.mark.parametrize("name", K_FORMATS)
def test_every_level_gives_the_bytes_of_the_reference(name: str, label: str, values: Floats) -> None:
    for importance in importances(values.shape[1]):
        expected = encode_k(values, name, importance)
        for level in native.levels():
            found = native.encode(values, name, importance=importance, threads=2, level=level)
            assert np.array_equal(found, expected), f"{label}, level {level}, importance {importance is not None}"


@pytest.mark.parametrize(("label", "values"), HARD, ids=[label for label, _ in HARD])
@pytest.mark.parametrize("name", ROUNDED)
def test_round_to_nearest_gives_the_bytes_of_ggml(name: str, label: str, values: Floats) -> None:
    # Not compared: where 1 / scale is infinite (the oracle multiplies it with zeros), and what float16 cannot hold.
    largest = np.abs(values.reshape(-1, 256)).max(axis=1)
    rows = values.reshape(-1, 256)[(largest == 0) | ((largest > 1e-35) & (largest < 4e5))]
    expected = quantize(rows, gguf.GGMLQuantizationType[name])
    assert np.array_equal(native.encode(rows, name, threads=2), expected)


@pytest.mark.parametrize("name", ROUNDED)
def test_what_float16_cannot_tell_from_zero_is_zero(name: str) -> None:
    values = np.full((1, 32), 1e-42, np.float32)
    assert not dequantize(native.encode(values, name, threads=1), gguf.GGMLQuantizationType[name]).any()


@pytest.mark.parametrize("name", native.ENCODERS)
def test_threads_do_not_change_the_bytes(name: str) -> None:
    """More rows than one portion of work (65,536 values), and a last portion that is not full."""
    values = np.random.default_rng(9).standard_normal((521, 768)).astype(np.float32)
    one = native.encode(values, name, threads=1)
    for threads in (2, 3, 16):
        assert np.array_equal(native.encode(values, name, threads=threads), one)
    row = native.encode(values[520:], name, threads=1)
    assert np.array_equal(row[0], one[520])


def test_other_python_threads_run_meanwhile() -> None:
    values = np.zeros((4096, 4096), np.float32)
    values[:] = np.random.default_rng(10).standard_normal(4096)
    started, ticks, done = threading.Event(), 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        started.set()
        while not done.wait(0.001):
            ticks += 1

    counter = threading.Thread(target=count)
    counter.start()
    started.wait()
    before = ticks
    native.encode(values, "Q2_K", threads=1)
    during = ticks - before
    done.set()
    counter.join()
    assert during > 5


def test_out_is_filled_and_checked() -> None:
    values = np.random.default_rng(11).standard_normal((6, 512)).astype(np.float32)
    blocks = np.zeros((8, 288), np.uint8)
    out = blocks[1:7]
    assert native.encode(values, "Q4_K", threads=1, out=out) is out
    assert np.array_equal(out, encode_k(values, "Q4_K"))
    assert not blocks[0].any()
    assert not blocks[7].any()
    read_only = np.zeros((6, 288), np.uint8)
    read_only.flags.writeable = False
    for wrong in (blocks, blocks[1:7, ::2], blocks[:6].view(np.int8), read_only, np.zeros((6, 576), np.uint8)[:, ::2]):
        with pytest.raises(ConfigError, match=r"uint8 \[6, 288\]"):
            native.encode(values, "Q4_K", threads=1, out=wrong)  # type: ignore[arg-type]


def test_any_memory_layout_is_taken() -> None:
    random = np.random.default_rng(12)
    values = random.standard_normal((4, 512)).astype(np.float32)
    expected = encode_k(values, "Q3_K")
    shifted = np.frombuffer(b"x" + values.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 512)
    for same in (np.asfortranarray(values), shifted, np.repeat(values, 2, axis=1)[:, ::2]):
        assert np.array_equal(native.encode(same, "Q3_K", threads=1), expected)
    assert native.encode(np.empty((0, 512), np.float32), "Q3_K", threads=4).shape == (0, 220)


@pytest.mark.parametrize("name", native.ENCODERS)
def test_the_first_bad_value_is_named_as_by_the_reference(name: str) -> None:
    values = np.random.default_rng(13).standard_normal((300, 768)).astype(np.float32)
    size = FORMATS[name].values
    start = 700 // size * size
    values[50, 700] = values[200, 1] = 1e30
    with pytest.raises(CheckpointError, match=f"row 50, columns {start} to {start + size - 1}: .*float16"):
        native.encode(values, name, threads=3)
    for wrong in (np.nan, np.inf, -np.inf):
        values[120, 5] = values[299, 767] = wrong
        with pytest.raises(CheckpointError, match="row 120, column 5 is not finite"):
            native.encode(values, name, threads=3)
    if name in K_FORMATS:
        with pytest.raises(CheckpointError, match="row 120, column 5 is not finite"):
            encode_k(values, name)


def test_bad_arguments_are_refused() -> None:
    values = np.zeros((2, 256), np.float32)
    with pytest.raises(ConfigError, match="no encoder for 'IQ2_S'"):
        native.encode(values, "IQ2_S", threads=1)
    with pytest.raises(ConfigError, match="threads is 0"):
        native.encode(values, "Q4_K", threads=0)
    with pytest.raises(ConfigError, match="no level 'mmx'; it has baseline"):
        native.encode(values, "Q4_K", threads=1, level="mmx")
    with pytest.raises(ConfigError, match="Q8_0 rounds to nearest"):
        native.encode(values, "Q8_0", threads=1, importance=np.ones(256, np.float32))
    with pytest.raises(CheckpointError, match="packs 32 values"):
        native.encode(values[:, :100], "Q8_0", threads=1)
    with pytest.raises(CheckpointError, match="float16"):
        native.encode(values.astype(np.float16), "Q8_0", threads=1)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="column 3"):
        native.encode(values, "Q4_K", threads=1, importance=np.where(np.arange(256) == 3, -1, 1).astype(np.float32))


@pytest.mark.parametrize(
    ("forced", "used"), [(None, ""), ("avx2", "avx2"), ("avx512bf16", "avx512"), ("amx", "avx512")]
)
def test_encoders_obey_the_variable(monkeypatch: pytest.MonkeyPatch, forced: str | None, used: str) -> None:
    monkeypatch.setattr(native, "forced_level", lambda: forced)
    seen: list[str] = []

    class Fake:
        def encode(self, *arguments: object) -> tuple[int, int, int]:
            seen.append(str(arguments[-1]))
            return 0, 0, 0

        encode_groups = encode

    monkeypatch.setattr(native, "module", Fake)
    values = np.zeros((1, 256), np.float32)
    native.encode(values, "Q4_K", threads=1)
    native.encode_groups(values, 4, 32, threads=1)
    assert seen == [used, used]


def test_a_missing_module_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixtral

    monkeypatch.delattr(mixtral, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "mixtral._native", None)
    assert not available()
    with pytest.raises(ConfigError, match="pip install"):
        native.encode(np.zeros((1, 256), np.float32), "Q4_K", threads=1)
    with pytest.raises(ConfigError, match=r"C\+\+20 compiler"):
        native.levels()
