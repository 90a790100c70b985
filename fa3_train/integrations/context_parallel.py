"""Context parallelism: one long sequence over several ranks, without dividing heads.

Each rank holds a share of the tokens. Under a causal mask equal runs of tokens are unequal work, so
the sequence is cut into 2P chunks and rank r takes chunks r and 2P - 1 - r (*zig-zag*): every rank
then has the same number of score blocks.

    shard  = zigzag_shard(x, rank, ranks, dim=1)       # before the model
    out    = ring_attention(q, k, v, group)            # (B, S/P, H, D) each
    whole  = zigzag_unshard(shards, dim=1)             # for checks

Two ways to reach the other ranks' keys:

``ring_attention``
    P steps; k and v travel around the ring while the block before is being computed, partial
    results combine by their log-sum-exp; see :mod:`fa3_train.integrations.ring`. Memory per rank:
    two blocks of k and v, in the backward also of their FP32 gradients. Without a sliding window.

``gather_attention``
    k and v are gathered once (with GQA they are small), each of the rank's two chunks is one
    packed call over the documents that reach into it, and the FP32 gradients are reduce-scattered.
    Exact with packed documents of any length: a chunk's part of a document and that document's
    keys up to the chunk's end share their last token, which is what bottom-right masks align on.
    Serves sliding windows.

Both work on every backend that gives (out, lse) and accumulates gradients: ``hopper`` and
``reference``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fa3_train.checks import require
from fa3_train.integrations.policy import Policy
from fa3_train.integrations.ring import Documents, merge, ring, to_device
from fa3_train.ops import attention

__all__ = [
    "gather_attention",
    "merge",
    "ring_attention",
    "supports",
    "zigzag_positions",
    "zigzag_shard",
    "zigzag_unshard",
]

_policy = Policy("context_parallel")


def supports(
    *, seqlen: int, ranks: int, causal: bool = True, window_size: tuple[int, int] = (-1, -1),
    method: str = "ring", packed: bool = False,
) -> str | None:  # fmt: skip
    """Reason why a sequence of ``seqlen`` tokens over ``ranks`` is not served, or None."""
    if method not in ("ring", "gather"):
        return f"method: must be 'ring' or 'gather', got {method!r}"
    if seqlen % (2 * ranks):
        return f"seqlen: must divide by 2 x {ranks} ranks, got {seqlen}"
    if packed and not causal:
        return "causal: packed documents over several ranks need a causal mask"
    if method == "ring" and window_size != (-1, -1):
        return f"window_size: needs method='gather', got {window_size}"
    if method == "gather" and not causal:
        return "causal: method='gather' is for causal masks, use 'ring'"
    return None


def _require_supported(**arguments: Any) -> None:
    reason = supports(**arguments)
    if reason is not None:
        _policy.refuse(reason)


# --- who has which tokens -------------------------------------------------------------------------


def _chunks(rank: int, ranks: int) -> tuple[int, int]:
    return rank, 2 * ranks - 1 - rank


def zigzag_positions(seqlen: int, rank: int, ranks: int, device: Any = None) -> Tensor:
    """Positions (seqlen / ranks) in the whole sequence of the tokens that ``rank`` holds."""
    _require_supported(seqlen=seqlen, ranks=ranks)
    n = seqlen // (2 * ranks)
    steps = torch.arange(n, device=device)
    return torch.cat([steps + c * n for c in _chunks(rank, ranks)])


def zigzag_shard(x: Tensor, rank: int, ranks: int, dim: int = 1) -> Tensor:
    """The share of ``rank``: chunks rank and 2 ranks - 1 - rank of ``x`` along ``dim``."""
    _require_supported(seqlen=x.shape[dim], ranks=ranks)
    pieces = x.chunk(2 * ranks, dim)
    return torch.cat([pieces[c] for c in _chunks(rank, ranks)], dim)


def zigzag_unshard(shards: list[Tensor], dim: int = 1) -> Tensor:
    """The whole sequence from every rank's share, in rank order."""
    ranks = len(shards)
    pieces: list[Tensor | None] = [None] * (2 * ranks)
    for rank, shard in enumerate(shards):
        for c, piece in zip(_chunks(rank, ranks), shard.chunk(2, dim), strict=True):
            pieces[c] = piece
    return torch.cat(pieces, dim)  # type: ignore[arg-type]


# --- keys travel around a ring -------------------------------------------------------------------


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Any = None,
    *,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention over the tokens of all ranks of ``group``; differentiable.

    Args:
        q: (B, S/P, H, D), k and v (B, S/P, Hkv, D): this rank's zig-zag share. With ``cu_seqlens``
            (T/P, H, D) and (T/P, Hkv, D), the share of one row of packed documents.
        group: process group; default the world.
        cu_seqlens: (N + 1) boundaries of the documents in the *whole* row; see
            :func:`gather_attention`.

    Returns:
        The shape of q with the head dim of v: up to rounding the share of attention over the whole
        sequence or row.

    Raises:
        ArgumentError: an odd share, or what :func:`fa3_train.flash_attn_func` refuses.
    """
    group = dist.group.WORLD if group is None else group
    ranks = dist.get_world_size(group)
    packed = cu_seqlens is not None
    dims = 3 if packed else 4
    require(q.dim() == dims, "q", f"must have {dims} dimensions", tuple(q.shape))
    tokens = q.shape[dims - 3]
    _require_supported(seqlen=tokens * ranks, ranks=ranks, causal=causal, packed=packed)
    for name, x in (("k", k), ("v", v)):
        same = x.dim() == dims and x.shape[: dims - 2] == q.shape[: dims - 2]
        require(same, name, f"must have as many tokens as q {tuple(q.shape)}", tuple(x.shape))
    documents = () if cu_seqlens is None else _boundaries(cu_seqlens, tokens * ranks)
    if len(documents) == 2:
        documents = ()  # one document: dense kernels need no plan of lengths
    rows = [x.unsqueeze(0) if packed else x for x in (q, k, v)]
    out = ring(*rows, documents, group, softmax_scale, causal, deterministic, backend)
    return out.squeeze(0) if packed else out


# --- all keys at once, for packed documents -------------------------------------------------------


def _chunk_documents(
    cu: Sequence[int], start: int, end: int
) -> tuple[list[int], list[int], int, int]:
    """Documents that reach into tokens start..end of the whole row.

    Returns:
        cu_seqlens of their queries inside the chunk, cu_seqlens of their keys up to the chunk's
        end, and the range of tokens that holds those keys.
    """
    spans = [(a, b) for a, b in zip(cu, cu[1:], strict=False) if a < end and b > start]
    first = spans[0][0] if spans else start
    cu_q, cu_k = [0], [0]
    for a, b in spans:
        cu_q.append(cu_q[-1] + min(b, end) - max(a, start))
        cu_k.append(cu_k[-1] + min(b, end) - a)
    return cu_q, cu_k, first, first + cu_k[-1]


@functools.lru_cache(maxsize=64)
def _gather_calls(
    documents: Documents, rank: int, ranks: int, device: torch.device
) -> list[tuple[dict[str, Any], int, int]]:
    """For each of the rank's chunks: lengths of its packed call, and the range of its keys."""
    n = documents[-1] // (2 * ranks)
    calls = []
    for c in _chunks(rank, ranks):
        cu_q, cu_k, first, end = _chunk_documents(documents, c * n, (c + 1) * n)
        lengths: dict[str, Any] = {}
        for name, cu in (("q", cu_q), ("k", cu_k)):
            lengths[f"cu_seqlens_{name}"] = to_device(cu, device)
            longest = max((b - a for a, b in zip(cu, cu[1:], strict=False)), default=0)
            lengths[f"max_seqlen_{name}"] = longest
        calls.append((lengths, first, end))
    return calls


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, group, scale, window, deterministic, backend):
        calls = _gather_calls(documents, dist.get_rank(group), dist.get_world_size(group), q.device)
        k_all, v_all = (_gather(x, group) for x in (k, v))
        outs, lses = [], []
        for q_chunk, (lengths, a, b) in zip(q.chunk(2, 0), calls, strict=True):
            out, lse = attention.attn_fwd(
                q_chunk, k_all[a:b], v_all[a:b], scale, True, **lengths, window_size=window,
                backend=backend,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        ctx.save_for_backward(q, k, v, *outs, *lses)
        ctx.settings = calls, group, scale, window, deterministic, backend
        return torch.cat(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, *saved = ctx.saved_tensors
        calls, group, scale, window, deterministic, backend = ctx.settings
        k_all, v_all = (_gather(x, group) for x in (k, v))
        dq = torch.zeros_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (k_all, v_all)]
        for i, (lengths, a, b) in enumerate(calls):
            out, lse = saved[i], saved[2 + i]
            attention.attn_bwd_accumulate(
                dout.chunk(2, 0)[i].contiguous(), q.chunk(2, 0)[i], k_all[a:b], v_all[a:b], out,
                lse, dq.chunk(2, 0)[i], sums[0][a:b], sums[1][a:b], scale, True, **lengths,
                window_size=window, deterministic=deterministic, backend=backend,
            )  # fmt: skip
        dk, dv = (_reduce_scatter(x, group) for x in sums)
        return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *(None,) * 6)


def _boundaries(cu_seqlens: Sequence[int] | Tensor, total: int) -> Documents:
    """``cu_seqlens`` as numbers on the host, after judging them."""
    if isinstance(cu_seqlens, Tensor):
        require(
            cu_seqlens.device.type == "cpu", "cu_seqlens", "must be on the CPU", cu_seqlens.device
        )
        cu_seqlens = cu_seqlens.tolist()
    documents = tuple(cu_seqlens)
    rises = all(a <= b for a, b in zip(documents, documents[1:], strict=False))
    require(
        len(documents) > 1 and documents[0] == 0 and documents[-1] == total and rises,
        "cu_seqlens", f"must rise from 0 to the {total} tokens of all ranks", documents,
    )  # fmt: skip
    return documents


def _gather(x: Tensor, group: Any) -> Tensor:
    """Every rank's zig-zag share (T/P, ...) as the whole row (T, ...)."""
    shards = [torch.empty_like(x, memory_format=torch.contiguous_format)
              for _ in range(dist.get_world_size(group))]  # fmt: skip
    dist.all_gather(shards, x.contiguous(), group=group)
    return zigzag_unshard(shards, 0)


def _reduce_scatter(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks of (T, ...), this rank's zig-zag share of it. FP32."""
    ranks = dist.get_world_size(group)
    shares = [zigzag_shard(x, r, ranks, 0).contiguous() for r in range(ranks)]
    mine = torch.empty_like(shares[0])
    if dist.get_backend(group) == "gloo":  # it has no reduce_scatter
        dist.all_reduce(x, group=group)
        return zigzag_shard(x, dist.get_rank(group), ranks, 0)
    dist.reduce_scatter(mine, shares, group=group)
    return mine


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Causal attention over packed documents whose tokens lie on several ranks; differentiable.

    Args:
        q: (T/P, H, D), k and v (T/P, Hkv, D): this rank's zig-zag share of a row of T tokens.
        cu_seqlens: (N + 1) boundaries of the documents in the *whole* row, the same on every rank;
            a list or a CPU tensor, for its entries shape the calls (a CUDA tensor would cost a
            synchronisation and is refused).
        window_size: (left, 0 or -1), keys beside the diagonal.

    Returns:
        (T/P, H, Dv).
    """
    group = dist.group.WORLD if group is None else group
    ranks = dist.get_world_size(group)
    total = q.shape[0] * ranks
    _require_supported(
        seqlen=total, ranks=ranks, method="gather", packed=True, window_size=window_size
    )
    documents = _boundaries(cu_seqlens, total)
    return _GatherAttention.apply(
        q, k, v, documents, group, softmax_scale, window_size, deterministic, backend
    )
