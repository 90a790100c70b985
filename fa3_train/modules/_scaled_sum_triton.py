"""Triton kernel of `accumulate.add_scaled`: each number read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _scaled_sum_kernel(
    total_ptr, gradient_ptr, factor_ptr, numel, OVERWRITE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(gradient_ptr + at, mask=inside) * tl.load(factor_ptr)
    if not OVERWRITE:
        value += tl.load(total_ptr + at, mask=inside)
    tl.store(total_ptr + at, value, mask=inside)


def run(
    total: torch.Tensor, gradient: torch.Tensor, factor: torch.Tensor, overwrite: bool
) -> None:
    """Contiguous FP32 tensors of one shape; factor 0-dim FP32 on the device."""
    numel = total.numel()
    _scaled_sum_kernel[(triton.cdiv(numel, _BLOCK),)](
        total, gradient, factor, numel, OVERWRITE=overwrite, BLOCK=_BLOCK, num_warps=_WARPS
    )
