"""Ring and gather attention over 2 and 4 processes against one process with all tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import processes  # noqa: E402

from fa3_train import reference  # noqa: E402
from fa3_train.integrations import context_parallel as cp  # noqa: E402

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
    results = {}
    for causal in (True, False):
        leaves, dout = _leaves_and_dout(rank, ranks, row=False)
        out = cp.ring_attention(*leaves, causal=causal, backend="reference")
        results["ring", causal] = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    for i, cu in enumerate(DOCUMENTS):
        for window in WINDOWS:
            leaves, dout = _leaves_and_dout(rank, ranks, row=True)
            out = cp.gather_attention(*leaves, cu, window_size=window, backend="reference")
            results["gather", i, window] = (
                out.detach(), *torch.autograd.grad(out, leaves, dout)
            )  # fmt: skip
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_one_process(ranks):
    shares = processes.run(ranks, _all_cases)
    for causal in (True, False):
        got = [share["ring", causal] for share in shares]
        _check(got, _truth(*_inputs(SEQLEN), causal), dim=1)
    for i, cu in enumerate(DOCUMENTS):
        for window in WINDOWS:
            got = [share["gather", i, window] for share in shares]
            row = [x[0] for x in _inputs(SEQLEN, 1)]
            _check(got, _truth(*row, True, torch.tensor(cu, dtype=torch.int32), window), dim=0)


def _check(shares, want, dim):
    for got, x in zip(zip(*shares, strict=True), want, strict=True):
        whole = cp.zigzag_unshard(list(got), dim)
        torch.testing.assert_close(whole, x.float(), rtol=1e-5, atol=1e-5)


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
    assert "need method='gather'" in cp.supports(seqlen=24, ranks=2, packed=True)
    assert "needs method='gather'" in cp.supports(seqlen=24, ranks=2, window_size=(4, 0))
    assert "use 'ring'" in cp.supports(seqlen=24, ranks=2, causal=False, method="gather")
    with pytest.raises(ValueError, match="must divide by 2 x 4 ranks, got 20"):
        cp.zigzag_shard(torch.zeros(1, 20), 0, 4)
