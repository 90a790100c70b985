"""Where `linear=torch|te|te_fp8` becomes modules.

A layer needs three parts: norm + QKV projection, output projection, norm + MLP.  With torch the
norm is a separate module; TransformerEngine fuses it.  Both are reached through the three builders
here, so that `SelfAttention` does not know which one it holds. `TransformerLayer` does: it takes
the norm out of ours, to let its kernel add the residual as well.
"""

from __future__ import annotations

import torch
from torch import nn

from fa3_train.modules.accumulate import Linear
from fa3_train.modules.mlp import SwiGLU
from fa3_train.modules.norm import RMSNorm

LINEARS = ("torch", "te", "te_fp8")


class NormLinear(nn.Module):
    """RMSNorm, then a linear map without bias: (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(in_features, eps)
        self.linear = Linear(in_features, out_features)

    def forward(self, x: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        """`normed`: x has been through `self.norm`."""
        return self.linear(x if normed else self.norm(x))


class NormMLP(nn.Module):
    """RMSNorm, then SwiGLU: (..., hidden) -> (..., hidden)."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, eps)
        self.mlp = SwiGLU(hidden_size, ffn_hidden_size)

    def forward(self, x: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
        """`normed`: x has been through `self.norm`."""
        return self.mlp(x if normed else self.norm(x))


def check_kind(kind: str) -> None:
    """Refuse an unknown kind of linear: ValueError."""
    if kind not in LINEARS:
        raise ValueError(f"linear must be one of {', '.join(LINEARS)}, got {kind!r}")


def build_norm_linear(kind: str, in_features: int, out_features: int, eps: float) -> nn.Module:
    """RMSNorm + linear of the given kind."""
    check_kind(kind)
    if kind == "torch":
        return NormLinear(in_features, out_features, eps)
    from fa3_train.modules import te

    return te.norm_linear(in_features, out_features, eps)


def build_linear(kind: str, in_features: int, out_features: int) -> nn.Module:
    """Linear map without bias of the given kind."""
    check_kind(kind)
    if kind == "torch":
        return Linear(in_features, out_features)
    from fa3_train.modules import te

    return te.linear(in_features, out_features)


def build_norm_mlp(kind: str, hidden_size: int, ffn_hidden_size: int, eps: float) -> nn.Module:
    """RMSNorm + SwiGLU of the given kind."""
    check_kind(kind)
    if kind == "torch":
        return NormMLP(hidden_size, ffn_hidden_size, eps)
    from fa3_train.modules import te

    return te.norm_mlp(hidden_size, ffn_hidden_size, eps)
