"""Low-rank adapters and chosen experts: trained beside a base, merged into it, read from files and written to them."""

from mixtral.adapters.factors import Factors, LoraConfig
from mixtral.adapters.lora import Adapter, attach, attach_factors, expert_bytes
from mixtral.adapters.select import Selection, attach_experts, choose, random_like, score_documents, score_experts

__all__ = [
    "Adapter",
    "Factors",
    "LoraConfig",
    "Selection",
    "attach",
    "attach_experts",
    "attach_factors",
    "choose",
    "expert_bytes",
    "random_like",
    "score_documents",
    "score_experts",
]
