"""The ops without a GPU: every backend against the truth, autograd, tracing, checkpointing.

The kernels' own plumbing (schemas, fakes, the autograd.Function, lse gradients) runs here too: a
CPU implementation made from the fp64 reference is registered under the same op names for this
module, and the choice of ``hopper`` is let through.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo import testing as dynamo_testing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from fa3_train import numerics, reference
from fa3_train.ops import attention, backends, hopper, sdpa
from fa3_train.ops.attention import (
    attn_bwd_accumulate,
    attn_fwd,
    flash_attn_func,
    flash_attn_varlen_func,
)

MASKS = [
    {},
    {"causal": True},
    {"window_size": (3, 0)},
    {"window_size": (2, 1)},
    {"window_size": (-1, 2)},
    {"window_size": (3, -1)},
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def offsets(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def fwd_on_cpu(
    q, k, v, cu_q, cu_k, sink, max_q, max_k, scale, causal, left, right, softcap, options=0
):
    hopper.check_request(q, k, v, cu_q, cu_k, sink, max_q, max_k)
    out, lse = reference.attention(
        q, k, v, softmax_scale=scale, window_size=(left, 0 if causal else right), softcap=softcap,
        sink=sink, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip
    return out.to(q.dtype).contiguous(), lse.float().contiguous()


def bwd_on_cpu(
    dout, q, k, v, out, lse, dlse, cu_q, cu_k, sink, max_q, max_k, scale, causal, left, right,
    softcap, deterministic, options=0,
):  # fmt: skip
    grads = reference.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, softmax_scale=scale, softcap=softcap, sink=sink,
        window_size=(left, 0 if causal else right), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip
    dsink = torch.empty(0) if sink is None else grads.dsink.float()
    return (*(g.to(q.dtype).contiguous() for g in grads[:3]), dsink)


@pytest.fixture(scope="module")
def _cpu_implementations():
    library = torch.library.Library("fa3_train", "IMPL")
    library.impl("attn_fwd", fwd_on_cpu, "CPU")
    library.impl("attn_bwd", bwd_on_cpu, "CPU")
    yield
    library._destroy()


@pytest.fixture
def kernels(_cpu_implementations, monkeypatch):
    """backend='hopper' reaches the ops above."""
    monkeypatch.setitem(backends._PROBLEMS, "hopper", lambda *request: None)
    backends._choose.cache_clear()
    attention._requests.clear()
    yield
    backends._choose.cache_clear()
    attention._requests.clear()


# --- values and gradients of the backends ---


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5), (1, 6), (6, 2), (4, 0)])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_dense_against_the_truth(backend, lengths, mask):
    sq, sk = lengths
    q, k, v = leaf(2, sq, 4, 16), leaf(2, sk, 2, 16), leaf(2, sk, 2, 24)
    dout = torch.randn(2, sq, 4, 24)
    out = flash_attn_func(q, k, v, backend=backend, **mask)
    truth, _, expected = reference.attention_gradients(dout, q, k, v, **mask)
    numerics.assert_as_good(out, truth, what="same")
    grads = torch.autograd.grad(out, (q, k, v), dout, allow_unused=sk == 0)
    for name, a, b in zip(("dq", "dk", "dv"), grads, expected[:3], strict=True):
        a = torch.zeros_like(b).float() if a is None else a
        numerics.assert_as_good(a, b, what="same", name=name)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "sdpa row mask", "reference"])
def test_packed_against_the_truth(backend, mask):
    """Empty documents, equal ones (batched together), Sq != Sk, and rows of nobody at the end."""
    lq, lk = (3, 0, 5, 5, 2, 4), (3, 4, 5, 5, 1, 0)
    cu_q, cu_k = offsets(*lq), offsets(*lk)
    q, k, v = leaf(21, 4, 16), leaf(20, 2, 16), leaf(20, 2, 16)
    with torch.no_grad():
        for x, end in ((q, 19), (k, 18), (v, 18)):
            x[end:] = 1e4
    dout = torch.randn(21, 4, 16)
    dout[19:] = 0
    if backend == "sdpa row mask":
        left, right = mask.get("window_size", (-1, -1))
        right = 0 if mask.get("causal") else right
        out = sdpa._masked_row(q, k, v, cu_q, cu_k, 0.25, left, right)
    else:
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 5, backend=backend, **mask)
    truth, _, expected = reference.attention_gradients(
        dout, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **mask
    )
    numerics.assert_as_good(out[:19], truth[:19], what="same")
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for name, a, b in zip(("dq", "dk", "dv"), grads, expected[:3], strict=True):
        numerics.assert_as_good(a, b, what="same", name=name)


def test_sdpa_bf16_is_as_good_as_pytorch():
    q, k, v = (leaf(1, 65, h, 32, dtype=torch.bfloat16) for h in (4, 2, 2))
    out = flash_attn_func(q, k, v, causal=True, backend="sdpa")
    truth, _ = reference.attention(q, k, v, causal=True)
    base, _ = reference.attention_emulated(q, k, v, causal=True)
    numerics.assert_as_good(out, truth, base)


def test_reference_lse_sink_and_softcap():
    q, k, v, sink = leaf(1, 4, 4, 8), leaf(1, 6, 2, 8), leaf(1, 6, 2, 8), leaf(4)
    out, lse = flash_attn_func(
        q, k, v, causal=True, softcap=1.5, sink=sink, return_lse=True, backend="reference"
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    truth, lse_truth, expected = reference.attention_gradients(
        dout, q, k, v, dlse=dlse, sink=sink, causal=True, softcap=1.5
    )
    assert lse.dtype == torch.float32 and lse.shape == (1, 4, 4)
    numerics.assert_as_good(out, truth, what="same")
    numerics.assert_as_good(lse, lse_truth, what="same")
    grads = torch.autograd.grad((out, lse), (q, k, v, sink), (dout, dlse))
    for a, b in zip(grads, expected, strict=True):
        numerics.assert_as_good(a, b, what="same")


def test_rows_without_keys_have_no_nan_in_the_gradient():
    q, k, v = leaf(1, 6, 2, 8), leaf(1, 3, 2, 8), leaf(1, 3, 2, 8)
    for backend in ("sdpa", "reference"):
        out = flash_attn_func(q, k, v, causal=True, backend=backend)
        assert torch.equal(out[:, :3], torch.zeros(1, 3, 2, 8))
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)
        assert torch.equal(grads[0][:, :3], torch.zeros(1, 3, 2, 8))


def test_autocast_casts_like_sdpa():
    q = leaf(1, 4, 2, 8)
    for backend in ("sdpa", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert flash_attn_func(q, q, q, backend=backend).dtype == torch.bfloat16
        assert flash_attn_func(q, q, q, backend=backend).dtype == torch.float32


def test_meta_tensors_have_shapes():
    q, k = torch.empty(2, 5, 4, 16, device="meta"), torch.empty(2, 7, 2, 16, device="meta")
    assert flash_attn_func(q, k, k, backend="sdpa").shape == (2, 5, 4, 16)


# --- tracing ---


@pytest.mark.parametrize("backend", ["sdpa", "reference", "auto"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (2, 1)}])
def test_compile_dense_without_graph_break(backend, mask):
    def step(q, k, v):
        return flash_attn_func(q * 1.5, k, v, backend=backend, **mask)

    q, k, v = leaf(2, 6, 4, 8), leaf(2, 9, 2, 8), leaf(2, 9, 2, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, out = step(q, k, v), compiled(q, k, v)
    numerics.assert_as_good(out, expected.double(), what="same")
    dout = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, expected)), strict=True)
    for a, b in pairs:
        numerics.assert_as_good(a, b.double(), what="same")


def test_compile_packed_sdpa_without_graph_break():
    def step(q, k, v, cu, longest):
        return flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, causal=True, backend="sdpa"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((3, 4, 5), (6, 2, 4), (1, 1, 10)):
        q, k, v = leaf(12, 4, 8), leaf(12, 2, 8), leaf(12, 2, 8)
        cu = offsets(*lengths)
        out = compiled(q, k, v, cu, max(lengths))
        numerics.assert_as_good(out, step(q, k, v, cu, max(lengths)).double(), what="same")


# --- the kernels' plumbing on stand-in implementations ---


def half(*shape):
    return leaf(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_function_gradients(kernels, packed, with_sink):
    options = {"causal": True, "softcap": 2.0}
    cu = offsets(3, 5)
    lead = (8,) if packed else (2, 5)
    q, k, v = half(*lead, 4, 16), half(*lead, 2, 16), half(*lead, 2, 16)
    sink = leaf(4) if with_sink else None
    kw = {"cu_seqlens_q": cu, "cu_seqlens_k": cu} if packed else {}
    lengths = {"max_seqlen_q": 5, "max_seqlen_k": 5} if packed else {}
    call = flash_attn_varlen_func if packed else flash_attn_func
    out, lse = call(
        q, k, v, **kw, **lengths, **options, sink=sink, return_lse=True, backend="hopper"
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    truth, lse_truth, expected = reference.attention_gradients(
        dout, q, k, v, dlse=dlse, sink=sink, **kw, **options
    )
    numerics.assert_as_good(out, truth, what="out")
    numerics.assert_as_good(lse, lse_truth, what="lse")
    inputs = [q, k, v] + ([sink] if with_sink else [])
    grads = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    base = reference.attention_gradients(
        dout, q, k, v, dlse=dlse, sink=sink, emulated=True, **kw, **options
    )[2]
    for a, b, c in zip(grads, expected, base, strict=False):
        numerics.assert_as_good(a, b, c, what="grad")


def test_only_lse_is_used(kernels):
    q, k, v = half(1, 5, 2, 16), half(1, 5, 2, 16), half(1, 5, 2, 16)
    _, lse = flash_attn_func(q, k, v, return_lse=True, backend="hopper")
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    assert dq.abs().sum() > 0 and dk.abs().sum() > 0 and not dv.any()


def test_known_requests_are_still_checked(kernels):
    """The memory of earlier calls must not let a bad one through, nor a wrong type."""
    q, k, v = half(8, 4, 16), half(8, 2, 16), half(8, 2, 16)
    cu = offsets(3, 5)

    def call(cu=cu, causal=True, window=(-1, -1), deterministic=False):
        return flash_attn_varlen_func(
            q, k, v, cu, cu, 5, 5, causal=causal, window_size=window, deterministic=deterministic,
            backend="hopper",
        )  # fmt: skip

    first = call()
    assert torch.equal(call(), first)
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[2\]: must be at least 5, got 4"):
        call(torch.tensor([0, 5, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="max_seqlen_q: must be at least the length"):
        call(offsets(2, 6))
    with pytest.raises(ValueError, match="causal: must be True or False, got 1"):
        call(causal=1)
    with pytest.raises(ValueError, match=r"window_size\[0\]: must be an int"):
        call(window=(-1.0, -1))
    assert torch.equal(call(window=[-1, -1]), first)  # a list cannot be a key, and need not


def test_known_requests_follow_the_rule_of_determinism():
    q = torch.randn(1, 4, 2, 8)
    before = len(attention._requests)
    for switch in (False, True, False):
        torch.use_deterministic_algorithms(switch)
        try:
            flash_attn_func(q, q, q, deterministic=True, backend="sdpa")
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(attention._requests) == before + 2


def test_second_derivative_is_refused(kernels):
    q = half(1, 5, 2, 16)
    out = flash_attn_func(q, q, q, backend="hopper")
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.float().sum().backward()


def test_no_autograd_node_without_gradient(kernels):
    q = torch.randn(1, 5, 2, 16, dtype=torch.bfloat16)
    assert flash_attn_func(q, q, q, backend="hopper").grad_fn is None
    with torch.no_grad():
        x = half(1, 5, 2, 16)
        assert flash_attn_func(x, x, x, backend="hopper").grad_fn is None


def test_compile_function_forward_and_backward(kernels):
    def step(q, k, v, sink):
        out, lse = flash_attn_func(
            q, k, v, causal=True, sink=sink, return_lse=True, backend="hopper"
        )
        return out.float().sum() + lse.sum()

    args = (half(2, 6, 4, 16), half(2, 6, 2, 16), half(2, 6, 2, 16), leaf(4))
    expected = torch.autograd.grad(step(*args), args)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*args), args), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_changing_lengths_does_not_recompile(kernels, requires_grad):
    counter = dynamo_testing.CompileCounter()

    def step(q, k, v, cu, longest):
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, backend="hopper")

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for longest in (9, 8, 11, 13):
        qkv = [half(16, heads, 16).requires_grad_(requires_grad) for heads in (4, 2, 2)]
        compiled(*qkv, offsets(16 - longest, longest), longest)
    assert counter.frame_count == 1


def test_checkpoint_full_and_selective(kernels):
    calls = []

    def block(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True, backend="hopper")

    def policy(ctx, op, *args, **kwargs):
        if not ctx.is_recompute and op == torch.ops.fa3_train.attn_fwd.default:
            calls.append(op)
        keep = op == torch.ops.fa3_train.attn_fwd.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    args = (half(1, 6, 4, 16), half(1, 6, 2, 16), half(1, 6, 2, 16))
    expected = torch.autograd.grad(block(*args).float().square().sum(), args)
    selective = {
        "context_fn": lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(policy)
    }
    for options in ({}, selective):
        out = checkpoint(block, *args, use_reentrant=False, **options)
        for a, b in zip(torch.autograd.grad(out.float().square().sum(), args), expected,
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)
    assert calls, "the policy never saw the op"


def test_opcheck(kernels):
    """Schema, fake tensors and AOT dispatch agree with the implementation."""
    q, k, v = (torch.randn(2, n, h, 16).bfloat16() for n, h in ((5, 4), (7, 2), (7, 2)))
    sink = torch.randn(4)
    mask = (5, 7, 0.25, True, -1, 0, 0.0)
    fwd = torch.ops.fa3_train.attn_fwd.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for s in (None, sink):
        args = (q, k, v, None, None, s, *mask)
        torch.library.opcheck(fwd, args, test_utils=tests)
        out, lse = fwd(*args)
        back = (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse), None, None, s)
        torch.library.opcheck(
            torch.ops.fa3_train.attn_bwd.default, (*back, *mask, False), test_utils=tests
        )
    cu = offsets(2, 3)
    q, k = torch.randn(5, 4, 16).half(), torch.randn(5, 2, 16).half()
    torch.library.opcheck(
        fwd, (q, k, k, cu, cu, None, 3, 3, 0.25, False, -1, -1, 0.0), test_utils=tests
    )


def test_fake_refuses_what_the_kernels_refuse(kernels):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="q: head_dim must be a multiple of 8"):
        q = torch.empty(1, 4, 2, 20, dtype=torch.bfloat16)
        torch.ops.fa3_train.attn_fwd(q, q, q, None, None, None, 4, 4, 1.0, False, -1, -1, 0.0)


# --- rings ---


@pytest.mark.parametrize("packed", [False, True])
def test_ring_of_two_key_blocks_is_the_whole(packed):
    """attn_fwd block by block, combined by lse; attn_bwd_accumulate block by block, added up."""
    sink = torch.randn(4)
    shape_q, shape_k = ((6, 4, 8), (8, 2, 8)) if packed else ((1, 6, 4, 8), (1, 8, 2, 8))
    q, k, v = torch.randn(shape_q), torch.randn(shape_k), torch.randn(shape_k)
    dout = torch.randn(shape_q)
    truth, lse_truth, expected = reference.attention_gradients(
        dout, q, k, v, sink=sink,
        **({"cu_seqlens_q": offsets(6), "cu_seqlens_k": offsets(8)} if packed else {}),
    )  # fmt: skip
    token = 0 if packed else 1
    blocks = [(k.narrow(token, a, n), v.narrow(token, a, n)) for a, n in ((0, 3), (3, 5))]

    def lengths(n):
        if not packed:
            return {}
        return {
            "cu_seqlens_q": offsets(6), "cu_seqlens_k": offsets(n),
            "max_seqlen_q": 6, "max_seqlen_k": n,
        }  # fmt: skip

    parts = [
        attn_fwd(q, kb, vb, sink=sink if i == 0 else None, **lengths(kb.shape[token]))
        for i, (kb, vb) in enumerate(blocks)
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [torch.exp(part[1] - lse).transpose(-1, -2)[..., None] for part in parts]
    out = sum(w * part[0] for w, part in zip(weights, parts, strict=True))
    numerics.assert_as_good(out, truth, what="same")
    numerics.assert_as_good(lse, lse_truth, what="same")

    dq, dsink = torch.ones_like(q), torch.ones(4)
    dk, dv = torch.ones_like(k), torch.ones_like(v)
    start = 0
    for i, (kb, vb) in enumerate(blocks):
        n = kb.shape[token]
        extra = {"sink": sink, "dsink": dsink} if i == 0 else {}
        attn_bwd_accumulate(
            dout, q, kb, vb, out, lse, dq, dk.narrow(token, start, n), dv.narrow(token, start, n),
            **extra, **lengths(n),
        )  # fmt: skip
        start += n
    for name, a, b in zip(("dq", "dk", "dv", "dsink"), (dq, dk, dv, dsink), expected, strict=True):
        numerics.assert_as_good(a, b + 1, what="same", name=name)


# --- small rules ---


@pytest.mark.parametrize(
    ("lengths", "sides", "expected"),
    [
        ((8, 8), (7, -1), (-1, -1)),
        ((8, 8), (6, 0), (6, 0)),
        ((8, 4), (3, 7), (-1, -1)),
        ((1, 9), (-1, 0), (-1, -1)),  # one query under a causal mask sees every key
        ((8, 8), (-1, 6), (-1, 6)),
    ],
)
def test_sides_that_reach_everything_are_dropped(lengths, sides, expected):
    sq, sk = lengths
    shape = attention.checks.attention_shape(
        torch.empty(1, sq, 1, 8), torch.empty(1, sk, 1, 8), torch.empty(1, sk, 1, 8)
    )
    assert attention._tighten(shape, *sides) == expected
    before, after = (reference.visible(sq, sk, False, s) for s in (sides, expected))
    assert torch.equal(before, after)


def test_strided_views_for_the_kernels():
    x = torch.zeros(2, 6, 4, 16, dtype=torch.bfloat16)
    t = hopper.strided(x[:, ::2, 1:3])
    assert (t.ptr, t.stride_batch, t.stride_token, t.stride_head) == (
        x.data_ptr() + 2 * 16, 6 * 4 * 16, 2 * 4 * 16, 16,
    )  # fmt: skip
    one = torch.zeros(16, dtype=torch.bfloat16).as_strided((1, 1, 1, 16), (3, 5, 7, 1))
    t = hopper.strided(one)
    assert (t.stride_batch, t.stride_token, t.stride_head) == (16, 16, 16)
    t = hopper.strided(torch.zeros(6, 4, 16))
    assert (t.stride_batch, t.stride_token, t.stride_head) == (0, 64, 16)


def test_host_offsets_are_remembered_until_written():
    cu = offsets(3, 4)
    assert sdpa.host_offsets(cu) == [0, 3, 7]
    cu[1] = 2
    assert sdpa.host_offsets(cu) == [0, 2, 7]


def test_default_scale():
    q = torch.randn(1, 3, 1, 16)
    a = flash_attn_func(q, q, q)
    b = flash_attn_func(q, q, q, 1 / math.sqrt(16))
    assert torch.equal(a, b)
    assert not torch.allclose(a, flash_attn_func(q, q, q, 1.0))
