"""Ring and gather attention over 2 and 4 processes against one process with all tokens."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import processes  # noqa: E402

from fa3_train import reference  # noqa: E402
from fa3_train.integrations import context_parallel as cp  # noqa: E402
from fa3_train.integrations import ring, ulysses  # noqa: E402
from fa3_train.modules import layer  # noqa: E402
from fa3_train.ops import attention  # noqa: E402

B, H, HKV, D = 2, 4, 2, 8


def _inputs(seqlen, batch=B):
    g = torch.Generator().manual_seed(0)
    shape = (batch, seqlen)
    return [torch.randn(*shape, h, D, generator=g) for h in (H, HKV, HKV, H)]  # q, k, v, dout


def _truth(q, k, v, dout, causal, cu=None, window=(-1, -1)):
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    sides = (window[0], 0) if causal else window
    out, _ = reference.attention(
        *leaves, window_size=sides, cu_seqlens_q=cu, cu_seqlens_k=cu, dtype=torch.float64
    )
    return out.detach(), *torch.autograd.grad(out, leaves, dout.double())


SEQLEN = 24
DOCUMENTS = (
    [0, 24],
    [0, 1, 9, 9, 10, 23, 24],  # uneven, one empty, across every chunk boundary
    [0, 6, 12, 18, 24],  # on the boundaries of 4 chunks
    [0, 4, 20, 24],  # the second chunk to the second last of 8, whole chunks between them
)
WINDOWS = ((-1, -1), (3, 0))


def _leaves_and_dout(rank, ranks, row):
    """This rank's share of the inputs; ``row``: one packed row instead of a batch."""
    dim = 0 if row else 1
    inputs = [x[0] for x in _inputs(SEQLEN, 1)] if row else _inputs(SEQLEN)
    *leaves, dout = (cp.zigzag_shard(x, rank, ranks, dim) for x in inputs)
    return [x.requires_grad_() for x in leaves], dout


def _all_cases(rank, ranks):
    """One process start for everything: {case: (out, dq, dk, dv)}."""
    results = {"calls": _kept_by_checkpointing(rank, ranks)}
    for causal in (True, False):
        leaves, dout = _leaves_and_dout(rank, ranks, row=False)
        out = cp.ring_attention(*leaves, causal=causal, backend="reference")
        results["ring", causal] = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    for i, cu in enumerate(DOCUMENTS):
        leaves, dout = _leaves_and_dout(rank, ranks, row=True)
        out = cp.ring_attention(*leaves, cu_seqlens=cu, backend="reference")
        results["packed ring", i] = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        for window in WINDOWS:
            leaves, dout = _leaves_and_dout(rank, ranks, row=True)
            out = cp.gather_attention(*leaves, cu, window_size=window, backend="reference")
            results["gather", i, window] = (
                out.detach(), *torch.autograd.grad(out, leaves, dout)
            )  # fmt: skip
        if HKV % ranks == 0:
            results["ulysses", i] = _ulysses(rank, ranks, cu)
    return results


def _kept_by_checkpointing(rank, ranks):
    """Calls of the attention kernel in a backward: (without, with "selective" checkpointing)."""
    calls = 0
    kernel = attention.attn_fwd

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        return kernel(*args, **options)

    def run(*leaves):
        return cp.ring_attention(*leaves, cu_seqlens=[0, 5, SEQLEN], backend="reference")

    counts, grads = [], []
    attention.attn_fwd = counted
    for options in ({}, {"context_fn": layer._keep_attention}):
        leaves, dout = _leaves_and_dout(rank, ranks, row=True)
        out = checkpoint(run, *leaves, use_reentrant=False, **options)
        calls = 0
        grads.append(torch.autograd.grad(out, leaves, dout))
        counts.append(calls)
    attention.attn_fwd = kernel
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    return counts


def _ulysses(rank, ranks, cu):
    *leaves, dout = (x[0].chunk(ranks, 0)[rank] for x in _inputs(SEQLEN, 1))
    leaves = [x.requires_grad_() for x in leaves]
    lengths = torch.tensor(cu, dtype=torch.int32)
    q, k, v = ulysses.to_heads(*leaves)
    assert q.shape == (SEQLEN, H // ranks, D)
    out, _ = reference.attention(
        q, k, v, window_size=(-1, 0), cu_seqlens_q=lengths, cu_seqlens_k=lengths
    )
    out = ulysses.to_tokens(out.float())
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_one_process(ranks):
    shares = processes.run(ranks, _all_cases)
    assert all(share["calls"][0] >= 1 and share["calls"][1] == 0 for share in shares)
    for causal in (True, False):
        got = [share["ring", causal] for share in shares]
        _check(got, _truth(*_inputs(SEQLEN), causal), dim=1)
    for i, cu in enumerate(DOCUMENTS):
        row = [x[0] for x in _inputs(SEQLEN, 1)]
        got = [share["packed ring", i] for share in shares]
        _check(got, _truth(*row, True, torch.tensor(cu, dtype=torch.int32)), dim=0)
        if HKV % ranks == 0:
            got = zip(*(share["ulysses", i] for share in shares), strict=True)
            want = _truth(*row, True, torch.tensor(cu, dtype=torch.int32))
            for pieces, x in zip(got, want, strict=True):
                torch.testing.assert_close(torch.cat(pieces), x.float(), rtol=1e-5, atol=1e-5)
        for window in WINDOWS:
            got = [share["gather", i, window] for share in shares]
            _check(got, _truth(*row, True, torch.tensor(cu, dtype=torch.int32), window), dim=0)


def _check(shares, want, dim):
    for got, x in zip(zip(*shares, strict=True), want, strict=True):
        whole = cp.zigzag_unshard(list(got), dim)
        torch.testing.assert_close(whole, x.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(40))
def test_ring_blocks_are_every_visible_pair_once(ranks, seed):
    """Whatever the documents: each (query, earlier key of its document) is in exactly one call."""
    rng = random.Random(seed)
    n = rng.choice([1, 2, 5])
    total = 2 * ranks * n
    borders = sorted(rng.choices(range(total + 1), k=rng.choice([0, 1, 3, 9])))
    documents = (0, *borders, total)
    seen = torch.zeros(total, total, dtype=torch.int)
    for rank in range(ranks):
        mine = cp.zigzag_positions(total, rank, ranks)
        cu = ring.own_lengths(documents, rank, ranks)
        assert cu == sorted(set(cu)) and cu[0] == 0 and cu[-1] == 2 * n
        for a, b in zip(cu, cu[1:], strict=False):
            for i in range(a, b):
                seen[mine[i], mine[a : i + 1]] += 1
        for source in set(range(ranks)) - {rank}:
            block = ring.ring_block(documents, rank, source, ranks)
            if block is not None:
                q0, q1, k0, k1 = block
                theirs = cp.zigzag_positions(total, source, ranks)
                assert q0 < q1 and k0 < k1
                seen[mine[q0:q1, None], theirs[None, k0:k1]] += 1
    number = torch.zeros(total, dtype=torch.int)
    for border in documents[1:-1]:
        number[border:] += 1
    visible = torch.ones(total, total, dtype=torch.int).tril() * (number[:, None] == number)
    assert torch.equal(seen, visible.int())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_zigzag_is_a_partition_and_balances_causal_work(ranks):
    seqlen = 12 * ranks
    x = torch.arange(seqlen)
    shards = [cp.zigzag_shard(x, r, ranks, 0) for r in range(ranks)]
    assert torch.equal(cp.zigzag_unshard(shards, 0), x)
    for r, shard in enumerate(shards):
        assert torch.equal(shard, cp.zigzag_positions(seqlen, r, ranks))
    assert len({int(s.sum()) for s in shards}) == 1  # keys seen = position + 1, so equal sums


def test_merge_handles_rows_without_keys():
    out = torch.tensor([[[[1.0]], [[0.0]]]])  # (1, 2, 1, 1)
    lse = torch.tensor([[[0.0, -torch.inf]]])
    more = torch.tensor([[[[3.0]], [[0.0]]]])
    o, m = cp.merge(out, lse, more, torch.tensor([[[0.0, -torch.inf]]]))
    assert o[0, 0].item() == pytest.approx(2.0) and o[0, 1].item() == 0.0
    assert m[0, 0, 0].item() == pytest.approx(0.6931472) and m[0, 0, 1].item() == -torch.inf


def test_supports_and_errors_name_the_rule():
    assert cp.supports(seqlen=24, ranks=2) is None
    assert "must divide by 2 x 2 ranks, got 26" in cp.supports(seqlen=26, ranks=2)
    assert cp.supports(seqlen=24, ranks=2, packed=True) is None
    assert "need a causal mask" in cp.supports(seqlen=24, ranks=2, packed=True, causal=False)
    assert "needs method='gather'" in cp.supports(seqlen=24, ranks=2, window_size=(4, 0))
    assert "use 'ring'" in cp.supports(seqlen=24, ranks=2, causal=False, method="gather")
    with pytest.raises(ValueError, match="must divide by 2 x 4 ranks, got 20"):
        cp.zigzag_shard(torch.zeros(1, 20), 0, 4)
