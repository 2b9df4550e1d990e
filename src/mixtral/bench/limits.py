"""What this machine can do at best, measured by compiled micro-kernels: reading memory, and products from registers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mixtral.ops.memory import empty
from mixtral.ops.native import level, module

__all__ = ["Limits", "measure"]

_LEAST_BYTES = 1 << 30
_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and operations per second with ``threads`` threads, and the instruction set whose products were timed."""

    threads: int
    level: str
    read: float
    int8: float
    fp32: float
    bf16: float | None  # None where the processor has no products of bfloat16

    def products(self, *, quantised: bool) -> tuple[str, float]:
        """Those that a model's weights ask for, int8, bf16 or fp32, and how many operations per second."""
        if quantised:
            return "int8", self.int8
        return ("bf16", self.bf16) if self.bf16 else ("fp32", self.fp32)

    def best(self, other: Limits) -> Limits:
        """The larger of each number of two measurements."""
        bf16 = max(self.bf16, other.bf16) if self.bf16 and other.bf16 else self.bf16
        return Limits(
            self.threads,
            self.level,
            max(self.read, other.read),
            max(self.int8, other.int8),
            max(self.fp32, other.fp32),
            bf16,
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers per second, as measured."""
        return asdict(self)


def measure(threads: int, *, seconds: float = 0.5, memory_bytes: int | None = None) -> Limits:
    """Measure for about ``seconds`` each of memory and products; the fastest run of each counts.

    Memory is read from a buffer of ``memory_bytes``; default: 1 GiB or four times the L3 cache, what is larger.

    Raises:
        ConfigError: the compiled module is missing.
    """
    native, told = module(), level()
    size = memory_bytes or max(_LEAST_BYTES, 4 * _l3_bytes())
    buffer = empty((size // 4096 * 4096,), torch.uint8).numpy()  # in large pages, as weights are
    buffer[::4096] = 1  # a page that was never written to is not read from memory
    return Limits(
        threads,
        told,
        native.read_speed(buffer, threads, seconds, told),
        native.peak_speed("int8", threads, seconds / 3, told),
        native.peak_speed("fp32", threads, seconds / 3, told),
        native.peak_speed("bf16", threads, seconds / 3, told),
    )


def _l3_bytes() -> int:
    """The size of the last cache as Linux gives it, "32768K"; 0 where it does not."""
    try:
        text = _L3.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    digits = text.rstrip("KM")
    return int(digits) * factor if digits.isdigit() else 0
