"""Memory of training, per rank: exact for what is kept, by formula for what comes and goes.

Of pretraining: float32 values, gradients and moments (two for AdamW, one for Muon), split over the ranks of dp, tp and
ep as ``mixtral.parallel`` does; layers brought together in bfloat16; and what the backward pass needs of every token.
Of fine-tuning: the base in the form that it is held in, and all that belongs to a number that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError
from mixtral.plan.sizes import count_parameters, weight_bytes

__all__ = [
    "TrainingMemory",
    "TuningMemory",
    "activation_bytes_per_token",
    "adapter_parameters",
    "training_memory",
    "tuning_memory",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on one rank, at the fullest moment of a step."""

    values: int  # float32
    gradients: int  # float32, of the step so far
    moments: int
    gathered: int  # bfloat16: embedding and head, two layers; gradients of one layer on their way
    activations: int

    @property
    def kept(self) -> int:
        """What is there between steps too."""
        return self.values + self.moments

    @property
    def total(self) -> int:
        """All of it. Buffers of the allocator, of NCCL and of Muon's products come on top."""
        return self.values + self.gradients + self.moments + self.gathered + self.activations


def training_memory(
    config: MixtralConfig, *, dp: int = 1, tp: int = 1, ep: int = 1, tokens: int = 4096
) -> TrainingMemory:
    """Memory of a rank that trains ``tokens`` tokens at a time; layouts as ``--parallel`` takes them.

    Raises:
        ConfigError: ep does not divide dp, or an axis has no ranks.
    """
    if min(dp, tp, ep) < 1 or dp % ep:
        raise ConfigError(f"dp={dp}, tp={tp}, ep={ep}: expected positive numbers, and ep a divisor of dp")
    counts = count_parameters(config)
    matrices = (counts.attention + counts.experts) / (tp * dp)
    tables = counts.embedding / dp + counts.head / (tp * dp)
    rest = counts.norms / dp + counts.routers  # routers are whole everywhere
    values = matrices + tables + rest
    layers = config.num_hidden_layers
    layer = counts.attention / layers / tp + counts.experts / layers / (tp * ep) + 2 * config.hidden_size
    root = counts.embedding + counts.head / tp + config.hidden_size
    # Of one layer: gradients in bfloat16, and in float32 on their way to the other ranks. The head's are float32.
    gathered = 2 * (root + 2 * layer) + (2 + 4) * layer + 4 * counts.head / tp
    return TrainingMemory(
        values=round(4 * values),
        gradients=round(4 * values),
        moments=round(4 * (values + tables + rest)),
        gathered=round(gathered),
        activations=tokens * activation_bytes_per_token(config, tp=tp, ep=ep),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningMemory:
    """Bytes of one process that fine-tunes with AdamW."""

    base: int
    trained: int  # gradients, two moments, masters or the numbers of an adapter
    activations: int
    loading: int  # for a while, before the first step: exact values of all weights beside those of the run

    @property
    def total(self) -> int:
        """At the fullest moment, of the start or of a step. Buffers of the allocator come on top."""
        return max(self.loading, self.base + self.trained + self.activations)


def tuning_memory(
    config: MixtralConfig, *, trained: int, adapter: bool, precision: str = "bf16", tokens: int = 4096
) -> TuningMemory:
    """Memory of fine-tuning ``trained`` numbers, ``tokens`` tokens at a time, beside a base in ``precision``.

    An adapter has its numbers and their masters, gradients and two moments, all float32: 20 bytes each. Weights that
    are trained themselves have masters, gradients, moments, and the gradient of the backward pass in bfloat16: 18
    bytes, beside the base.

    Raises:
        ConfigError: there is no such precision, or nothing is trained.
    """
    if trained < 1:
        raise ConfigError(f"trained is {trained}; expected at least 1", param="trained")
    base = weight_bytes(config, precision)
    return TuningMemory(
        base=base,
        trained=trained * (20 if adapter else 18),
        activations=tokens * activation_bytes_per_token(config),
        loading=base if adapter else base + 4 * count_parameters(config).total,
    )


def adapter_parameters(config: MixtralConfig, *, rank: int, expert_rank: int) -> int:
    """Numbers of an adapter of q, k, v, o with ``rank`` and of all experts with ``expert_rank``; 0 leaves them out."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = rank * 2 * ((width + heads) + (width + keys))
    experts = config.num_local_experts * expert_rank * ((width + 2 * inner) + (inner + width))
    return config.num_hidden_layers * (attention + experts)


def activation_bytes_per_token(config: MixtralConfig, *, tp: int = 1, ep: int = 1) -> int:
    """What all layers keep of a token for the backward pass, in bfloat16, if experts are evenly used.

    Two normed inputs and one of their products; queries, keys, values and the input of the output projection; the
    router's float32 input; per chosen expert its sorted input, the gate and up products and its output.
    """
    width, choices = config.hidden_size, config.num_experts_per_tok
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    split = 2 * heads + 2 * keys + 2 * choices * config.intermediate_size
    layer = 2 * (3 * width + 2 * choices * width) + 2 * split // tp + 4 * width
    if ep > 1:
        layer += 4 * choices * width  # the outputs that came back, in float32
    return layer * config.num_hidden_layers
