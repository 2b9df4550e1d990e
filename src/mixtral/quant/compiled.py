"""The compiled module ``mixtral._native``, or a clear error where it is missing."""

from __future__ import annotations

from types import ModuleType

from mixtral.errors import ConfigError

__all__ = ["module"]


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
