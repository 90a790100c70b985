"""Preprocessing without a GPU: rules, tracing, gradients, the module; RoPE of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa3_train
from fa3_train import reference_fp8 as fp8
from fa3_train.checks import ArgumentError
from fa3_train.modules.preprocess import RopeHadamardQuantize
from fa3_train.ops import preprocess
from fa3_train.ops.backends import BackendError
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE
from fa3_train.rotary import apply_rope, rope_frequencies, rope_tables

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


# ---- frequencies


@pytest.mark.parametrize("factor,context", [(8.0, 8192), (32.0, 8192), (4.0, 512)])
def test_llama31_frequencies_are_those_of_transformers(factor, context):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LLAMA31, "factor": factor, "original_max_position_embeddings": context}
    config = transformers.LlamaConfig(
        hidden_size=1024, num_attention_heads=8, head_dim=128, rope_theta=500_000.0,
        rope_scaling={**scaling}, max_position_embeddings=131072,
    )  # fmt: skip
    if hasattr(config, "rope_parameters"):  # transformers 5 keeps theta beside the scaling
        config.rope_parameters = {**scaling, "rope_theta": 500_000.0}
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = rope_frequencies(128, theta=500_000.0, scaling=scaling)
    assert attention_factor == 1.0
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
    assert not torch.equal(ours, rope_frequencies(128, theta=500_000.0))


def test_llama31_rule_by_hand():
    plain = rope_frequencies(128, theta=500_000.0)
    scaled = rope_frequencies(128, theta=500_000.0, scaling=LLAMA31)
    for f, g in zip(plain.tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected = f
        elif wavelength > 8192:
            expected = f / 8
        else:
            s = (8192 / wavelength - 1) / 3
            expected = (1 - s) * f / 8 + s * f
        assert g == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rope_type": "yarn"}, "rope_type must be 'llama3', got 'yarn'"),
        ({"factor": 0}, "factor must be positive, got 0"),
        ({"low_freq_factor": 4.0}, "0 < low_freq_factor < high_freq_factor, got 4.0 and 4.0"),
    ],
)
def test_bad_scaling_is_named(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        rope_frequencies(64, scaling={**LLAMA31, **change})
    with pytest.raises(ValueError, match="missing \\['factor'\\]"):
        rope_frequencies(64, scaling={k: v for k, v in LLAMA31.items() if k != "factor"})
    with pytest.raises(ValueError, match="head_dim must be even for RoPE, got 63"):
        rope_frequencies(63)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 16])
def test_plain_rotation_is_the_reference(interleaved, rotary_dim):
    x = torch.randn(2, 7, 3, 64, dtype=torch.float64)
    cos, sin = rope_tables(rotary_dim, 20, theta=50.0)
    ids = torch.randint(0, 20, (2, 7))
    ours = apply_rope(x, cos, sin, position_ids=ids, interleaved=interleaved)
    expected = fp8.rotate(x, cos, sin, position_ids=ids, interleaved=interleaved)
    assert torch.allclose(ours, expected, atol=1e-7)
    with pytest.raises(ValueError, match="a row for each of the 7 tokens, got 3"):
        apply_rope(x, cos[:3], sin[:3])


# ---- public functions on the CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rope_rounds_once_and_is_differentiable(dtype):
    cos, sin = rope_tables(80, 30)
    qkv = torch.randn(2, 30, 6, 80, dtype=torch.float64).to(dtype).requires_grad_()
    q, k = qkv.split([4, 2], dim=-2)
    q1, k1 = preprocess.rope(q, k, cos, sin)
    for ours, x in ((q1, q), (k1, k)):
        assert ours.dtype == dtype
        exact = fp8.rotate(x.double(), cos, sin)
        assert ((ours.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all()
    g = torch.randn_like(q1)
    (grad,) = torch.autograd.grad(q1, qkv, g)
    exact = fp8.rotate(g.double(), cos, sin, inverse=True)
    assert torch.allclose(grad[..., :4, :].double(), exact, rtol=2e-2, atol=2e-2)
    assert not grad[..., 4:, :].any()


def test_rope_in_double_precision_passes_gradcheck():
    cos, sin = rope_tables(8, 5)
    q, k = (torch.randn(5, h, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    ids = torch.tensor([4, 0, 2, 2, 1])
    assert torch.autograd.gradcheck(
        lambda a, b: preprocess.rope(a, b, cos, sin, position_ids=ids), (q, k), fast_mode=True
    )


def test_every_stage_can_be_off():
    x = torch.randn(1, 130, 2, 64).bfloat16()
    cos, sin = rope_tables(64, 130)
    signs = fp8.random_signs(64)
    whole = fa3_train.rope_hadamard_quantize
    for use_rope in (False, True):
        for use_signs in (False, True):
            tables = (cos, sin) if use_rope else (None, None)
            s = signs if use_signs else None
            wide = fp8.rope_hadamard(x, *tables, s)
            codes, descale = whole(x, *tables, s)
            expected, scale = fp8.quantize_blocks(wide)
            assert torch.equal(codes.float(), expected.float()) and torch.equal(descale, scale)
            if use_rope or use_signs:
                stopped = whole(x, *tables, s, quantize=False)
                assert torch.equal(stopped, wide.bfloat16())
    plain = whole(x, hadamard=True, quantize=False)
    assert torch.equal(plain, fp8.hadamard_transform(x.float()).bfloat16())
    off = whole(x, signs=signs, hadamard=False)
    assert torch.equal(off[1], whole(x)[1])


def test_straight_through_gradient():
    x = torch.randn(1, 200, 2, 64).bfloat16().requires_grad_()
    cos, sin = rope_tables(64, 200)
    signs = fp8.random_signs(64)
    y = fa3_train.rope_hadamard_quantize(x, cos, sin, signs, dequantize=True)
    codes, descale = fa3_train.rope_hadamard_quantize(x, cos, sin, signs)
    assert not codes.requires_grad and not descale.requires_grad
    assert torch.equal(y.float(), fp8.dequantize_blocks(codes, descale))
    assert torch.equal(y, preprocess.dequantize([codes], [descale])[0])
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    expected = preprocess.gradient([g], cos, sin, signs)[0]
    assert torch.equal(grad, expected)
    assert torch.allclose(
        expected.double(), fp8.rope_hadamard_gradient(g, cos, sin, signs, dtype=torch.float64),
        atol=0.02,
    )  # fmt: skip


def test_self_attention_inputs_with_another_value_dim():
    q, k, v = torch.randn(7, 4, 192), torch.randn(7, 2, 192), torch.randn(7, 2, 128)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    q8, k8, v8, sq, sk, sv = preprocess.preprocess_qkv(
        q, k, v, *rope_tables(64, 9), fp8.random_signs(192), cu_seqlens=cu
    )
    assert q8.shape == q.shape and v8.shape == v.shape
    assert sq.shape == (4, 2) and sk.shape == sv.shape == (2, 2)
    assert torch.equal(sv, fp8.quantize_blocks(v.float(), 128, cu)[1])


# ---- bad input


def test_messages_name_argument_rule_and_value():
    x = torch.randn(2, 9, 1, 64).bfloat16()
    cos, sin = rope_tables(64, 20)
    call = fa3_train.rope_hadamard_quantize
    for message, args, kw in (
        ("sin: cos and sin must be given together, got None", (x, cos), {}),
        (r"cos: must have 1 to 32 columns \(head_dim / 2\), got 40", (x, *rope_tables(80, 20)), {}),
        ("cos: must have a row for each of the 9 tokens, got 5", (x, cos[:5], sin[:5]), {}),
        ("cos: dtype must be torch.float32", (x, cos.half(), sin.half()), {}),
        (r"signs: must be \(64,\), one .* got \(63,\)", (x, None, None, torch.ones(63)), {}),
        (r"position_ids: must be \(2, 9\), got \(2, 8\)", (x, cos, sin),
         {"position_ids": torch.zeros(2, 8, dtype=torch.int32)}),
        ("position_ids: dtype must be torch.int32 or torch.int64", (x, cos, sin),
         {"position_ids": torch.zeros(2, 9)}),
        (r"block_size: must be one of \(64, 128\), got 32", (x,), {"block_size": 32}),
        (r"xs\[0\]: head_dim must be one of .* got 40", (torch.randn(1, 2, 1, 40),), {}),
        (r"xs\[0\]: must be \(total, heads, head_dim\)", (x,),
         {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}),
        ("stages.0.: must be a mask", (x,), {"quantize": False}),
        ("dequantize: needs quantize=True", (x,), {"quantize": False, "dequantize": True}),
        ("backend: must be 'auto' or one of", (x,), {"backend": "fast"}),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            call(*args, **kw)


def test_hopper_by_name_without_a_hopper_is_an_error():
    x = torch.randn(1, 4, 1, 64).bfloat16()
    with pytest.raises(BackendError, match="device must be a Hopper GPU, got cpu.*reference"):
        fa3_train.rope_hadamard_quantize(x, backend="hopper")


# ---- tracing


@pytest.mark.parametrize("packed", [False, True])
def test_fakes_know_shapes_and_dtypes(packed):
    with FakeTensorMode():
        kw = {"dtype": torch.bfloat16, "device": "cuda"}
        lead = (700,) if packed else (2, 300)
        q, k, v = (torch.empty(*lead, h, 128, **kw) for h in (8, 2, 2))
        cu = torch.empty(4, dtype=torch.int32, device="cuda") if packed else None
        cos, sin = (torch.empty(700, 64, device="cuda") for _ in range(2))
        signs = torch.empty(128, device="cuda")
        both = ROPE | HADAMARD | QUANTIZE
        outs = torch.ops.fa3_train.prep(
            [q, k, v], [both, both, QUANTIZE], cos, sin, signs, None, cu, False, False
        )
        shapes = [tuple(t.shape) for t in outs]
        blocks = (700 // 128 + 3,) if packed else (3,)
        outer = () if packed else (2,)
        assert shapes[:3] == [(*lead, h, 128) for h in (8, 2, 2)]
        assert shapes[3:] == [(*outer, h, *blocks) for h in (8, 2, 2)]
        assert [t.dtype for t in outs] == [torch.float8_e4m3fn] * 3 + [torch.float32] * 3
        (g,) = torch.ops.fa3_train.prep(
            [q.float()], [both ^ QUANTIZE], cos, sin, signs, None, cu, False, True, 128,
            torch.bfloat16,
        )  # fmt: skip
        assert g.shape == q.shape and g.dtype == torch.bfloat16
        (wide,) = torch.ops.fa3_train.dequantize([outs[0]], [outs[3]], cu, 128, torch.float16)
        assert wide.shape == q.shape and wide.dtype == torch.float16
        with pytest.raises(ArgumentError, match="descales.0.: must be"):
            torch.ops.fa3_train.dequantize([outs[0]], [outs[4]], cu, 128, torch.float16)


def test_autograd_asks_the_op_for_the_inverse(monkeypatch):
    """The Function's plumbing, with the reference in the op's place: first and second order."""
    calls = []

    def prep(xs, stages, cos, sin, signs, ids, cu, interleaved, inverse, *rest):
        calls.append((list(stages), inverse))
        function = fp8.rope_hadamard_gradient if inverse else fp8.rope_hadamard
        kw = {"interleaved": interleaved, "position_ids": ids, "cu_seqlens": cu}
        return [
            function(x, cos, sin, signs, hadamard=bool(s & HADAMARD), dtype=torch.float64, **kw)
            for x, s in zip(xs, stages, strict=True)
        ]

    class Ops:
        class fa3_train:  # noqa: N801
            pass

    Ops.fa3_train.prep = staticmethod(prep)
    monkeypatch.setattr(preprocess.torch, "ops", Ops)
    cos, sin = rope_tables(16, 6)
    signs = fp8.random_signs(64)
    x, y = (torch.randn(6, h, 64, dtype=torch.float64, requires_grad=True) for h in (2, 1))

    def function(a, b):
        return preprocess._Transform.apply(
            [ROPE | HADAMARD, ROPE], cos, sin, signs, None, None, True, False, a, b
        )

    try:
        assert torch.autograd.gradcheck(function, (x, y), fast_mode=True, atol=1e-4)
        assert torch.autograd.gradgradcheck(function, (x, y), fast_mode=True, atol=1e-4)
        calls.clear()
        function(x, y)[1].sum().backward()  # only the second output is used
        assert calls[-1] == ([ROPE], True) and x.grad is None and y.grad is not None
    finally:
        monkeypatch.undo()


def test_rope_traces_in_one_graph(monkeypatch):
    """Forward and backward under dynamo, the reference in the kernel's place."""

    def prep(xs, stages, cos, sin, signs, ids, cu, interleaved, inverse, *rest):
        kw = {"interleaved": interleaved, "position_ids": ids, "cu_seqlens": cu}
        return [fp8.rotate(x.float(), cos, sin, inverse=inverse, **kw).to(x.dtype) for x in xs]

    monkeypatch.setattr(preprocess, "_hopper_problem", lambda *request: None)
    preprocess._choose.cache_clear()
    cos, sin = rope_tables(16, 6)
    q, k = (torch.randn(6, h, 16, requires_grad=True) for h in (2, 1))

    def loss(a, b):
        x, y = preprocess.rope(a, b, cos, sin)
        return (x * y).sum() + y.square().sum()

    try:
        with torch.library._scoped_library("fa3_train", "IMPL") as library:
            library.impl("prep", prep, "CPU")
            expected = torch.autograd.grad(loss(q, k), (q, k))
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            found = torch.autograd.grad(compiled(q, k), (q, k))
    finally:
        preprocess._choose.cache_clear()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- the module


def test_module_keeps_its_signs_in_the_state():
    a, b = RopeHadamardQuantize(128, seed=1), RopeHadamardQuantize(128, seed=2)
    x = torch.randn(1, 40, 2, 128).bfloat16()
    tables = rope_tables(128, 40)
    assert not torch.equal(a(x, *tables)[0].float(), b(x, *tables)[0].float())
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x, *tables)[0].float(), b(x, *tables)[0].float())
    a.bfloat16()  # +-1 survive the cast of a mixed-precision wrapper
    assert torch.equal(a(x, *tables)[0].float(), b(x, *tables)[0].float())
    assert torch.equal(a.signs.float(), fp8.random_signs(128, 1))


def test_module_trains_through_the_rounding():
    module = RopeHadamardQuantize(64, dequantize=True)
    x = torch.randn(1, 20, 1, 64, requires_grad=True)
    y = module(x, *rope_tables(64, 20))
    y.square().sum().backward()
    # the gradient of |y|^2 rotates back to about 2 x
    assert torch.allclose(x.grad, 2 * x, atol=0.4) and y.shape == x.shape


def test_module_refuses_what_no_kernel_serves():
    with pytest.raises(ValueError, match="head_dim: must be one of .* got 80"):
        RopeHadamardQuantize(80)
    with pytest.raises(ValueError, match="dequantize: needs quantize=True"):
        RopeHadamardQuantize(64, quantize=False, dequantize=True)
