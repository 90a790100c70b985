"""RoPE, random-sign Hadamard and block quantization as a module, for use outside of the attention.

The signs are random but not to be relearned: they are drawn from a seed once and kept in a
persistent buffer, so a resumed run rotates by the same matrix. Queries and keys that meet in a dot
product must share them (one module for both), or Q K^T is not what it was.
"""

from __future__ import annotations

import torch
from torch import nn

from fa3_train.ops.preprocess import rope_hadamard_quantize
from fa3_train.reference_fp8 import HEAD_DIMS, random_signs


class RopeHadamardQuantize(nn.Module):
    """x (B, S, H, D) or packed (T, H, D) -> e4m3 codes and block descales, or a 16-bit tensor.

    Args:
        head_dim: 64, 96, 128, 192 or 256.
        hadamard: multiply by diag(signs) H / sqrt(D). quantize: to e4m3 with one scale per
            ``block_size`` tokens and head. Both off: only the rotation of :meth:`forward`.
        dequantize: return the 16-bit value of the codes; the gradient passes straight through.
            Without it, codes and descales carry no gradient.
        seed: of the signs.
    """

    signs: torch.Tensor | None

    def __init__(
        self,
        head_dim: int,
        *,
        interleaved: bool = False,
        hadamard: bool = True,
        quantize: bool = True,
        dequantize: bool = False,
        block_size: int = 128,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if head_dim not in HEAD_DIMS and (hadamard or quantize):
            raise ValueError(f"head_dim: must be one of {HEAD_DIMS}, got {head_dim}")
        if dequantize and not quantize:
            raise ValueError(f"dequantize: needs quantize=True, got {quantize}")
        self.head_dim = head_dim
        self.interleaved = interleaved
        self.hadamard = hadamard
        self.quantize = quantize
        self.dequantize = dequantize
        self.block_size = block_size
        self.seed = seed
        self.backend = backend
        self.register_buffer("signs", torch.empty(head_dim) if hadamard else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the signs again from the seed."""
        if self.signs is not None and not self.signs.is_meta:
            self.signs.copy_(random_signs(self.head_dim, self.seed))

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Arguments and results as in :func:`fa3_train.rope_hadamard_quantize`."""
        if not (self.hadamard or self.quantize) and cos is None:
            return x
        return rope_hadamard_quantize(
            x, cos, sin, self.signs, interleaved=self.interleaved, position_ids=position_ids,
            cu_seqlens=cu_seqlens, block_size=self.block_size, quantize=self.quantize,
            dequantize=self.dequantize, hadamard=self.hadamard, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, interleaved={self.interleaved}, hadamard={self.hadamard}, "
            f"quantize={self.quantize}, dequantize={self.dequantize}, "
            f"block_size={self.block_size}, seed={self.seed}"
        )
