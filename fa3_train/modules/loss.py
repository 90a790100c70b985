"""Output head with cross-entropy that never holds the logits of all tokens.

For T tokens and a vocabulary of V the logits take T * V numbers: 2 GB in bf16 for 8192 tokens of
Llama 3, and FP32 copies of them as much again twice.  Here tokens go through in chunks of C rows.
For each chunk the forward computes the logits, the loss, and at once the gradient

    dlogits = softmax(logits) - onehot(label)          (count * d loss / d logits)

from which it takes its share of dx = dlogits W and dW += dlogits^T x; then the chunk is dropped.
The backward only scales dx and dW by the incoming gradient over count (so that dlogits, in [-1, 1],
cannot underflow in FP16).  Compared with recomputing the logits
in the backward this saves one of four GEMMs, and the head's weight is not needed after the forward
(under ZeRO-3 and FSDP it is gathered once).  When no gradient is wanted, only the loss is computed.

Precision: logits in the compute dtype as a GEMM writes them; soft-max, loss and the sum over chunks
of dW in FP32.
"""

from __future__ import annotations

import torch
from torch import nn

from fa3_train.modules import _cross_entropy
from fa3_train.modules.accumulate import add_product, add_scaled

# One chunk's logits, in elements: 2^30 is 2 GiB in bf16, 8192 tokens of Llama 3. Every chunk after
# the first reads and writes the FP32 dW (8 bytes a weight): on an H100, 8192 tokens take 39.3 ms at
# once, 40.9 in chunks of 2048 and 47.7 in chunks of 1024; the first needs 0.9 GiB more.
_CHUNK_ELEMENTS = 1 << 30
_CHUNK_ELEMENTS_CPU = 1 << 22  # 16 MiB in FP32: stays near the caches


def default_chunk(vocab_size: int, device: torch.device) -> int:
    """Tokens per chunk when nobody chose: a multiple of 128, at least 128."""
    elements = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS
    return max(128, elements // vocab_size // 128 * 128)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, ignore_index, chunk, want_x, want_weight, owner):
        count = (labels != ignore_index).sum()
        # Without a single label the loss is 0 and so are the gradients (0/0 otherwise).
        scale = count.clamp(min=1).to(torch.float32).reciprocal()
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if want_x else None
        grad_weight = (
            torch.empty(weight.shape, dtype=torch.float32, device=x.device) if want_weight else None
        )
        if grad_weight is not None and x.shape[0] == 0:
            grad_weight.zero_()
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, min(start + chunk, x.shape[0]))
            logits = x[rows] @ weight.t()
            if not (want_x or want_weight):
                total += _cross_entropy.loss_sum(logits, labels[rows], ignore_index)
                continue
            part, dlogits = _cross_entropy.loss_sum_and_grad(logits, labels[rows], ignore_index)
            total += part
            if grad_x is not None:
                torch.mm(dlogits, weight, out=grad_x[rows])
            if grad_weight is not None:
                add_product(grad_weight, dlogits.t(), x[rows], overwrite=start == 0)
            del logits, dlogits
        ctx.save_for_backward(grad_x, grad_weight, scale)
        ctx.weight_dtype = weight.dtype
        ctx.owner = owner  # sums its own gradient, see accumulate.py; None: returned to autograd
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_weight, scale = ctx.saved_tensors
        factor = grad_loss * scale
        if grad_x is not None:
            # In FP32: a 0-dim factor would be rounded to the dtype of grad_x first.
            grad_x = (grad_x.float() * factor).to(grad_x.dtype)
        owner = ctx.owner
        if grad_weight is not None and owner is not None:
            add_scaled(owner.main_grad, grad_weight, factor, overwrite=owner.overwrite_main_grad)
            owner.main_grad_ready()
            grad_weight = None
        elif grad_weight is not None:
            # Rounded as it is written: no second FP32 matrix of that size.
            out = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, factor, out=out)
        return grad_x, grad_weight, *(None,) * 6


def chunked_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = 0,
    accumulates: bool = False,
) -> torch.Tensor:
    """Mean cross-entropy of `x @ weight.T` over the labels that are not `ignore_index`.

    x (..., hidden), weight (vocab, hidden), labels (...) int64 -> FP32 scalar; 0 where no label
    counts. With `accumulates` the weight's gradient goes to `weight.main_grad` (accumulate.py).
    `chunk_tokens` 0 chooses a chunk from the vocabulary. Differentiable once, in x and
    weight. A label outside [0, vocab) that is not ignore_index is undefined behaviour, as for an
    index on CUDA.
    """
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of x without its last dimension, {tuple(x.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must be (vocab, {x.shape[-1]}) for x of width {x.shape[-1]}, "
            f"got {tuple(weight.shape)}"
        )
    device_type = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    # The casts stay outside of the Function, so that autograd undoes them.
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    cast_weight = weight.to(dtype)
    chunk = chunk_tokens or default_chunk(weight.shape[0], x.device)
    grads = torch.is_grad_enabled()
    with torch.autocast(device_type, enabled=False):
        return _ChunkedCrossEntropy.apply(
            flat, cast_weight, labels.reshape(-1), ignore_index, chunk,
            grads and flat.requires_grad, grads and cast_weight.requires_grad,
            weight if accumulates else None,
        )


class LMHead(nn.Module):
    """Projection to the vocabulary; with labels, the mean loss in chunks.

    x (..., hidden) -> logits (..., vocab), or with labels (...) an FP32 scalar. The loss is inside
    this module's forward so that engines which partition or gather weights around a module's
    forward (ZeRO-3, FSDP) have the weight at hand. To tie, assign the embedding's Parameter to
    `weight`.
    """

    fuse_wgrad_accumulation = False  # see accumulate.py

    def __init__(self, hidden_size: int, vocab_size: int, *, chunk_tokens: int = 0) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None:
            return nn.functional.linear(x, self.weight)
        return chunked_cross_entropy(
            x, self.weight, labels, chunk_tokens=self.chunk_tokens,
            accumulates=self.fuse_wgrad_accumulation and torch.is_grad_enabled(),
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"
