"""SwiGLU feed-forward network (Shazeer, arXiv 2002.05202, equation 6), gate and up in one GEMM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); x (..., hidden) -> (..., hidden).

    `gate_up_proj.weight` (2 * ffn, hidden) holds the gate's rows, then those of up, so the input
    is read once.
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.ffn_hidden_size = ffn_hidden_size
        self.gate_up_proj = nn.Linear(hidden_size, 2 * ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).split(self.ffn_hidden_size, dim=-1)
        return self.down_proj(F.silu(gate) * up)
