"""Decoder layers, final norm and head on compiled kernels, with the parameters and calls of the plain ones.

The residual stream is float32. What has no kernel, of a format or a context, goes through torch inside the same layer.
T tokens, D width, H query heads, G key-value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.compiled.cache import CompiledView
from mixtral.compiled.views import DenseView, expert_view, matrix_view
from mixtral.model.batch import Context
from mixtral.model.mixtral import DecoderLayer, Linear, Norm
from mixtral.ops.native import level, module, threads
from mixtral.quant.modules import PackedLinear

__all__ = ["CompiledHead", "CompiledLayer", "CompiledNorm"]


class CompiledNorm(Norm):
    """A ``Norm`` that computes in float32 from end to end."""

    def __init__(self, norm: Norm) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self._wide: Tensor | None = None

    def wide(self) -> Tensor:
        """The weight in float32 [D]."""
        if self.weight.dtype == torch.float32:
            return self.weight.detach()
        if self._wide is None:
            self._wide = self.weight.detach().float()
        return self._wide

    def forward(self, x_TD: Tensor) -> Tensor:
        """The normed and scaled input, float32."""
        x_TD = _float32(x_TD)
        out_TD = torch.empty_like(x_TD)
        module().norm(x_TD.numpy(), self.wide().numpy(), self.eps, out_TD.numpy(), level())
        return out_TD


class CompiledHead(Linear):
    """A dense head: float32 scores [T, V]."""

    def __init__(self, head: Linear) -> None:
        nn.Module.__init__(self)
        self.weight = head.weight
        self._kept = DenseView()

    def forward(self, x_TD: Tensor) -> Tensor:
        """As in ``Linear``."""
        return _product(_float32(x_TD), [self], [self._kept], None, None)


class CompiledLayer(nn.Module):
    """As ``DecoderLayer``, in four calls of the compiled module. Hooks on what is inside are not called."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.input_layernorm = CompiledNorm(layer.input_layernorm)
        self.self_attn = layer.self_attn
        self.post_attention_layernorm = CompiledNorm(layer.post_attention_layernorm)
        self.mlp = layer.mlp
        self._kept = [DenseView() for _ in range(5)]

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, ops.Route]:
        """As in ``DecoderLayer``; the stream is float32."""
        x_TD = _float32(x_TD)
        return self._mixture(self._output(self._attend(self._project(x_TD), angles, context), x_TD))

    def _project(self, x_TD: Tensor) -> Tensor:
        """Queries, keys and values side by side: [T, (H + 2G) K]."""
        attention = self.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        return _product(x_TD, parts, self._kept[:3], self.input_layernorm, None)

    def _output(self, attended: Tensor, x_TD: Tensor) -> Tensor:
        """The stream after attention."""
        return _product(attended, [self.self_attn.o_proj], self._kept[3:4], None, x_TD)

    def _attend(self, qkv: Tensor, angles: tuple[Tensor, Tensor], context: Context) -> Tensor:
        attention = self.self_attn
        heads, size = attention.heads, attention.head_dim
        if isinstance(context, CompiledView):
            return context.attend_rows(attention.layer, qkv, angles, heads)
        parts = qkv.view(len(qkv), -1, size).to(self.input_layernorm.weight.dtype)
        groups = (parts.shape[1] - heads) // 2
        q_THK, k_TGK, v_TGK = torch.split(parts, [heads, groups, groups], 1)
        turned = (ops.rope(q_THK, *angles), ops.rope(k_TGK, *angles), v_TGK.contiguous())
        return context.attend(attention.layer, *turned).flatten(-2).float().contiguous()

    def _mixture(self, x_TD: Tensor) -> tuple[Tensor, ops.Route]:
        """The stream after the experts, and the routing."""
        mixture, norm = self.mlp, self.post_attention_layernorm
        experts = expert_view(mixture.experts, self._kept[4])
        router = mixture.gate
        if experts is None:
            normed_TD = norm(x_TD)
            route = ops.route(normed_TD, router.weight, router.per_token)
            mixed_TD = mixture.experts(normed_TD.to(norm.weight.dtype), route)
            return x_TD + mixed_TD, route
        rows, weight_ED = len(x_TD), _float32(router.weight)
        out_TD, logits_TE = torch.empty_like(x_TD), torch.empty((rows, len(weight_ED)))
        picks_TA = torch.empty((rows, router.per_token), dtype=torch.int64)
        weights_TA = torch.empty((rows, router.per_token))
        x = x_TD.numpy()
        module().mixture(
            x,
            weight_ED.numpy(),
            experts,
            out_TD.numpy(),
            logits_TE.numpy(),
            picks_TA.numpy(),
            weights_TA.numpy(),
            threads(),
            norm.wide().numpy(),
            norm.eps,
            x,
            level(),
        )
        return out_TD, ops.Route(logits_TE, picks_TA, weights_TA)


def _float32(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _product(
    x_TD: Tensor, layers: Sequence[nn.Module], kept: list[DenseView], norm: CompiledNorm | None, residual: Tensor | None
) -> Tensor:
    """(Normed) ``x`` times the matrices of all layers, side by side, plus ``residual``: float32 [T, O]."""
    matrices: list[Any] = [matrix_view(layer, view) for layer, view in zip(layers, kept, strict=True)]
    if any(matrix is None for matrix in matrices):
        if norm is not None:
            x_TD = norm(x_TD)
        parts = [layer(x_TD) for layer in layers]
        found = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return found if residual is None else residual + found
    width = residual.shape[1] if residual is not None else sum(_rows(layer) for layer in layers)
    out = torch.empty((len(x_TD), width))
    module().project(
        x_TD.numpy(),
        matrices,
        out.numpy(),
        threads(),
        None if norm is None else norm.wide().numpy(),
        0.0 if norm is None else norm.eps,
        None if residual is None else residual.numpy(),
        level(),
    )
    return out


def _rows(layer: nn.Module) -> int:
    return layer.weight.shape[0] if isinstance(layer, Linear) else cast(PackedLinear, layer).packed.shape[0]
