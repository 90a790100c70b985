"""RMSNorm (Zhang, Sennrich, arXiv 1910.07467, eq. 4): x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

# Narrower rows (QK-norm) are too short for one program each: torch's kernel takes them.
_OWN_KERNEL_DIM = 256


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension.

    x (..., dim) of any floating dtype -> the same shape and dtype. The mean and the product with
    the weight are taken in FP32 and rounded once.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        with_stream: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of x, or of x + residual; `with_stream` returns that sum beside it.

        With both, a pre-norm block is x, branch -> (norm(x + branch), x + branch), and on CUDA one
        kernel each way serves addition, norm and the addition of the two gradients.
        """
        if self._own_kernel(x):
            out, stream = _triton().add_norm(x, residual, self.weight, self.eps)
        else:
            stream = x if residual is None else x + residual
            # Under autocast the weight is FP32 and x 16-bit: one cast of `dim` numbers keeps the
            # fused kernel, which wants equal dtypes.
            out = F.rms_norm(stream, (self.dim,), self.weight.to(stream.dtype), self.eps)
        return (out, stream) if with_stream else out

    def _own_kernel(self, x: torch.Tensor) -> bool:
        # torch.compile gets the formula, which it fuses itself.
        return (
            x.is_cuda
            and _OWN_KERNEL_DIM <= self.dim <= 32_768
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
            and not torch.compiler.is_compiling()
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


@functools.cache
def _triton() -> ModuleType:
    # At first use: Triton exists only with CUDA builds of torch.
    from fa3_train.modules import _rms_norm_triton

    return _rms_norm_triton
