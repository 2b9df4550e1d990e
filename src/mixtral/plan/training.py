"""Memory of training from all weights, per rank: exact for what is kept, by formula for what comes and goes.

Float32 values, gradients and moments (two for AdamW, one for Muon), split over the ranks of dp, tp and ep as
``mixtral.parallel`` does; layers brought together in bfloat16; and what the backward pass needs of every token.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError
from mixtral.plan.sizes import count_parameters

__all__ = ["TrainingMemory", "activation_bytes_per_token", "training_memory"]


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
