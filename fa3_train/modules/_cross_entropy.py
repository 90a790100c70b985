"""Soft-max cross-entropy of one chunk of logits: loss and gradient.

On CUDA one Triton kernel does it in two passes over the row (running maximum and sum, then the
gradient written over the logits): 3 reads or writes of the chunk instead of the dozen that the
PyTorch formula takes.  On other devices the formula is plain PyTorch.
"""

from __future__ import annotations

import functools

import torch


def loss_sum(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """FP32 sum of -log softmax(logits)[label] over the counted rows; logits (C, V), labels (C,)."""
    if logits.is_cuda:
        return _triton().run(logits, labels, ignore_index, write_grad=False).sum()
    return torch.nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=ignore_index, reduction="sum"
    )


def loss_sum_and_grad(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss as in `loss_sum`, and its gradient, softmax - onehot, in the logits' dtype.

    The logits' memory is reused: they are garbage afterwards. Rows that are ignored get zero
    gradient.
    """
    if logits.is_cuda:
        return _triton().run(logits, labels, ignore_index, write_grad=True).sum(), logits
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    counted = labels != ignore_index
    index = labels.masked_fill(~counted, 0).unsqueeze(-1)
    picked = log_probs.gather(-1, index).squeeze(-1)
    loss = -picked.masked_fill(~counted, 0.0).sum()
    grad = log_probs.exp_()
    grad.scatter_add_(-1, index, torch.full_like(picked, -1.0).unsqueeze(-1))
    grad.masked_fill_(~counted.unsqueeze(-1), 0.0)
    return loss, grad.to(logits.dtype)


@functools.cache
def _triton():
    """The kernel's module, imported at first use: Triton exists only with CUDA builds of torch."""
    from fa3_train.modules import _cross_entropy_triton

    return _cross_entropy_triton
