"""The ops on the GPU: what surrounds the kernels. Their numbers are judged in test_attn_*.py."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo import testing as dynamo_testing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from fa3_train import flash_attn_fp8_varlen_func, numerics, reference, reference_fp8
from fa3_train.ops import attention, backends, hopper
from fa3_train.ops.attention import (
    attn_bwd_accumulate,
    attn_fwd,
    flash_attn_func,
    flash_attn_varlen_func,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def leaf(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def inputs(packed=False):
    lead = (300,) if packed else (2, 150)
    return leaf(*lead, 4, 64), leaf(*lead, 2, 64), leaf(*lead, 2, 64)


def offsets(*lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


def judge(results, truths, baselines, names):
    for a, t, b, name in zip(results, truths, baselines, names, strict=True):
        numerics.assert_as_good(a, t, b, "grad" if name.startswith("d") else "out", name)


@pytest.mark.parametrize("packed", [False, True])
def test_forward_backward_and_lse_gradient(packed):
    q, k, v = inputs(packed)
    cu = offsets(100, 0, 199, 1)
    kw = {"cu_seqlens_q": cu, "cu_seqlens_k": cu} if packed else {}
    if packed:
        out, lse = flash_attn_varlen_func(
            q, k, v, cu, cu, 199, 199, causal=True, return_lse=True, backend="hopper"
        )
    else:
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True, backend="hopper")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    options = {"dlse": dlse, "causal": True, **kw}
    truth = reference.attention_gradients(dout, q, k, v, **options)
    base = reference.attention_gradients(dout, q, k, v, emulated=True, **options)
    judge((out, *grads), (truth[0], *truth[2][:3]), (base[0], *base[2][:3]),
          ("out", "dq", "dk", "dv"))  # fmt: skip
    numerics.assert_as_good(lse, truth[1], base[1], "lse")


def test_auto_is_hopper_here(caplog):
    backends._choose.cache_clear()
    attention._requests.clear()
    q, k, v = inputs()
    with caplog.at_level("INFO", logger="fa3_train.backend"):
        a = flash_attn_func(q, k, v)
    assert "attention backend 'hopper' for cuda:0" in caplog.text
    assert torch.equal(a, flash_attn_func(q, k, v, backend="hopper"))


def test_sdpa_and_hopper_agree():
    q, k, v = inputs(packed=True)
    cu = offsets(100, 0, 199, 1)
    args = (q, k, v, cu, cu, 199, 199)
    for options in ({"causal": True}, {}, {"window_size": (30, 0)}):
        a = flash_attn_varlen_func(*args, **options, backend="hopper")
        b = flash_attn_varlen_func(*args, **options, backend="sdpa")
        assert numerics.relative_rms_error(a, b) < numerics.AGREEMENT
        pairs = zip(*(torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (a, b)),
                    strict=True)  # fmt: skip
        for x, y in pairs:
            assert numerics.relative_rms_error(x, y) < numerics.AGREEMENT


def test_opcheck():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    q, k, v = (x.detach() for x in inputs())
    mask = (150, 150, 0.125, True, -1, 0, 0.0)
    fwd = torch.ops.fa3_train.attn_fwd.default
    torch.library.opcheck(fwd, (q, k, v, None, None, None, *mask), test_utils=tests)
    out, lse = fwd(q, k, v, None, None, None, *mask)
    back = (torch.randn_like(out), q, k, v, out, lse, None, None, None, None)
    # dQ is summed in any order without deterministic=True; opcheck compares runs bit by bit.
    torch.library.opcheck(
        torch.ops.fa3_train.attn_bwd.default, (*back, *mask, True), test_utils=tests
    )


def test_nothing_synchronises():
    q, k, v = inputs(packed=True)
    cu = offsets(150, 150)
    flash_attn_varlen_func(q, k, v, cu, cu, 150, 150, backend="hopper").sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_varlen_func(q, k, v, cu, cu, 150, 150, backend="hopper").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream():
    q, k, v = (x.detach() for x in inputs())
    expected = flash_attn_func(q, k, v, backend="hopper")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on the wrong stream would read q too early
        late = q.clone()
        out = flash_attn_func(late, k, v, backend="hopper")
    stream.synchronize()
    assert torch.equal(out, expected)


def test_compile_without_graph_break():
    def step(q, k, v):
        out, lse = flash_attn_func(q * 1.0, k, v, causal=True, return_lse=True, deterministic=True,
                                   backend="hopper")  # fmt: skip
        return out, lse

    args = inputs()
    out, lse = step(*args)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), args, (dout, dlse))
    got_out, got_lse = torch.compile(step, fullgraph=True)(*args)
    assert torch.equal(got_out, out) and torch.equal(got_lse, lse)
    for a, b in zip(torch.autograd.grad((got_out, got_lse), args, (dout, dlse)), expected,
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_compile_packed_dynamic_lengths():
    counter = dynamo_testing.CompileCounterWithBackend("aot_eager")

    def step(q, k, v, cu, longest):
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True,
                                      deterministic=True)  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    args = inputs(packed=True)
    for lengths in ((200, 100), (160, 140), (20, 280), (90, 210)):
        cu, longest = offsets(*lengths), max(lengths)
        a, b = compiled(*args, cu, longest), step(*args, cu, longest)
        assert torch.equal(a, b)
        grads = [torch.autograd.grad(x.float().square().sum(), args) for x in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    # Older torch takes an int for a constant until it changes once: never a compilation a length.
    assert counter.frame_count <= 2


def test_compile_fp8_packed_without_graph_break():
    args = [x.detach().requires_grad_() for x in inputs(packed=True)]
    cu, signs = offsets(200, 100), reference_fp8.random_signs(64).cuda()
    angle = torch.arange(200, device="cuda")[:, None] / 10.0 ** torch.arange(32, device="cuda")
    cos, sin = angle.cos(), angle.sin()

    def step(q, k, v):
        return flash_attn_fp8_varlen_func(
            q, k, v, cu, cu, 200, 200, causal=True, cos=cos, sin=sin, signs=signs, backend="hopper"
        )

    expected = step(*args)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(x, args, dout) for x in (out, expected)), strict=True)
    for a, b in pairs:  # dQ is summed in any order
        assert numerics.relative_rms_error(a, b) < numerics.AGREEMENT


def test_cuda_graph_of_forward_and_backward():
    q, k, v = (x.detach().requires_grad_() for x in inputs())
    dout = torch.randn(2, 150, 4, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        out = flash_attn_func(q, k, v, causal=True, deterministic=True, backend="hopper")
        return (out, *torch.autograd.grad(out, (q, k, v), dout))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v, dout):
            x.normal_()
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_expanded_and_transposed_gradients():
    q, k, v = inputs()
    out = flash_attn_func(q, k, v, deterministic=True, backend="hopper")
    expanded = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))
    turned = torch.randn(2, 64, 4, 150, device="cuda").bfloat16().transpose(1, 3)
    a = torch.autograd.grad(out, (q, k, v), turned, retain_graph=True)
    b = torch.autograd.grad(out, (q, k, v), turned.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_selective_checkpoint_keeps_the_op():
    seen = []

    def policy(ctx, op, *args, **kwargs):
        if op == torch.ops.fa3_train.attn_fwd.default:
            seen.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True, deterministic=True, backend="hopper")

    args = inputs()
    expected = torch.autograd.grad(block(*args).float().square().sum(), args)
    out = checkpoint(
        block, *args, use_reentrant=False,
        context_fn=lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    for a, b in zip(torch.autograd.grad(out.float().square().sum(), args), expected, strict=True):
        assert torch.equal(a, b)
    assert seen


def test_ring_of_two_key_blocks():
    q, k, v = (x.detach() for x in inputs())
    dout = torch.randn_like(q)
    blocks = [(k[:, a:b], v[:, a:b]) for a, b in ((0, 70), (70, 150))]
    parts = [attn_fwd(q, kb, vb, backend="hopper") for kb, vb in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(
        torch.exp(part[1] - lse).transpose(-1, -2)[..., None] * part[0] for part in parts
    ).bfloat16()
    dq, dk, dv = (torch.ones_like(x, dtype=torch.float32) for x in (q, k, v))
    for i, (kb, vb) in enumerate(blocks):
        at = slice(0, 70) if i == 0 else slice(70, 150)
        attn_bwd_accumulate(dout, q, kb, vb, out, lse, dq, dk[:, at], dv[:, at], backend="hopper")
    truth = reference.attention_gradients(dout, q, k, v)
    base = reference.attention_gradients(dout, q, k, v, emulated=True)
    judge((out, dq - 1, dk - 1, dv - 1), (truth[0], *truth[2][:3]), (base[0], *base[2][:3]),
          ("out", "dq", "dk", "dv"))  # fmt: skip


def test_known_plans_serve_other_tensors():
    """Second calls take the short way: other addresses, misaligned ones, other strides."""
    hopper._forwards.clear()
    hopper._backwards.clear()
    whole = torch.randn(2, 151, 8, 64, device="cuda").bfloat16()
    results = []
    for start in (0, 1):
        q, k, v = (whole[:, start : start + 150, a:b] for a, b in ((0, 4), (4, 6), (6, 8)))
        for copy in (False, True):
            leaves = [(x.clone() if copy else x).detach().requires_grad_() for x in (q, k, v)]
            out = flash_attn_func(*leaves, causal=True, deterministic=True, backend="hopper")
            grads = torch.autograd.grad(out.float().square().sum(), leaves)
            results.append((out, *grads))
    for i in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(results[i], results[i + 1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    assert len(hopper._forwards) == 2 and len(hopper._backwards) == 2
    buffer = torch.zeros(2 * 150 * 8 * 64 + 1, device="cuda", dtype=torch.bfloat16)
    flash_attn_func(*(buffer[:-1].view(2, 150, 8, 64),) * 3, backend="hopper")
    with pytest.raises(ValueError, match="q: the address must be a multiple of 16 bytes"):
        flash_attn_func(*(buffer[1:].view(2, 150, 8, 64),) * 3, backend="hopper")


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_empty_sides(lengths):
    sq, sk = lengths
    q, k, v = leaf(2, sq, 4, 64), leaf(2, sk, 2, 64), leaf(2, sk, 2, 64)
    out, lse = flash_attn_func(q, k, v, return_lse=True, backend="hopper")
    assert out.shape == q.shape and not out.any() and lse.isneginf().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not any(g.any() for g in grads)


def test_bad_layout_is_refused_before_a_launch():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="k: the last dimension must be contiguous"):
        flash_attn_func(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, backend="hopper")
    with pytest.raises(backends.BackendError, match="q: dtype must be .* got torch.float32"):
        flash_attn_func(q.float(), k.float(), v.float(), backend="hopper")
