"""Ulysses: heads for tokens and back, one all-to-all each, around any attention core.

Each of P ranks holds T/P tokens of every head; attention needs all tokens of some heads. With head
counts that divide by P an all-to-all turns the one into the other (DeepSpeed Ulysses, arXiv
2309.14509). Here q, k and v travel in one exchange: they are written side by side into its send
buffer, the only copy that is made, and the received buffer is the packed row in order, of which
q, k and v are strided views. :mod:`fa3_train.integrations.deepspeed` has DeepSpeed's own.

    q, k, v = to_heads(q, k, v, group)        # (T/P, H, D) -> (T, H/P, D)
    out     = core(q, k, v)
    out     = to_tokens(out, group)           # (T, H/P, D) -> (T/P, H, D)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fa3_train.checks import require
from fa3_train.integrations.policy import Policy

__all__ = ["supports", "to_heads", "to_tokens"]

_policy = Policy("ulysses")


def supports(*, heads_q: int, heads_k: int, ranks: int) -> str | None:
    """Reason why these heads cannot be exchanged over ``ranks`` processes, or None."""
    for name, heads in (("q", heads_q), ("k", heads_k)):
        if heads % ranks:
            return f"{name}: {heads} heads do not divide over {ranks} ranks"
    return None


def _spread(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """(T/P, h_i, D_i) each -> (T, h_i / P, D_i), views of one received buffer."""
    ranks = dist.get_world_size(group)
    tokens = tensors[0].shape[0]
    pieces = [x.reshape(tokens, ranks, -1).transpose(0, 1) for x in tensors]
    send = torch.cat(pieces, dim=2)  # (P, T/P, width)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    row = received.view(ranks * tokens, -1)
    parts = row.split([piece.shape[2] for piece in pieces], dim=1)
    return [p.unflatten(1, (-1, x.shape[2])) for p, x in zip(parts, tensors, strict=True)]


def _collect(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """(T, h_i / P, D_i) each -> (T/P, h_i, D_i)."""
    ranks = dist.get_world_size(group)
    total = tensors[0].shape[0]
    flat = [x.reshape(total, -1) for x in tensors]
    send = (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    blocks = received.view(ranks, total // ranks, -1).transpose(0, 1)  # (T/P, P, width)
    parts = blocks.split([x.shape[1] for x in flat], dim=2)
    return [
        part.reshape(total // ranks, -1, x.shape[2]) for part, x in zip(parts, tensors, strict=True)
    ]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(_spread(list(tensors), group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, *_collect(list(grads), ctx.group)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, out):
        ctx.group = group
        return _collect([out], group)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *_spread([grad], ctx.group)


def to_heads(q: Tensor, k: Tensor, v: Tensor, group: Any = None) -> tuple[Tensor, ...]:
    """This rank's run of T/P tokens with all heads -> all T tokens with H/P heads; differentiable.

    Args:
        q: (T/P, H, D). k: (T/P, Hkv, D). v: (T/P, Hkv, Dv). Rank r holds tokens r T/P onwards.
        group: process group; default the world.

    Raises:
        ArgumentError: head counts that do not divide by the ranks.
    """
    group = dist.group.WORLD if group is None else group
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == 3, name, "must have 3 dimensions (T/P, H, D)", tuple(x.shape))
    ranks = dist.get_world_size(group)
    reason = supports(heads_q=q.shape[1], heads_k=k.shape[1], ranks=ranks)
    if reason is not None:
        _policy.refuse(reason)
    return _ToHeads.apply(group, q, k, v)


def to_tokens(out: Tensor, group: Any = None) -> Tensor:
    """The way back for the result: (T, H/P, Dv) -> (T/P, H, Dv); differentiable."""
    return _ToTokens.apply(dist.group.WORLD if group is None else group, out)
