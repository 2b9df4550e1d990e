"""Compiled weight encoders: argument checks around one call of ``mixtral._native``.

The bytes are those of the references: `mixtral.quant.kencode` for Q2_K to Q6_K, ggml's round-to-nearest for Q4_0 and
Q8_0. They depend neither on the number of threads nor on the processor. Without the compiled module nothing here works;
who wants the slow reference then calls it by name.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt

from mixtral.errors import ConfigError
from mixtral.quant.formats import FORMATS
from mixtral.quant.kencode import (
    K_FORMATS,
    check_importance,
    check_values,
    refuse_infinite,
    refuse_too_large,
)

__all__ = ["ENCODERS", "available", "encode", "levels"]

ENCODERS = (*K_FORMATS, "Q4_0", "Q8_0")
NOT_FINITE, TOO_LARGE = 1, 2


def available() -> bool:
    """Whether the compiled module is there and can be imported."""
    try:
        _module()
    except ConfigError:
        return False
    return True


def levels() -> tuple[str, ...]:
    """Instruction sets that this processor can run, the fastest one last: it is the one that `encode` uses.

    Raises:
        ConfigError: the compiled module is missing.
    """
    return tuple(_module().levels())


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

    ``importance`` [N] is that of `encode_k`; Q4_0 and Q8_0 take none. The result is written into ``out`` where it is
    given. Other Python threads run meanwhile. ``level`` forces one of `levels`.

    Raises:
        ConfigError: the compiled module is missing, or an unknown format, level, thread count or ``out``.
        CheckpointError: as in `encode_k`; ``out`` then holds nothing of use.
    """
    module = _module()
    if name not in ENCODERS:
        raise ConfigError(f"no encoder for {name!r}; there are {', '.join(ENCODERS)}")
    check_values(values, name)
    if importance is not None and name not in K_FORMATS:
        raise ConfigError(f"{name} rounds to nearest: importance would change nothing; leave it out")
    check_importance(importance, values.shape[1])
    if threads < 1:
        raise ConfigError(f"threads is {threads}; expected at least 1")
    if level is not None and level not in module.levels():
        raise ConfigError(f"this processor has no level {level!r}; it has {', '.join(module.levels())}")
    shape = (values.shape[0], FORMATS[name].size_bytes(values.shape[1:]))
    out = np.empty(shape, np.uint8) if out is None else out
    _check_out(out, shape)
    weights = None if importance is None else np.require(importance, requirements=["C", "A"])
    problem, row, column = module.encode(
        name, np.require(values, requirements=["C", "A"]), weights, out, threads, level or ""
    )
    if problem == NOT_FINITE:
        refuse_infinite(name, row, column)
    if problem == TOO_LARGE:
        refuse_too_large(name, row, column, FORMATS[name].values)
    return out


def _check_out(out: npt.NDArray[np.uint8], shape: tuple[int, int]) -> None:
    if out.dtype != np.uint8 or out.shape != shape or not (out.flags.c_contiguous and out.flags.writeable):
        raise ConfigError(f"out must be contiguous, writable uint8 {list(shape)}, got {out.dtype} {list(out.shape)}")


def _module() -> ModuleType:
    """The compiled module; ConfigError that says how to build it where it cannot be imported."""
    try:
        from mixtral import _native
    except ImportError as error:
        raise ConfigError(
            f"the compiled part of mixtral is missing ({error}); with a C++20 compiler, `pip install .` builds it"
        ) from None
    return _native
