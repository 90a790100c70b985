"""FP8 attention on the CPU: rules and messages, shapes under tracing, the reference backend."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa3_train
from fa3_train import numerics, reference, reference_fp8
from fa3_train.checks import ArgumentError
from fa3_train.ops import backends, fp8

F8, BF16 = torch.float8_e4m3fn, torch.bfloat16


def codes(*shape):
    return torch.zeros(*shape, dtype=torch.uint8).view(F8)


def call(q, k, v, scales, cu=None, dtype=BF16, lengths=(200, 333)):
    cu = (None, None) if cu is None else cu
    return torch.ops.fa3_train.attn_fp8_fwd(
        q, k, v, *scales, *cu, *lengths, 0.1, False, -1, -1, True, dtype
    )


def dense(batch=2, sq=200, sk=333, heads=4, groups=2, dim=64):
    tensors = (
        codes(batch, sq, heads, dim),
        codes(batch, sk, groups, dim),
        codes(batch, sk, groups, dim),
    )
    blocks = [(batch, heads, -(-sq // 128)), *[(batch, groups, -(-sk // 128))] * 2]
    return tensors, [torch.ones(*b) for b in blocks]


def test_tracing_gives_the_shapes() -> None:
    with FakeTensorMode():
        tensors, scales = dense()
        out, lse = call(*tensors, scales)
        assert out.shape == (2, 200, 4, 64) and out.dtype == BF16
        assert lse.shape == (2, 4, 200) and lse.dtype == torch.float32
        q, k = codes(777, 4, 64), codes(500, 2, 64)
        cu = [torch.zeros(4, dtype=torch.int32) for _ in range(2)]
        scales = [torch.ones(4, 777 // 128 + 3), *[torch.ones(2, 500 // 128 + 3)] * 2]
        out, lse = call(q, k, k, scales, cu, torch.float16)
        assert out.shape == (777, 4, 64) and out.dtype == torch.float16 and lse.shape == (4, 777)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s: s.__setitem__(0, s[0][..., :1]), r"q_descale: must be \(2, 4, 2\)"),
        (lambda t, s: s.__setitem__(1, s[1].double()), "k_descale: dtype must be torch.float32"),
        (
            lambda t, s: s.__setitem__(2, s[2].transpose(0, 1).contiguous().transpose(0, 1)),
            "v_descale: must be contiguous",
        ),
        (lambda t, s: t.__setitem__(0, t[0].to(BF16)), "q: dtype|k: dtype must be that of q"),
    ],
)
def test_broken_rules_name_the_argument(change, message) -> None:
    with FakeTensorMode():
        tensors, scales = dense(groups=2)
        tensors = list(tensors)
        change(tensors, scales)
        with pytest.raises(ArgumentError, match=message):
            call(*tensors, scales)


def test_the_quantizer_makes_what_the_op_takes() -> None:
    data = [reference_fp8.quantize_blocks(torch.randn(2, 300, h, 64)) for h in (4, 2, 2)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors, scales = zip(*[[mode.from_tensor(y) for y in x] for x in data], strict=True)
        assert call(*tensors, scales, lengths=(300, 300))[0].shape == (2, 300, 4, 64)


def test_head_dims() -> None:
    with FakeTensorMode():
        for dim, ok in ((16, True), (80, True), (256, True), (24, False), (272, False)):
            tensors, scales = dense(dim=dim)
            if ok:
                call(*tensors, scales)
            else:
                with pytest.raises(ArgumentError, match=f"head_dim must be a multiple .*got {dim}"):
                    call(*tensors, scales)


def test_values_are_checked_on_request(monkeypatch) -> None:
    x = torch.randn(1, 300, 2, 64)
    good, descale = reference_fp8.quantize_blocks(x)
    monkeypatch.setenv(fp8.CHECK_VARIABLE, "1")
    fp8.check_all_values(good, good, good, descale, descale, descale, None, None)
    for value in (float("nan"), float("inf"), -1.0):
        bad = descale.clone()
        bad[0, 1, 2] = value
        with pytest.raises(ArgumentError, match=r"k_descale: .* at \(0, 1, 2\)"):
            fp8.check_all_values(good, good, good, descale, bad, descale, None, None)
    broken = good.clone()
    broken.view(torch.uint8)[0, 5, 1, 3] = 0xFF
    with pytest.raises(ArgumentError, match=r"v: must hold no NaN, got NaN at \(0, 5, 1, 3\)"):
        fp8.check_all_values(good, good, broken, descale, descale, descale, None, None)
    monkeypatch.delenv(fp8.CHECK_VARIABLE)
    fp8.check_all_values(good, good, broken, descale, descale, descale, None, None)


def qkv(sq=130, sk=130, heads=2, groups=1, dim=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (1, sq, heads, dim), (1, sk, groups, dim), (1, sk, groups, dim)
    return [torch.randn(*s, generator=g).bfloat16().requires_grad_() for s in shapes]


def tables(length, dim=64):
    angle = torch.outer(torch.arange(float(length)), 1e4 ** (-torch.arange(dim // 2) / (dim // 2)))
    return angle.cos(), angle.sin()


def test_public_function_refuses_what_it_cannot_mean() -> None:
    q, k, v = qkv()
    cos, sin = tables(130)
    f = fa3_train.flash_attn_fp8_func
    with pytest.raises(backends.BackendError, match=r"backend='sdpa'.*'hopper', 'reference'"):
        f(q, k, v, backend="sdpa")
    with pytest.raises(ArgumentError, match="sin: must be given iff cos is"):
        f(q, k, v, cos=cos)
    with pytest.raises(ArgumentError, match="position_ids: needs cos and sin"):
        f(q, k, v, position_ids=torch.zeros(1, 130, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="k: with cos and sin, q and k must hold the same"):
        f(q[:, :7], k, v, cos=cos, sin=sin)
    with pytest.raises(ArgumentError, match=r"signs: must be \(64,\)"):
        f(q, k, v, signs=torch.ones(32))
    with pytest.raises(ArgumentError, match="softmax_scale: must be positive"):
        f(q, k, v, softmax_scale=-0.1)
    with pytest.raises(ArgumentError, match=r"gradient: must be one of \['inputs', 'codes'\]"):
        f(q, k, v, gradient="fp8")


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_attention_on_the_quantized_values(rope: bool, causal: bool) -> None:
    """gradient="codes": d out / d q is that at the dequantized q, turned back. What remains is the
    rounding of P in the forward (delta and lse) and bf16."""
    q, k, v = qkv()
    turn = dict(zip(("cos", "sin"), tables(130), strict=True)) if rope else {}
    signs = reference_fp8.random_signs(64)
    out = fa3_train.flash_attn_fp8_func(
        q, k, v, causal=causal, signs=signs, gradient="codes", **turn
    )
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(out, (q, k, v), dout)

    leaves = []
    for x, rotated in ((q, True), (k, True), (v, False)):
        y = x.detach().float()
        if rotated:
            y = reference_fp8.rope_hadamard(y, signs=signs, **turn)
        value = reference_fp8.dequantize_blocks(*reference_fp8.quantize_blocks(y))
        leaves.append(value.double().requires_grad_())
    exact, _ = reference.attention(*leaves, causal=causal)
    expected = list(torch.autograd.grad(exact, leaves, dout.double()))
    expected[:2] = [
        reference_fp8.rope_hadamard_gradient(g, signs=signs, dtype=torch.float64, **turn)
        for g in expected[:2]
    ]
    assert numerics.relative_rms_error(out, exact) < 0.04  # e4m3 probabilities
    for ours, true in zip(grads, expected, strict=True):
        assert numerics.relative_rms_error(ours, true) < 0.03


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_at_the_inputs_are_a_quarter_of_the_usual_error(rope, causal) -> None:
    """The default differentiates at the 16-bit inputs; the codes' gradients cannot get there."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, 768, h, 128, generator=g).bfloat16().requires_grad_() for h in (2, 1, 1)
    )
    cos, sin = tables(768, 128)
    turn = {"cos": cos, "sin": sin} if rope else {}
    dout = torch.randn(q.shape, generator=g).bfloat16()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    turned = [reference_fp8.rotate(x, cos, sin) if rope else x for x in wide[:2]]
    truth, _ = reference.attention(*turned, wide[2], causal=causal)
    expected = torch.autograd.grad(truth, wide, dout.double())
    errors = {}
    for gradient in ("inputs", "codes"):
        out = fa3_train.flash_attn_fp8_func(
            q, k, v, causal=causal, signs=reference_fp8.random_signs(128), gradient=gradient, **turn
        )
        assert numerics.relative_rms_error(out, truth) > 1e-2  # the forward is in FP8
        grads = torch.autograd.grad(out, (q, k, v), dout)
        errors[gradient] = [
            numerics.relative_rms_error(a, b) for a, b in zip(grads, expected, strict=True)
        ]
    bars = numerics.FP8_GRADIENTS.values()
    assert all(e <= bar for e, bar in zip(errors["inputs"], bars, strict=True)), errors
    assert all(e > bar for e, bar in zip(errors["codes"], bars, strict=True)), errors


@pytest.mark.parametrize("rope", [False, True])
def test_packed_gradients_are_those_of_each_sequence(rope) -> None:
    cu = torch.tensor([0, 130, 130, 200], dtype=torch.int32)
    q, k, v = (x[0].detach().requires_grad_() for x in qkv(200, 200))
    turn = dict(zip(("cos", "sin"), tables(200), strict=True)) if rope else {}
    kw = {"causal": True, "signs": reference_fp8.random_signs(64), **turn}
    dout = torch.randn(q.shape).bfloat16()
    out = fa3_train.flash_attn_fp8_varlen_func(q, k, v, cu, cu, 130, 130, **kw)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for rows in (slice(0, 130), slice(130, 200)):
        parts = [x[None, rows].detach().requires_grad_() for x in (q, k, v)]
        alone = fa3_train.flash_attn_fp8_func(*parts, **kw)
        for a, b in zip(grads, torch.autograd.grad(alone, parts, dout[None, rows]), strict=True):
            assert numerics.relative_rms_error(a[rows], b[0]) < 1e-6


def test_packed_is_each_sequence_alone() -> None:
    lengths = [70, 0, 200, 1]
    cu = torch.tensor([0, 70, 70, 270, 271], dtype=torch.int32)
    q, k, v = (x[0].detach() for x in qkv(271, 271))
    cos, sin = tables(271)
    signs = reference_fp8.random_signs(64)
    kw = {"causal": True, "cos": cos, "sin": sin, "signs": signs, "return_lse": True}
    out, lse = fa3_train.flash_attn_fp8_varlen_func(q, k, v, cu, cu, 200, 200, **kw)
    for b, length in enumerate(lengths):
        if not length:
            continue
        rows = slice(int(cu[b]), int(cu[b + 1]))
        one, one_lse = fa3_train.flash_attn_fp8_func(*(x[None, rows] for x in (q, k, v)), **kw)
        assert torch.equal(out[rows], one[0]) and torch.equal(lse[:, rows], one_lse[0])
