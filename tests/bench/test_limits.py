"""The limits of the machine: every instruction set can be measured, and wrong arguments are refused."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from mixtral.bench import limits
from mixtral.bench.limits import Limits, measure
from mixtral.ops.native import level, module

LEVELS = module().kernel_levels()
WITH_BF16 = ("avx512bf16", "amx")


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_is_measured(level: str) -> None:
    native = module()
    memory = np.ones(1 << 22, np.uint8)
    assert 1e8 < native.read_speed(memory, 1, 0.01, level) < 1e13
    for kind in ("int8", "fp32"):
        assert 1e8 < native.peak_speed(kind, 1, 0.01, level) < 1e14
    assert (native.peak_speed("bf16", 1, 0.01, level) is None) == (level not in WITH_BF16)


def test_levels_begin_with_what_every_processor_has() -> None:
    assert LEVELS[0] == "baseline"
    assert [name for name in ("baseline", "avx2", "avx512vnni", *WITH_BF16) if name in LEVELS] == LEVELS


@pytest.mark.skipif("avx2" not in LEVELS, reason="this processor has no AVX2")
def test_wider_registers_are_faster() -> None:
    """A compiler that leaves the products out, or does them once for all chains, makes no difference between them."""
    native = module()
    narrow, wide = (max(native.peak_speed("fp32", 1, 0.05, level) for _ in range(3)) for level in ("baseline", "avx2"))
    assert wide > 1.3 * narrow


def test_operations_take_the_time_that_is_said() -> None:
    """As many operations as a processor of 10 GHz could not do."""
    bytes_at_once = 1024 if "amx" in LEVELS else 4 * 64
    for kind, most in (("int8", bytes_at_once * 2 * 10e9), ("fp32", 2 * 16 * 2 * 10e9)):
        assert module().peak_speed(kind, 1, 0.02) < most
    started = time.perf_counter()
    module().peak_speed("int8", 1, 0.2)
    assert 0.2 <= time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda native: native.read_speed(np.ones(300, np.uint8), 1, 0.0), "multiple of 256"),
        (lambda native: native.read_speed(np.ones(0, np.uint8), 1, 0.0), "multiple of 256"),
        (lambda native: native.read_speed(np.ones(256, np.uint8), 0, 0.0), "threads must be 1 to 1024"),
        (lambda native: native.read_speed(np.ones(256, np.uint8), 1, float("nan")), "seconds must be 0 to 60"),
        (lambda native: native.peak_speed("int8", 1, -1.0), "seconds must be 0 to 60"),
        (lambda native: native.peak_speed("int4", 1, 0.0), "kind must be int8, fp32 or bf16"),
        (lambda native: native.peak_speed("int8", 1, 0.0, "avx10"), "does not run the kernels 'avx10'"),
    ],
)
def test_wrong_arguments_are_refused(call: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(module())  # type: ignore[operator]


def test_one_measurement_has_all_limits() -> None:
    found = measure(2, seconds=0.01, memory_bytes=1 << 22)
    assert (found.threads, found.level) == (2, level() or LEVELS[-1])
    assert min(found.read, found.int8, found.fp32) > 1e8
    assert (found.bf16 is None) == (found.level not in WITH_BF16)
    assert found.to_json().keys() == {"threads", "level", "read", "int8", "fp32", "bf16"}


def test_the_products_are_those_of_the_weights() -> None:
    with_bf16, without = Limits(1, "a", 1.0, 8.0, 2.0, 4.0), Limits(1, "a", 1.0, 8.0, 2.0, None)
    assert with_bf16.products(quantised=True) == without.products(quantised=True) == ("int8", 8.0)
    assert with_bf16.products(quantised=False) == ("bf16", 4.0)
    assert without.products(quantised=False) == ("fp32", 2.0)


def test_the_best_of_two_is_the_larger_of_each_number() -> None:
    first, second = Limits(2, "a", 5.0, 1.0, 7.0, 3.0), Limits(2, "a", 4.0, 9.0, 8.0, 2.0)
    assert first.best(second) == Limits(2, "a", 5.0, 9.0, 8.0, 3.0)
    assert Limits(2, "a", 1.0, 1.0, 1.0, None).best(Limits(2, "a", 2.0, 1.0, 1.0, None)).bf16 is None


@pytest.mark.parametrize(
    ("text", "size"), [("32768K\n", 32 << 20), ("512M", 512 << 20), ("4096", 4096), ("", 0), ("?K", 0)]
)
def test_the_size_of_the_cache_is_read(text: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "size").write_text(text)
    monkeypatch.setattr(limits, "_L3", tmp_path / "size")
    assert limits._l3_bytes() == size
    monkeypatch.setattr(limits, "_L3", tmp_path / "none")
    assert limits._l3_bytes() == 0
