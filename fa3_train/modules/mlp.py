"""SwiGLU feed-forward network (Shazeer, arXiv 2002.05202, equation 6), gate and up in one GEMM."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from fa3_train.modules.accumulate import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); x (..., hidden) -> (..., hidden).

    `gate_up_proj.weight` (2 * ffn, hidden) holds the gate's rows, then those of up, so the input
    is read once.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.ffn_hidden_size = ffn_hidden_size
        self.gate_up_proj = Linear(hidden_size, 2 * ffn_hidden_size)
        self.down_proj = Linear(ffn_hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


def gated(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2 * width) = [gate, up] -> silu(gate) * up, (..., width).

    On CUDA one Triton kernel each way; torch.compile gets the formula, which it fuses itself.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        return _triton().swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@functools.cache
def _triton() -> ModuleType:
    # At first use: Triton exists only with CUDA builds of torch.
    from fa3_train.modules import _swiglu_triton

    return _swiglu_triton
