"""What training does between its matrix products, compiled: one pass over memory each, nothing padded or copied.

T tokens, D width, H query heads, G key-value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.ops import native

__all__ = ["call", "document_attention", "is_compiled", "rms_norm", "rope"]

_DTYPES = (torch.bfloat16, torch.float32)
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses stand for something else


def is_compiled(*tensors: Tensor) -> bool:
    """Whether compiled code takes these tensors: all on the CPU, all bfloat16 or all float32, none split over ranks."""
    dtype = tensors[0].dtype
    plain = all(x.device.type == "cpu" and x.dtype == dtype and type(x) in _PLAIN for x in tensors)
    return plain and dtype in _DTYPES and _present()


@cache
def _present() -> bool:
    """Whether there is a compiled module; looked for once, as this is asked for some ten times per layer."""
    return native.available()


def call(name: str, *values: Any) -> None:
    """Call an operation of the compiled module with this process's threads and instruction set.

    Tensors must be contiguous; what the operation makes, it writes into some of them.
    """
    getattr(native.module(), name)(*(_array(value) for value in values), native.threads(), native.level())


def _array(value: Any) -> Any:
    """Tensors without their history, bfloat16 as its bits.

    Not as arrays of NumPy: torch never resizes memory again that it has shown to NumPy, and FSDP wants to.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.view(torch.uint16) if value.dtype == torch.bfloat16 else value


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD = x_TD.contiguous()
        out_TD, scales_T = torch.empty_like(x_TD), torch.empty(len(x_TD))
        call("train_norm", x_TD, weight_D, eps, out_TD, scales_T)
        ctx.save_for_backward(x_TD, weight_D, scales_T)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_TD, weight_D, scales_T = ctx.saved_tensors
        grad_x_TD, grad_weight_D = torch.empty_like(x_TD), torch.empty(len(weight_D))
        call("train_norm_back", x_TD, weight_D, scales_T, grads[0].contiguous(), grad_x_TD, grad_weight_D)
        return grad_x_TD, grad_weight_D.to(weight_D.dtype) if ctx.needs_input_grad[1] else None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TK, sin_TK)
        return _rotate(x_THK, cos_TK, sin_TK, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grads[0], *ctx.saved_tensors, back=True), None, None


def _rotate(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, *, back: bool) -> Tensor:
    x_THK = x_THK.contiguous()
    out_THK = torch.empty_like(x_THK)
    call("train_rotate", x_THK, cos_TK.contiguous(), sin_TK.contiguous(), out_THK, back)
    return out_THK


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, lengths: list[int]) -> Tensor:
        inputs = [x.contiguous() for x in (q_THK, k_TGK, v_TGK)]
        out_THK, norms_TH = torch.empty_like(inputs[0]), torch.empty(q_THK.shape[:2])
        call("document_attention", *inputs, lengths, out_THK, norms_TH)
        ctx.save_for_backward(*inputs, out_THK, norms_TH)
        ctx.lengths = lengths
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *inputs, out_THK, norms_TH = ctx.saved_tensors
        made = [torch.empty_like(x) for x in inputs]
        call("document_attention_backward", *inputs, ctx.lengths, out_THK, norms_TH, grads[0].contiguous(), *made)
        return made[0], made[1], made[2], None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Same contract as ``reference.rms_norm``, of rows."""
    out: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return out


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Same contract as ``reference.rope``. The angles get no gradient."""
    out: Tensor = _Rope.apply(x_THK, cos_TK, sin_TK)  # type: ignore[no-untyped-call]
    return out


def document_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal grouped-query attention of every token over its document so far: [T, H, K] in the dtype of ``q``.

    The documents, of these lengths, follow each other. Scores and sums are float32. Only for tensors for which
    ``is_compiled`` holds.
    """
    out: Tensor = _DocumentAttention.apply(q_THK, k_TGK, v_TGK, list(lengths))  # type: ignore[no-untyped-call]
    return out
