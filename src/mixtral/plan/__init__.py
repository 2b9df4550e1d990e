"""What a Mixtral needs: parameters, memory, bytes read per token. Arithmetic on the config; imports no torch."""

from mixtral.plan.sizes import (
    PRECISIONS,
    ParameterCounts,
    Precision,
    TensorCounts,
    count_parameters,
    count_tensors,
    expected_experts,
    kv_bytes,
    kv_bytes_per_token,
    memory_bytes,
    overlap_chance,
    step_cost,
    weight_bytes,
)
from mixtral.plan.training import (
    TrainingMemory,
    TuningMemory,
    activation_bytes_per_token,
    adapter_parameters,
    training_memory,
    tuning_memory,
)

__all__ = [
    "PRECISIONS",
    "ParameterCounts",
    "Precision",
    "TensorCounts",
    "TrainingMemory",
    "TuningMemory",
    "activation_bytes_per_token",
    "adapter_parameters",
    "count_parameters",
    "count_tensors",
    "expected_experts",
    "kv_bytes",
    "kv_bytes_per_token",
    "memory_bytes",
    "overlap_chance",
    "step_cost",
    "training_memory",
    "tuning_memory",
    "weight_bytes",
]
