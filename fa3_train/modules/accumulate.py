"""Weight gradients that are summed in FP32 by the operation that makes them.

An engine that accumulates gradients in FP32 sets `fuse_wgrad_accumulation` on modules that have it.
Their backward then leaves `weight.grad` alone and writes into `weight.main_grad`, FP32 of the
weight's shape: over what is there where `weight.overwrite_main_grad`, else adding to it; then it
calls `weight.main_grad_ready()`. (Names as in Megatron-LM and TransformerEngine, whose modules take
part in the same way.) That saves writing and reading every gradient in 16 bits, and its rounding;
for an embedding, a matrix that is zero but for the rows of this batch's tokens. A module that is
fused may be used once in a forward, and shares its weight with no other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear` without bias whose GEMM can sum the weight's gradient in FP32."""

    fuse_wgrad_accumulation = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _fuses(self):
            out: torch.Tensor = _Product.apply(x, self.weight)
            return out
        return F.linear(x, self.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = weight  # activation checkpointing hands back an alias without attributes
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        parameter = ctx.parameter
        dx = dout @ weight if ctx.needs_input_grad[0] else None
        rows = dout.reshape(-1, dout.shape[-1])
        inputs = x.reshape(-1, x.shape[-1])
        add_product(
            parameter.main_grad, rows.t(), inputs, overwrite=parameter.overwrite_main_grad
        )
        parameter.main_grad_ready()
        return dx, None


class Embedding(nn.Embedding):
    """`nn.Embedding` whose gradient can be summed in FP32, row by row where tokens are."""

    fuse_wgrad_accumulation = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if _fuses(self):
            out: torch.Tensor = _Lookup.apply(tokens, self.weight)
            return out
        return super().forward(tokens)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.parameter = weight
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[None, None]:
        (tokens,) = ctx.saved_tensors
        parameter = ctx.parameter
        if parameter.overwrite_main_grad:
            parameter.main_grad.zero_()
        rows = dout.reshape(-1, dout.shape[-1])
        parameter.main_grad.index_add_(0, tokens.reshape(-1), rows.float())
        parameter.main_grad_ready()
        return None, None


def _fuses(module: Any) -> bool:
    """Whether a module's call takes part: an engine asked for it, and there will be a backward."""
    return bool(
        module.fuse_wgrad_accumulation
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def add_scaled(
    total: torch.Tensor, gradient: torch.Tensor, factor: torch.Tensor, *, overwrite: bool
) -> None:
    """total += factor * gradient, or total = factor * gradient; all FP32, factor 0-dim."""
    if total.is_cuda:
        from fa3_train.modules import _scaled_sum_triton

        _scaled_sum_triton.run(total, gradient, factor, overwrite)
    elif overwrite:
        torch.mul(gradient, factor, out=total)
    else:
        total.addcmul_(gradient, factor)


def add_product(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, overwrite: bool = False
) -> None:
    """total += a @ b, or total = a @ b, in FP32 and without rounding to the inputs' dtype."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0 if overwrite else 1)
    elif not a.is_cuda:
        total.addmm_(a.float(), b.float(), beta=0 if overwrite else 1)
    elif overwrite:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
