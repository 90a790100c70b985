"""Context parallelism: one long sequence over several ranks, without dividing heads.

Each rank holds a share of the tokens. Under a causal mask equal runs of tokens are unequal work, so
the sequence is cut into 2P chunks and rank r takes chunks r and 2P - 1 - r (*zig-zag*): every rank
then has the same number of score blocks.

    shard  = zigzag_shard(x, rank, ranks, dim=1)       # before the model
    out    = ring_attention(q, k, v, group)            # (B, S/P, H, D) each
    whole  = zigzag_unshard(shards, dim=1)             # for checks

Two ways to reach the other ranks' keys:

``ring_attention``
    P steps; k and v travel around the ring while the previous block is being computed, partial
    results combine by their log-sum-exp (Ring Attention, arXiv 2310.01889; FlashAttention's own
    rescaling, arXiv 2205.14135 section 3.1). In the backward k and v travel again together with
    their FP32 gradients, which every rank adds to in place: one rounding at the end, as in a single
    kernel. Memory per rank: two blocks of k and v.

``gather_attention``
    k and v are gathered once (with GQA they are small), each of the rank's two chunks is one
    packed call over the documents that reach into it, and the FP32 gradients are reduce-scattered.
    Exact with packed documents of any length: a chunk's part of a document and that document's
    keys up to the chunk's end share their last token, which is what bottom-right masks align on.

Both work on every backend that gives (out, lse) and accumulates gradients: ``hopper`` and
``reference``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fa3_train.checks import require
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


def supports(
    *, seqlen: int, ranks: int, causal: bool = True, window_size: tuple[int, int] = (-1, -1),
    method: str = "ring", packed: bool = False,
) -> str | None:  # fmt: skip
    """Reason why a sequence of ``seqlen`` tokens over ``ranks`` is not served, or None."""
    if method not in ("ring", "gather"):
        return f"method: must be 'ring' or 'gather', got {method!r}"
    if seqlen % (2 * ranks):
        return f"seqlen: must divide by 2 x {ranks} ranks, got {seqlen}"
    if method == "ring" and packed:
        return "cu_seqlens: packed documents need method='gather'"
    if method == "ring" and window_size != (-1, -1):
        return f"window_size: needs method='gather', got {window_size}"
    if method == "gather" and not causal:
        return "causal: method='gather' is for causal masks, use 'ring'"
    return None


def _require_supported(**arguments: Any) -> None:
    reason = supports(**arguments)
    require(reason is None, "context_parallel", reason or "", arguments)


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


# --- combining partial results --------------------------------------------------------------------


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint keys as one.

    Args:
        out, more: (B, S, H, D), ``out`` in fp32. lse, more_lse: (B, H, S) fp32; -inf for rows
            that saw no key.

    Returns:
        out = sum_i exp(lse_i - lse) out_i and lse = logsumexp_i lse_i, both fp32.
    """
    total = torch.logaddexp(lse, more_lse)
    base = torch.where(total == -torch.inf, torch.zeros_like(total), total)
    a, b = ((x - base).exp().transpose(1, 2).unsqueeze(-1) for x in (lse, more_lse))
    return out * a + more.float() * b, total


class _Ring:
    """Neighbours of this rank, and an exchange that runs beside the computation."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        to_global = dist.get_global_rank if group is not None else lambda _, r: r
        self.next = to_global(group, (self.rank + 1) % self.ranks)
        self.previous = to_global(group, (self.rank - 1) % self.ranks)

    def start(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Send to the next rank, receive from the one before: (buffers, handles to wait for)."""
        received = [torch.empty_like(x) for x in tensors]
        ops = [dist.P2POp(dist.isend, x, self.next, self.group) for x in tensors]
        ops += [dist.P2POp(dist.irecv, x, self.previous, self.group) for x in received]
        return received, dist.batch_isend_irecv(ops)


def _halves(rank: int, source: int, causal: bool) -> tuple[slice, slice, bool]:
    """Which queries of ``rank`` see which keys of ``source``: (q rows, k rows, causal), as parts of
    their two chunks. Every step with source != rank is the same amount of work.

    With a causal mask: own keys, the ordinary triangle (chunk r precedes chunk 2P-1-r, and the two
    are in order). Keys from a lower rank: its first chunk precedes both of ours, its second follows
    both; so all queries, first half of the keys, no mask. From a higher rank: its both chunks lie
    between our two; so the second half of the queries, all keys, no mask.
    """
    everything, first, second = slice(None), slice(0, 1), slice(1, 2)
    if not causal:
        return everything, everything, False
    if source == rank:
        return everything, everything, True
    return (everything, first, False) if source < rank else (second, everything, False)


def _part(x: Tensor, halves: slice, dim: int = 1) -> Tensor:
    if halves == slice(None):
        return x
    n = x.shape[dim] // 2
    return x.narrow(dim, halves.start * n, n)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, group, scale, causal, deterministic, backend):
        ring = _Ring(group)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float32, device=q.device)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
        keys = [k.contiguous(), v.contiguous()]
        for step in range(ring.ranks):
            last = step + 1 == ring.ranks
            incoming, handles = ([], []) if last else ring.start(keys)
            source = (ring.rank - step) % ring.ranks
            rows, cols, masked = _halves(ring.rank, source, causal)
            part, part_lse = attention.attn_fwd(
                _part(q, rows), _part(keys[0], cols), _part(keys[1], cols), scale, masked,
                backend=backend,
            )  # fmt: skip
            o, m = merge(_part(out, rows), _part(lse, rows, 2), part, part_lse)
            _part(out, rows).copy_(o)
            _part(lse, rows, 2).copy_(m)
            for handle in handles:
                handle.wait()
            keys = incoming
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.settings = group, scale, causal, deterministic, backend
        return result

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        group, scale, causal, deterministic, backend = ctx.settings
        ring = _Ring(group)
        dq = torch.zeros_like(q, dtype=torch.float32)
        keys = [k.contiguous(), v.contiguous()]
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in keys]
        for step in range(ring.ranks):
            last = step + 1 == ring.ranks
            incoming, handles = ([], []) if last else ring.start(keys)
            source = (ring.rank - step) % ring.ranks
            rows, cols, masked = _halves(ring.rank, source, causal)
            parts = [
                torch.zeros_like(_part(x, w), dtype=torch.float32)
                for x, w in ((q, rows), (keys[0], cols), (keys[1], cols))
            ]
            attention.attn_bwd_accumulate(
                _part(dout, rows), _part(q, rows), _part(keys[0], cols), _part(keys[1], cols),
                _part(out, rows), _part(lse, rows, 2).contiguous(), *parts, scale, masked,
                deterministic=deterministic, backend=backend,
            )  # fmt: skip
            _part(dq, rows).add_(parts[0])
            _part(sums[0], cols).add_(parts[1])
            _part(sums[1], cols).add_(parts[2])
            for handle in handles:
                handle.wait()
            keys = incoming
            sums, handles = ring.start(sums)  # the gradients follow their keys, home at the end
            for handle in handles:
                handle.wait()
        return (dq.to(q.dtype), sums[0].to(k.dtype), sums[1].to(v.dtype), *(None,) * 5)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Any = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention over the tokens of all ranks of ``group``; differentiable.

    Args:
        q: (B, S/P, H, D), k and v (B, S/P, Hkv, D): this rank's zig-zag share.
        group: process group; default the world.

    Returns:
        (B, S/P, H, Dv), equal up to rounding to the share of attention over the whole sequence.

    Raises:
        ArgumentError: an odd share, or what :func:`fa3_train.flash_attn_func` refuses.
    """
    ranks = dist.get_world_size(group)
    _require_supported(seqlen=q.shape[1] * ranks, ranks=ranks, causal=causal)
    require(k.shape[1] == q.shape[1], "k", "must have as many tokens as q", k.shape[1])
    return _RingAttention.apply(q, k, v, group, softmax_scale, causal, deterministic, backend)


# --- all keys at once, for packed documents -------------------------------------------------------


def _chunk_documents(cu: list[int], start: int, end: int) -> tuple[list[int], list[int], int, int]:
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


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu, group, scale, window, deterministic, backend):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        k_all, v_all = (_gather(x, group) for x in (k, v))
        calls = []
        for c, q_chunk in zip(_chunks(rank, ranks), q.chunk(2, 0), strict=True):
            n = q_chunk.shape[0]
            cu_q, cu_k, a, b = _chunk_documents(cu, c * n, (c + 1) * n)
            calls.append((cu_q, cu_k, a, b))
        outs, lses = [], []
        for q_chunk, (cu_q, cu_k, a, b) in zip(q.chunk(2, 0), calls, strict=True):
            out, lse = attention.attn_fwd(
                q_chunk, k_all[a:b], v_all[a:b], scale, True, **_lengths(cu_q, cu_k, q.device),
                window_size=window, backend=backend,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        ctx.save_for_backward(q, k, v, *outs, *lses)
        ctx.settings = calls, group, scale, window, deterministic, backend
        return torch.cat(outs)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, *saved = ctx.saved_tensors
        calls, group, scale, window, deterministic, backend = ctx.settings
        k_all, v_all = (_gather(x, group) for x in (k, v))
        dq = torch.zeros_like(q, dtype=torch.float32)
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (k_all, v_all)]
        for i, (cu_q, cu_k, a, b) in enumerate(calls):
            out, lse = saved[i], saved[2 + i]
            attention.attn_bwd_accumulate(
                dout.chunk(2, 0)[i].contiguous(), q.chunk(2, 0)[i], k_all[a:b], v_all[a:b], out,
                lse, dq.chunk(2, 0)[i], sums[0][a:b], sums[1][a:b], scale, True,
                **_lengths(cu_q, cu_k, q.device), window_size=window, deterministic=deterministic,
                backend=backend,
            )  # fmt: skip
        dk, dv = (_reduce_scatter(x, group) for x in sums)
        return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *(None,) * 6)


def _lengths(cu_q: list[int], cu_k: list[int], device: torch.device) -> dict[str, Any]:
    q, k = (torch.tensor(x, dtype=torch.int32, device=device) for x in (cu_q, cu_k))
    return {
        "cu_seqlens_q": q,
        "cu_seqlens_k": k,
        "max_seqlen_q": max((b - a for a, b in zip(cu_q, cu_q[1:], strict=False)), default=0),
        "max_seqlen_k": max((b - a for a, b in zip(cu_k, cu_k[1:], strict=False)), default=0),
    }


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
    cu_seqlens: list[int] | Tensor,
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
    if isinstance(cu_seqlens, Tensor):
        require(
            cu_seqlens.device.type == "cpu", "cu_seqlens", "must be on the CPU", cu_seqlens.device
        )
        cu_seqlens = cu_seqlens.tolist()
    ranks = dist.get_world_size(group)
    total = q.shape[0] * ranks
    _require_supported(
        seqlen=total, ranks=ranks, method="gather", packed=True, window_size=window_size
    )
    require(
        cu_seqlens[0] == 0 and cu_seqlens[-1] == total and sorted(cu_seqlens) == cu_seqlens,
        "cu_seqlens", f"must rise from 0 to the {total} tokens of all ranks", cu_seqlens,
    )  # fmt: skip
    return _GatherAttention.apply(
        q, k, v, cu_seqlens, group, softmax_scale, window_size, deterministic, backend
    )
