"""Stateless arithmetic on tensors: ``reference`` specifies them, the other files are the same at speed."""

from mixtral.ops.attention import attention
from mixtral.ops.causal import causal_attention
from mixtral.ops.compiled import document_attention, is_compiled
from mixtral.ops.grouped import Stacked, experts
from mixtral.ops.losses import head_cross_entropy
from mixtral.ops.passes import rms_norm, rope
from mixtral.ops.reference import Pair, Route, choose, linear, rope_angles, route
from mixtral.ops.rows import gather_rows

__all__ = [
    "Pair",
    "Route",
    "Stacked",
    "attention",
    "causal_attention",
    "choose",
    "document_attention",
    "experts",
    "gather_rows",
    "head_cross_entropy",
    "is_compiled",
    "linear",
    "rms_norm",
    "rope",
    "rope_angles",
    "route",
]
