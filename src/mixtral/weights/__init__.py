"""Files <-> parameters: every layout in which Mixtral exists, and the compact file of the embedded model."""

from __future__ import annotations

from mixtral.weights.checkpoint import pieces_of
from mixtral.weights.compact import Compact, is_compact, load_compact, save_compact
from mixtral.weights.gguf_model import find_gguf
from mixtral.weights.load import dtype_of, load_model
from mixtral.weights.respelling import respelling_of, write_respelling
from mixtral.weights.save import save_model

__all__ = [
    "Compact",
    "dtype_of",
    "find_gguf",
    "is_compact",
    "load_compact",
    "load_model",
    "pieces_of",
    "respelling_of",
    "save_compact",
    "save_model",
    "write_respelling",
]
