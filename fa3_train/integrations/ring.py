"""Ring attention over zig-zag shards, packed documents included, communication behind the kernels.

The row of T tokens is cut into 2P chunks; rank r holds chunks r and 2P - 1 - r (see
:mod:`fa3_train.integrations.context_parallel`). Keys travel around the ring, so that in step t a
rank has those of rank s = r - t. What it computes is one call of an ordinary attention kernel:

    t = 0   its own keys: causal attention over its two chunks as they lie, one after the other
    s < r   chunk s precedes both of its chunks, chunk 2P-1-s follows both: keys are chunk s
    s > r   both chunks of s lie between its own: queries are chunk 2P-1-r, keys are all of s

so for t > 0 nothing is masked, and without documents every step is the same amount of work.

**Packed documents** only shrink these calls. Between two chunks at most one document is shared:
the one that holds the last token of the earlier and the first of the later. Its queries are the
first tokens of what would be the query rows, its keys the last tokens of what would be the key
rows; both are contiguous in memory, and still nothing is masked. For t = 0 a document that reaches
from one chunk to the other is one sequence of the packed call, because its two pieces touch.

**Results** combine by their log-sum-exp (Ring Attention, arXiv 2310.01889; the rescaling is
FlashAttention's, arXiv 2205.14135 section 3.1) in FP32, rounded to the dtype of q once at the end.
With two ranks there is one combination, so it happens in place in 16 bits.

**Backward.** Keys travel again, and behind them the FP32 gradients of each block, which every rank
adds to; they arrive at home after P - 1 hops with every contribution and are rounded once. All
transfers have a kernel to hide behind: a rank computes its own block in two halves of the heads,
the first while the first keys travel, the second while the last gradients travel home.

Transfers are point-to-point sends on the communicator's own stream (NCCL); `wait` there makes the
compute stream wait, not the host. They start before the kernel that hides them, so they get their
multiprocessors first.
"""

from __future__ import annotations

import bisect
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from fa3_train.ops import attention

__all__ = ["merge", "merge_into", "own_lengths", "ring", "ring_block"]

Documents = tuple[int, ...]

# --- which part of a block is whose ---------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def ring_block(
    documents: Documents, rank: int, source: int, ranks: int
) -> tuple[int, int, int, int] | None:
    """What ``rank`` computes of the keys of ``source`` != rank: (q start, q end, k start, k end)
    in the rows that each of them holds, or None where they share no document.

    ``documents``: (N + 1) boundaries in the whole row, from 0 to T.
    """
    n = documents[-1] // (2 * ranks)
    late = 2 * ranks - 1 - rank  # chunk number of the rank's second chunk
    if source < rank:
        key_chunk, query_chunk = source, rank
    else:
        key_chunk, query_chunk = 2 * ranks - 1 - source, late
    last_key, first_query = (key_chunk + 1) * n - 1, query_chunk * n
    number = bisect.bisect_right(documents, last_key) - 1
    start, end = documents[number], documents[number + 1]
    if end <= first_query:
        return None
    if source < rank:
        queries = (0, min(end - rank * n, n) + max(0, min(end - late * n, n)))
        keys = (max(start - source * n, 0), n)
    else:
        queries = (n, n + min(end - late * n, n))
        in_second = max(start - key_chunk * n, 0)  # tokens of that chunk before the document
        in_first = min(max(start - source * n, 0), n) if start < (source + 1) * n else n
        keys = (n + in_second if in_second else in_first, 2 * n)
    return (*queries, *keys)


def own_lengths(documents: Documents, rank: int, ranks: int) -> list[int]:
    """cu_seqlens of the tokens that ``rank`` holds, for attention among themselves."""
    n = documents[-1] // (2 * ranks)
    cu = [0]
    for place, chunk in enumerate((rank, 2 * ranks - 1 - rank)):
        first = chunk * n
        if place:
            number = bisect.bisect_right(documents, (rank + 1) * n - 1) - 1
            if documents[number + 1] <= first:  # no document reaches from one to the other
                cu.append(n)
        inside = documents[bisect.bisect_right(documents, first) :]
        cu += [d - first + place * n for d in dict.fromkeys(inside) if d < first + n]
    return [*cu, 2 * n]


@functools.lru_cache(maxsize=64)
def _own(documents: Documents, rank: int, ranks: int, device: torch.device) -> dict[str, Any]:
    cu = own_lengths(documents, rank, ranks)
    longest = max(b - a for a, b in zip(cu, cu[1:], strict=False))
    lengths = to_device(cu, device)
    return {
        "cu_seqlens_q": lengths,
        "cu_seqlens_k": lengths,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def to_device(numbers: list[int], device: torch.device) -> Tensor:
    """int32 ``numbers`` on ``device`` without waiting for it."""
    host = torch.tensor(numbers, dtype=torch.int32)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


# --- combining partial results --------------------------------------------------------------------


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint keys as one.

    Args:
        out, more: (B, S, H, D). lse, more_lse: (B, H, S) fp32; -inf for rows that saw no key.

    Returns:
        out = sum_i exp(lse_i - lse) out_i and lse = logsumexp_i lse_i, both fp32.
    """
    total = torch.logaddexp(lse, more_lse)
    base = torch.where(total == -torch.inf, torch.zeros_like(total), total)
    a, b = ((x - base).exp().transpose(1, 2).unsqueeze(-1) for x in (lse, more_lse))
    return out.float() * a + more.float() * b, total


def merge_into(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """:func:`merge` written into ``out`` and ``lse`` (views of larger tensors, any of them)."""
    if out.is_cuda:
        from fa3_train.integrations import _merge_triton

        _merge_triton.merge_into(out, lse, more, more_lse)
        return
    result, total = merge(out, lse, more, more_lse)
    out.copy_(result)
    lse.copy_(total)


# --- travelling -----------------------------------------------------------------------------------


class _Ring:
    """Neighbours of this rank, and an exchange that runs beside the computation."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.ranks)
        self._previous = dist.get_global_rank(group, (self.rank - 1) % self.ranks)

    def start(self, tensors: list[Tensor]) -> _Transfer:
        """Send to the next rank, receive from the one before."""
        received = [torch.empty_like(x) for x in tensors]
        ops = [dist.P2POp(dist.isend, x, self._next, self.group) for x in tensors]
        ops += [dist.P2POp(dist.irecv, x, self._previous, self.group) for x in received]
        return _Transfer(tensors, received, dist.batch_isend_irecv(ops))


class _Transfer:
    def __init__(self, sent: list[Tensor], received: list[Tensor], handles: list[Any]) -> None:
        self.sent, self.received, self.handles = sent, received, handles  # sent: kept alive

    def wait(self) -> list[Tensor]:
        for handle in self.handles:
            handle.wait()
        return self.received


# --- forward --------------------------------------------------------------------------------------

_library = torch.library.Library("fa3_train", "FRAGMENT")
# One operator for the whole ring, so that a selective checkpointing policy can keep its result: a
# backward then repeats neither the kernels nor the transfers of the forward.
_library.define(
    "ring_fwd(Tensor q, Tensor k, Tensor v, int[] documents, str group, float? softmax_scale, "
    "bool causal, str backend) -> (Tensor, Tensor)"
)


def _attend_own(q, k, v, documents, ring, scale, causal, backend) -> tuple[Tensor, Tensor]:
    """Attention of a rank's tokens among themselves: out (B, S, H, D), lse (B, H, S)."""
    if not documents:
        return attention.attn_fwd(q, k, v, scale, causal, backend=backend)
    lengths = _own(documents, ring.rank, ring.ranks, q.device)
    out, lse = attention.attn_fwd(
        *(x.squeeze(0) for x in (q, k, v)), scale, causal, **lengths, backend=backend
    )
    return out.unsqueeze(0), lse.unsqueeze(0)


def _blocks(ring: _Ring, documents: Documents, seqlen: int, causal: bool) -> list[Any]:
    """Block of step 1, 2, ...: see ring_block."""
    sources = [(ring.rank - step) % ring.ranks for step in range(1, ring.ranks)]
    if not causal:
        return [(0, seqlen, 0, seqlen)] * len(sources)
    whole = documents or (0, seqlen * ring.ranks)
    return [ring_block(whole, ring.rank, source, ring.ranks) for source in sources]


def _rows(x: Tensor, start: int, end: int, dim: int = 1) -> Tensor:
    return x if end - start == x.shape[dim] else x.narrow(dim, start, end - start)


def _ring_fwd(q, k, v, documents, group, scale, causal, backend):
    documents = tuple(documents)
    ring = _Ring(_resolve_process_group(group))
    keys = [k.contiguous(), v.contiguous()]
    transfer = ring.start(keys) if ring.ranks > 1 else None
    out, lse = _attend_own(q, *keys, documents, ring, scale, causal, backend)
    result = out if ring.ranks <= 2 else out.float()
    blocks = _blocks(ring, documents, q.shape[1], causal)
    for step, block in enumerate(blocks, 1):
        assert transfer is not None
        keys = transfer.wait()
        if step < len(blocks):
            transfer = ring.start(keys)
        if block is None:
            continue
        q0, q1, k0, k1 = block
        part, part_lse = attention.attn_fwd(
            _rows(q, q0, q1), *(_rows(x, k0, k1) for x in keys), scale, False, backend=backend
        )
        merge_into(_rows(result, q0, q1), _rows(lse, q0, q1, 2), part, part_lse)
    return result.to(q.dtype), lse


def _ring_fwd_fake(q, k, v, documents, group, scale, causal, backend):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


_library.impl("ring_fwd", _ring_fwd, "CompositeExplicitAutograd")
torch.library.register_fake("fa3_train::ring_fwd", _ring_fwd_fake, lib=_library)

# --- backward -------------------------------------------------------------------------------------


def _own_backward(dout, q, k, v, out, lse, grads, heads, documents, ring, settings) -> None:
    """Add the gradients of a rank's tokens among themselves, for kv heads ``heads``."""
    scale, causal, deterministic, backend = settings
    share = q.shape[2] // k.shape[2]
    of_q = slice(heads.start * share, heads.stop * share)
    tensors = [dout[:, :, of_q], q[:, :, of_q], k[:, :, heads], v[:, :, heads], out[:, :, of_q]]
    targets = [grads[0][:, :, of_q], grads[1][:, :, heads], grads[2][:, :, heads]]
    lse = lse[:, of_q].contiguous()
    lengths = {}
    if documents:
        lengths = _own(documents, ring.rank, ring.ranks, q.device)
        tensors, targets = ([x.squeeze(0) for x in xs] for xs in (tensors, targets))
        lse = lse.squeeze(0)
    attention.attn_bwd_accumulate(
        *tensors, lse, *targets, scale, causal, **lengths, deterministic=deterministic,
        backend=backend,
    )  # fmt: skip


def _ring_bwd(dout, q, k, v, out, lse, documents, ring, settings):
    scale, causal, deterministic, backend = settings
    dout = dout.contiguous()
    keys = [k.contiguous(), v.contiguous()]
    transfer = ring.start(keys) if ring.ranks > 1 else None
    grads = [torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
             for x in (q, *keys)]  # fmt: skip
    all_heads = k.shape[2]
    # Nothing to hide, or nothing to divide: then the longer transfer, the last, gets all of it.
    early = all_heads // 2 if ring.ranks > 1 else all_heads
    own = (dout, q, *keys, out, lse, grads)
    if early:
        _own_backward(*own, slice(0, early), documents, ring, settings)
    sums: _Transfer | None = None
    blocks = _blocks(ring, documents, q.shape[1], causal)
    for step, block in enumerate(blocks, 1):
        assert transfer is not None
        keys = transfer.wait()
        if step < len(blocks):
            transfer = ring.start(keys)
        shares = [torch.zeros_like(x, dtype=torch.float32) for x in keys]
        if block is not None:
            q0, q1, k0, k1 = block
            attention.attn_bwd_accumulate(
                _rows(dout, q0, q1), _rows(q, q0, q1), *(_rows(x, k0, k1) for x in keys),
                _rows(out, q0, q1), _rows(lse, q0, q1, 2).contiguous(), _rows(grads[0], q0, q1),
                *(_rows(x, k0, k1) for x in shares), scale, False,
                deterministic=deterministic, backend=backend,
            )  # fmt: skip
        if sums is not None:
            for total, share in zip(shares, sums.wait(), strict=True):
                total.add_(share)
        sums = ring.start(shares)  # behind their keys; the last hop is the one home
    if early < all_heads:
        _own_backward(*own, slice(early, all_heads), documents, ring, settings)
    if sums is not None:
        for total, share in zip(grads[1:], sums.wait(), strict=True):
            total.add_(share)
    return [g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, group, scale, causal, deterministic, backend):
        out, lse = torch.ops.fa3_train.ring_fwd(
            q, k, v, list(documents), group.group_name, scale, causal, backend
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.group = documents, group
        ctx.settings = scale, causal, deterministic, backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        ring = _Ring(ctx.group)
        grads = _ring_bwd(dout, *ctx.saved_tensors, ctx.documents, ring, ctx.settings)
        return (*grads, *(None,) * 6)


def ring(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, group: Any, scale: float | None,
    causal: bool, deterministic: bool, backend: str,
) -> Tensor:  # fmt: skip
    """Differentiable ring over (B, S/P, H, D); ``documents`` () for none, else B = 1. Arguments are
    judged by :func:`fa3_train.integrations.context_parallel.ring_attention`."""
    return _RingAttention.apply(q, k, v, documents, group, scale, causal, deterministic, backend)
