"""RMSNorm (Zhang, Sennrich, arXiv 1910.07467, eq. 4): x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension.

    x (..., dim) of any floating dtype -> the same shape and dtype. The mean and the product with
    the weight are taken in FP32 and rounded once (torch's fused kernel on CUDA).
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Under autocast the weight is FP32 and x 16-bit: one cast of `dim` numbers keeps the
        # fused kernel, which wants equal dtypes.
        return F.rms_norm(x, (self.dim,), self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
