"""Low-rank adapters and chosen experts: trained beside a base, merged into it, read from files and written to them."""

from mixtral.adapters.factors import Factors, LoraConfig
from mixtral.adapters.lora import Adapter, attach, attach_factors, expert_bytes

__all__ = ["Adapter", "Factors", "LoraConfig", "attach", "attach_factors", "expert_bytes"]
