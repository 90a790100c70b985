"""Memory layouts that frameworks accept and the kernels do not.

The kernels read by TMA: the last dimension must be contiguous, addresses and strides multiples of
16 bytes. Most layouts are; the others are copied, as the frameworks' own attentions do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_train import checks

__all__ = ["readable"]


def readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, those on a GPU that TMA cannot read as contiguous copies; differentiable."""
    return tuple(x if _fits(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _fits(x: Tensor) -> bool:
    if not x.is_cuda:
        return True
    if torch.compiler.is_compiling():
        return checks.layout_problem(x) is None
    return checks.layout_problem(x) is None and x.data_ptr() % checks.ALIGNMENT_BYTES == 0
