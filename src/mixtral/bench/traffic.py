"""What a piece of work must read and compute at least: bytes of weights and of the cache, operations.

Every matrix that is used is counted once for each step, or once for a whole prompt, in the format of the file; of the
experts those that tokens were sent to; of the embedding the rows of the tokens. Activations are not counted.

L layers, D width, H query heads, G key-value heads, K head size, F expert hidden size, E experts, A per token,
V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mixtral.bench.work import Work
from mixtral.config import MixtralConfig
from mixtral.files.read import DTYPES
from mixtral.plan import expected_experts, kv_bytes_per_token
from mixtral.weights.checkpoint import Checkpoint
from mixtral.weights.integer import CodedEntry
from mixtral.weights.names import EMBEDDING, HEAD, layer_of

__all__ = ["Need", "Weights", "need", "weights_of"]


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the weights of a model as they are stored, by what reads them. ``shared`` is attention, norms and
    routers; ``experts`` has, for each layer, the bytes of all its experts."""

    config: MixtralConfig
    embedding: int
    head: int
    shared: int
    experts: tuple[int, ...]
    formats: tuple[str, ...]  # of the experts, the most frequent first

    @property
    def total(self) -> int:
        """All bytes."""
        return self.embedding + self.head + self.shared + sum(self.experts)

    @property
    def quantised(self) -> bool:
        """Whether any expert matrix is not made of floats."""
        return any(name not in DTYPES for name in self.formats)


@dataclass(frozen=True, slots=True)
class Need:
    """Of one timed unit, which is a step of all sequences, or a whole prompt."""

    tokens: int
    weight_bytes: float
    cache_bytes: float
    operations: float

    @property
    def bytes(self) -> float:
        """Weights and cache together."""
        return self.weight_bytes + self.cache_bytes


def weights_of(found: Checkpoint) -> Weights:
    """The sizes in the headers of a checkpoint."""
    embedding = head = shared = 0
    experts = [0] * found.config.num_hidden_layers
    formats: Counter[str] = Counter()
    for piece in {piece.name: piece for piece in found.plan}.values():
        entry = found.entries[piece.name]
        parts = entry.parts.values() if isinstance(entry, CodedEntry) else [entry]
        size = sum(part.stop - part.start for part in parts)
        if piece.parameter == EMBEDDING:
            embedding += size
        elif piece.parameter == HEAD:
            head += size
        elif piece.expert is None:
            shared += size
        else:
            experts[layer_of(piece.parameter)] += size
            formats[entry.dtype] += size
    names = tuple(name for name, _ in formats.most_common())
    return Weights(found.config, embedding, head, shared, tuple(experts), names)


def need(weights: Weights, work: Work, *, turns: int, experts: Sequence[float] | None = None) -> Need:
    """What one unit of the work needs, on average over that many turns after a warm-up.

    ``experts`` are the distinct experts of each layer that a unit used, as counted; None takes the number that
    independent, uniformly routed tokens use on average. The cache holds two bytes for a number.
    """
    config = weights.config
    unit = work.sequences * (1 if work.steps else work.prompt)
    used = experts or [expected_experts(config, unit)] * config.num_hidden_layers
    rows = unit * weights.embedding / config.vocab_size
    per_layer = zip(used, weights.experts, strict=True)
    expert_bytes = sum(count / config.num_local_experts * size for count, size in per_layer)
    per_token = kv_bytes_per_token(config)
    if work.steps:
        depth = _mean_depth(work, turns)
        # A new token attends to those before it and to itself.
        pairs, cached, logits = work.sequences * (depth + 1), work.sequences * (depth + 1) * per_token, work.sequences
    else:
        pairs, cached, logits = unit * (unit + 1) / 2, unit * per_token, 1
    return Need(
        tokens=unit,
        weight_bytes=weights.shared + weights.head + rows + expert_bytes,
        cache_bytes=cached,
        operations=_operations(config, tokens=unit, pairs=pairs, logits=logits),
    )


def _mean_depth(work: Work, turns: int) -> float:
    """Tokens before the one that is decoded, on average over the timed steps. Context goes on where it was."""
    before = work.prompt + (work.steps - 1) / 2
    return before + (work.steps * (turns + 1) / 2 if work.kind == "context" else 0)


def _operations(config: MixtralConfig, *, tokens: int, pairs: float, logits: int) -> float:
    """A product and its addition count as two. ``pairs`` of a query and a key in each layer; ``logits`` rows of
    scores."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * width * heads + 2 * width * config.num_key_value_heads * config.head_dim
    experts = config.num_experts_per_tok * 3 * width * config.intermediate_size
    per_token = attention + experts + config.num_local_experts * width
    layers = config.num_hidden_layers * (tokens * per_token + 2 * heads * pairs)
    return 2 * (layers + logits * config.vocab_size * width)
