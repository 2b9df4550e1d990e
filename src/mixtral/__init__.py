"""Mixtral: run, serve, train and understand the Mixtral sparse mixture-of-experts models.

>>> import mixtral
>>> llm = mixtral.load("embedded")  # doctest: +SKIP

Names are resolved on first use, so importing this package loads neither torch nor the server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtral.api import LLM, ChatCompletion, ChatDelta, Completion, Delta, Usage, load
    from mixtral.config import MixtralConfig
    from mixtral.errors import MixtralError
    from mixtral.wire import SamplingParams

__all__ = [
    "LLM",
    "ChatCompletion",
    "ChatDelta",
    "Completion",
    "Delta",
    "MixtralConfig",
    "MixtralError",
    "SamplingParams",
    "Usage",
    "__version__",
    "load",
]

__version__ = "0.1.0"

_HOME = {"MixtralConfig": "mixtral.config", "MixtralError": "mixtral.errors", "SamplingParams": "mixtral.wire"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mixtral' has no attribute {name!r}")
    value: object = vars(importlib.import_module(_HOME.get(name, "mixtral.api")))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
