"""The compiled module ``mixtral._native``: finding it, its instruction set, and its share of the threads."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import nn

from mixtral.errors import ConfigError

__all__ = ["VARIABLE", "available", "forced_level", "kernel_levels", "level", "module", "take_threads", "threads"]

VARIABLE = "MIXTRAL_ISA"
"""Environment variable that lowers the instruction set of kernels and encoders; one of ``kernel_levels()``."""


def module() -> ModuleType:
    """The compiled module.

    Raises:
        ConfigError: it cannot be imported; the message says how to build it.
    """
    try:
        from mixtral import _native
    except ImportError as error:
        raise ConfigError(
            f"the compiled part of mixtral is missing ({error}); with a C++20 compiler, `pip install .` builds it"
        ) from None
    return _native


def available() -> bool:
    """Whether the compiled module is there and can be imported."""
    try:
        module()
    except ConfigError:
        return False
    return True


@cache
def kernel_levels() -> tuple[str, ...]:
    """Instruction sets whose kernels this processor runs, the fastest one last.

    Raises:
        ConfigError: the compiled module is missing.
    """
    return tuple(module().kernel_levels())


@cache
def level() -> str:
    """The instruction set in use: the fastest one, or that of ``MIXTRAL_ISA``, read once.

    Raises:
        ConfigError: this processor does not run the one that is asked for, or the compiled module is missing.
    """
    return forced_level() or kernel_levels()[-1]


@cache
def forced_level() -> str | None:
    """The instruction set of ``MIXTRAL_ISA``, if it is set.

    Raises:
        ConfigError: as ``level``.
    """
    wanted, known = os.environ.get(VARIABLE, ""), kernel_levels()
    if wanted and wanted not in known:
        raise ConfigError(f"{VARIABLE} is {wanted!r}; this processor runs {', '.join(known)}", param=VARIABLE)
    return wanted or None


# As many threads as torch had, while torch itself has one.
_lent: list[int] = []


def threads() -> int:
    """Threads for the kernels: torch's own number, also while ``take_threads`` has left torch with one."""
    return _lent[-1] if _lent else torch.get_num_threads()


def take_threads(module: nn.Module) -> None:
    """While ``module`` computes, torch has one thread and the kernels have the others.

    Torch's threads spin for milliseconds after each of its parallel operations, and then two pools share the cores:
    with two threads, one token of four 8x7B layers took 76 ms instead of 57.
    """

    def before(*_: object) -> None:
        _lent.append(torch.get_num_threads())
        torch.set_num_threads(1)

    def after(*_: object) -> None:
        torch.set_num_threads(_lent.pop())

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
