"""Weight gradients that are summed in FP32 by the GEMM that makes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """A linear map without bias that can sum its weight's gradient in FP32 as the GEMM writes it.

    Off (the default), it is `nn.Linear`. With `fuse_wgrad_accumulation` set by an engine, the
    backward leaves `weight.grad` alone and writes the product into `weight.main_grad`, FP32 of the
    weight's shape: over it where `weight.overwrite_main_grad`, else added; then it calls
    `weight.main_grad_ready()`. (Names as in Megatron-LM and TransformerEngine, whose modules take
    part in the same way.) That saves writing and reading the gradient in 16 bits, and its rounding.
    The module may be used once in a forward.
    """

    fuse_wgrad_accumulation = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fuses = self.fuse_wgrad_accumulation and torch.is_grad_enabled()
        if fuses and not torch.compiler.is_compiling():
            out: torch.Tensor = _Accumulating.apply(x, self.weight)
            return out
        return F.linear(x, self.weight)


class _Accumulating(torch.autograd.Function):
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
