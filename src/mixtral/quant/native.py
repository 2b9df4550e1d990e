"""Compiled weight encoders: argument checks around one call of ``mixtral._native``.

The bytes are those of the references: `mixtral.quant.kencode` for Q2_K to Q6_K, `mixtral.quant.groups` for Q4_0, int4
and int3, ggml's round-to-nearest for Q8_0. They depend neither on the number of threads nor on the processor. Without
the compiled module nothing here works; who wants the slow reference then calls it by name.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt

from mixtral.errors import ConfigError
from mixtral.ops.native import forced_level, module
from mixtral.quant.formats import FORMATS
from mixtral.quant.groups import check_rows
from mixtral.quant.kencode import (
    K_FORMATS,
    check_importance,
    check_values,
    even_importance,
    refuse_infinite,
    refuse_too_large,
)

__all__ = ["ENCODERS", "WEIGHTED", "encode", "encode_groups", "levels"]

WEIGHTED = (*K_FORMATS, "Q4_0")
"""The formats whose encoders weigh errors by importance."""
ENCODERS = (*WEIGHTED, "Q8_0")
NOT_FINITE, TOO_LARGE = 1, 2


def levels() -> tuple[str, ...]:
    """Instruction sets that this processor can run, the fastest one last: `encode` uses it, or that of MIXTRAL_ISA.

    Raises:
        ConfigError: the compiled module is missing.
    """
    return tuple(module().levels())


def encode(
    values: npt.NDArray[np.float32],
    name: str,
    *,
    importance: npt.NDArray[np.float32] | None = None,
    threads: int,
    out: npt.NDArray[np.uint8] | None = None,
    level: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Encode rows [rows, N] as blocks of one of `ENCODERS`: uint8 [rows, N / values of a block * its bytes].

    ``importance`` [N] is that of `encode_k`; Q8_0 takes none. The result is written into ``out`` where it is
    given. Other Python threads run meanwhile. ``level`` forces one of `levels`.

    Raises:
        ConfigError: the compiled module is missing, or an unknown format, level, thread count or ``out``.
        CheckpointError: as in `encode_k`; ``out`` then holds nothing of use.
    """
    native = module()
    if name not in ENCODERS:
        raise ConfigError(f"no encoder for {name!r}; there are {', '.join(ENCODERS)}")
    check_values(values, name)
    if importance is not None and name not in WEIGHTED:
        raise ConfigError(f"{name} rounds to nearest: importance would change nothing; leave it out")
    _check(native, importance, values.shape[1], threads, level)
    shape = (values.shape[0], FORMATS[name].size_bytes(values.shape[1:]))
    out = np.empty(shape, np.uint8) if out is None else out
    if out.dtype != np.uint8 or out.shape != shape or not (out.flags.c_contiguous and out.flags.writeable):
        raise ConfigError(f"out must be contiguous, writable uint8 {list(shape)}, got {out.dtype} {list(out.shape)}")
    if importance is not None and name == "Q4_0":
        importance = even_importance(importance.reshape(-1, FORMATS[name].values)).reshape(-1)
    fault = native.encode(name, _plain(values), _plain(importance), out, threads, level or _level())
    _refuse(fault, name, FORMATS[name].values)
    return out


def encode_groups(
    values: npt.NDArray[np.float32],
    bits: int,
    group: int,
    *,
    importance: npt.NDArray[np.float32] | None = None,
    threads: int,
    level: str | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """Encode rows [rows, N] as `mixtral.quant.groups.encode_integers` does, with codes packed as in ``bits.py``.

    Returns uint8 [rows, N / 8 * bits] and float16 bits [rows, N / group]. Threads and ``level`` as in `encode`.

    Raises:
        ConfigError: the compiled module is missing, or unknown bits, groups, level or thread count.
        CheckpointError: as in `encode_integers`.
    """
    native = module()
    check_rows(values, bits, group)
    rows, width = values.shape
    _check(native, importance, width, threads, level)
    codes, scales = np.empty((rows, width // 8 * bits), np.uint8), np.empty((rows, width // group), np.uint16)
    weights = None if importance is None else even_importance(importance.reshape(-1, group)).reshape(-1)
    fault = native.encode_groups(
        _plain(values), bits, group, _plain(weights), codes, scales, threads, level or _level()
    )
    _refuse(fault, f"int{bits}_g{group}", group)
    return codes, scales


def _level() -> str:
    """The level of MIXTRAL_ISA, which names those of the kernels: from AVX-512 on the encoders have one only."""
    forced = forced_level() or ""
    return "avx512" if forced.startswith("avx512") or forced == "amx" else forced


def _check(
    native: ModuleType, importance: npt.NDArray[np.float32] | None, width: int, threads: int, level: str | None
) -> None:
    check_importance(importance, width)
    if threads < 1:
        raise ConfigError(f"threads is {threads}; expected at least 1")
    if level is not None and level not in native.levels():
        raise ConfigError(f"this processor has no level {level!r}; it has {', '.join(native.levels())}")


def _plain(numbers: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32] | None:
    """The same numbers as native code takes them: one after the other, aligned."""
    return None if numbers is None else np.require(numbers, requirements=["C", "A"])


def _refuse(fault: tuple[int, int, int], name: str, count: int) -> None:
    problem, row, column = fault
    if problem == NOT_FINITE:
        refuse_infinite(name, row, column)
    if problem == TOO_LARGE:
        refuse_too_large(name, row, column, count)
