"""RMS norm and rotary positions for speed: fewer passes over memory than ``reference``, own backward passes.

Compiled code has one pass where these have several; they are for tensors that it does not take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.ops import compiled

__all__ = ["rms_norm", "rope"]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_TD = x_TD.to(torch.float32, copy=True)
        norm_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True)
        scale_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        normed_TD = x32_TD.mul_(scale_T1).to(x_TD.dtype)
        ctx.save_for_backward(normed_TD, scale_T1, weight_D)
        return normed_TD * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed_TD, scale_T1, weight_D = ctx.saved_tensors
        grad_TD = grads[0]
        grad_weight = (grad_TD * normed_TD).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        normed32_TD = normed_TD.float()
        inner_TD = (grad_TD * weight_D).to(torch.float32, copy=True)
        dot_T1 = (inner_TD * normed32_TD).mean(-1, keepdim=True)
        return inner_TD.addcmul_(normed32_TD, dot_T1, value=-1).mul_(scale_T1).to(grad_TD.dtype), grad_weight, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TK, sin_TK)
        return _rotate(x_THK, cos_TK, sin_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TK, sin_TK = ctx.saved_tensors
        return _rotate(grads[0], cos_TK, -sin_TK), None, None


def _rotate(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    first, second = x_THK.float().chunk(2, dim=-1)
    cos, sin = cos_TK[:, None, :], sin_TK[:, None, :]
    out_THK = torch.empty(x_THK.shape, dtype=torch.float32, device=x_THK.device)
    low, high = out_THK.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out_THK.to(x_THK.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Same contract as ``reference.rms_norm``; the squares are summed in another order."""
    if x_TD.dim() == 2 and compiled.is_compiled(x_TD, weight_D):
        return compiled.rms_norm(x_TD, weight_D, eps)
    out: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return out


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Same contract as ``reference.rope``. The angles get no gradient."""
    if compiled.is_compiled(x_THK) and compiled.is_compiled(cos_TK, sin_TK) and cos_TK.dtype == torch.float32:
        return compiled.rope(x_THK, cos_TK, sin_TK)
    out: Tensor = _Rope.apply(x_THK, cos_TK, sin_TK)  # type: ignore[no-untyped-call]
    return out
