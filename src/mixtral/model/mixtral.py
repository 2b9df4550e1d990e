"""Mixtral (arXiv 2401.04088): a decoder of pre-norm attention and mixture-of-experts layers over flat tokens.

T tokens of all sequences, D width, H query heads, G key-value heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.config import MixtralConfig
from mixtral.model.batch import Batch, Cache, Context, Output
from mixtral.model.cache import PagedCache
from mixtral.model.moe import MixtureOfExperts

__all__ = ["Attention", "Decoder", "DecoderLayer", "Embedding", "Linear", "Mixtral", "Norm"]


class Linear(nn.Module):
    """A matrix without bias, ``weight`` [O, D]; left uninitialised, because ``initialise`` or a file fills it."""

    def __init__(self, width: int, out: int, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((out, width), device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        """``x @ weight.T``: [T, O]."""
        return ops.linear(x_TD, self.weight)


class Embedding(nn.Module):
    """One row per token id, ``weight`` [V, D]; left uninitialised, as in ``Linear``."""

    def __init__(self, rows: int, width: int, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((rows, width), device=device, dtype=dtype))

    def forward(self, tokens_T: Tensor) -> Tensor:
        """The rows of the ids: [T, D]."""
        return nn.functional.embedding(tokens_T, self.weight)


class Norm(nn.Module):
    """Root-mean-square norm with a scale per channel."""

    def __init__(self, config: MixtralConfig, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        """The normed and scaled input, same shape and dtype."""
        return ops.rms_norm(x_TD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; what a token sees is the context's business."""

    def __init__(
        self, config: MixtralConfig, layer: int, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.heads = layer, config.head_dim, config.num_attention_heads
        width, query = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, query, device=device, dtype=dtype)
        self.k_proj = Linear(width, keys, device=device, dtype=dtype)
        self.v_proj = Linear(width, keys, device=device, dtype=dtype)
        self.o_proj = Linear(query, width, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], context: Context) -> Tensor:
        """[T, D]; ``angles`` are the cosines and sines of the tokens' positions."""
        q_THK = ops.rope(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)), *angles)
        k_TGK = ops.rope(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)), *angles)
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        out_TD: Tensor = self.o_proj(context.attend(self.layer, q_THK, k_TGK, v_TGK).flatten(-2))
        return out_TD


class DecoderLayer(nn.Module):
    """Two residual steps: attention of the normed input, experts of the normed sum."""

    def __init__(
        self, config: MixtralConfig, layer: int, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.input_layernorm = Norm(config, device=device, dtype=dtype)
        self.self_attn = Attention(config, layer, device=device, dtype=dtype)
        self.post_attention_layernorm = Norm(config, device=device, dtype=dtype)
        self.mlp = MixtureOfExperts(config, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, ops.Route]:
        """The residual stream after this layer, [T, D], and the layer's routing."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), angles, context)
        mixed_TD, route = self.mlp(self.post_attention_layernorm(x_TD))
        return x_TD + mixed_TD, route


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: MixtralConfig, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, device=device, dtype=dtype) for layer in range(config.num_hidden_layers)
        )
        self.norm = Norm(config, device=device, dtype=dtype)

    def forward(self, batch: Batch) -> Output:
        """Hidden states after the final norm, and every layer's routing."""
        x_TD = self.embed_tokens(batch.tokens_T)
        angles = ops.rope_angles(batch.positions_T, self.head_dim, self.theta)
        routes = []
        for layer in self.layers:
            x_TD, route = layer(x_TD, angles, batch.context)
            routes.append(route)
        return Output(self.norm(x_TD), tuple(routes))


class Mixtral(nn.Module):
    """The whole model. ``forward`` gives hidden states; ``logits`` turns the rows one wants into scores.

    Parameters are uninitialised memory of ``dtype``, except the routers, which are float32; ``device="meta"`` allocates
    nothing. ``config.max_position_embeddings`` is a promise of the weights; whoever makes batches keeps to it.
    ``new_cache(pages)`` makes the cache that the layers attend to.
    """

    def __init__(
        self, config: MixtralConfig, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, device=device, dtype=dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, device=device, dtype=dtype)
        self.new_cache: Callable[[int], Cache] = self._paged_cache

    def _paged_cache(self, pages: int) -> Cache:
        return PagedCache(self.config, pages=pages, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations, and of all dense weights but the routers."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.norm.weight.device

    def forward(self, batch: Batch) -> Output:
        """Hidden states [T, D] after the final norm, and the routing of every layer."""
        out: Output = self.model(batch)
        return out

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores of the next token for some rows of hidden states: float32 [T, V]."""
        scores_TV: Tensor = self.lm_head(hidden_TD)
        return scores_TV.float()
