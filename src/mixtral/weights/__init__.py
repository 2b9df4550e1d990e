"""Files <-> parameters: Hugging Face folders in both name styles, and the compact file of the embedded model."""

from __future__ import annotations

from mixtral.weights.compact import Compact, is_compact, load_compact, save_compact
from mixtral.weights.load import load_model
from mixtral.weights.save import save_model

__all__ = ["Compact", "is_compact", "load_compact", "load_model", "save_compact", "save_model"]
