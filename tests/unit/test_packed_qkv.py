"""Attention on the QKV product: the plumbing, with the reference behind the op names.

What the kernels make of the same calls is in tests/gpu/test_model_gpu.py.
"""

from __future__ import annotations

import pytest
import torch

from fa3_train import reference, reference_fp8
from fa3_train.modules import FlashAttention, TransformerLayer
from fa3_train.numerics import assert_as_good
from fa3_train.ops import packed_qkv
from fa3_train.ops.prep import ROPE
from fa3_train.rotary import apply_rope


def _rotate(qkv, heads, cos, sin, position_ids, cu_seqlens, inverse):
    turned = qkv[..., :heads, :]
    if position_ids is None and cu_seqlens is not None:
        from fa3_train.modules.rope import document_positions

        position_ids = document_positions(cu_seqlens, qkv.shape[0])
    turned.copy_(apply_rope(turned, cos, -sin if inverse else sin, position_ids=position_ids))


def _forward(q, k, v, cu_q, cu_k, sink, max_q, max_k, scale, causal, left, right, softcap, *_):
    out, lse = reference.attention(
        q, k, v, softmax_scale=scale, window_size=(left, 0 if causal else right), softcap=softcap,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
    )  # fmt: skip
    return out.to(q.dtype), lse.float()


def _backward(
    dout, qkv, heads, kv_heads, out, lse, cu, longest, scale, causal, left, right, softcap, _
):
    grads = reference.attention_backward(
        dout, *packed_qkv.split(qkv, heads, kv_heads), out, lse, softmax_scale=scale,
        window_size=(left, 0 if causal else right), softcap=softcap, cu_seqlens_q=cu,
        cu_seqlens_k=cu,
    )  # fmt: skip
    return torch.cat([g.to(qkv.dtype) for g in grads[:3]], dim=-2)


def _prep(xs, stages, cos, sin, signs, positions, cu, *_):
    pairs = []
    for x, stage in zip(xs, stages, strict=True):
        turns = (cos, sin, signs) if stage & ROPE else (None, None, None)
        pairs.append(
            reference_fp8.rope_hadamard_quantize(
                x, *turns, cu_seqlens=cu, position_ids=positions if stage & ROPE else None
            )
            if stage & ROPE
            else reference_fp8.quantize_blocks(x.float(), cu_seqlens=cu)
        )
    return [c for c, _ in pairs] + [d.contiguous() for _, d in pairs]


def _fp8_forward(
    q, k, v, sq, sk, sv, cu_q, cu_k, max_q, max_k, scale, causal, left, right, two_level, kind, *_
):
    out, lse = reference_fp8.attention_fp8(
        q, k, v, sq, sk, sv, softmax_scale=scale, window_size=(left, 0 if causal else right),
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, two_level=two_level,
    )  # fmt: skip
    return out.to(kind), lse.float()


@pytest.fixture(scope="module")
def _on_cpu():
    library = torch.library.Library("fa3_train", "IMPL")
    library.impl("attn_fwd", _forward, "CPU")
    library.impl("rotate_packed", _rotate, "CPU")
    library.impl("attn_bwd_packed", _backward, "CPU")
    library.impl("prep", _prep, "CPU")
    library.impl("attn_fp8_fwd", _fp8_forward, "CPU")
    yield
    library._destroy()


@pytest.fixture
def product(_on_cpu, monkeypatch):
    """Layers send the product, and the test can count how often."""
    calls = []

    def serves(core, qkv, kv_heads):
        calls.append(tuple(qkv.shape))
        return True

    monkeypatch.setattr(FlashAttention, "serves_product", serves)
    return calls


def _layer(**options):
    torch.manual_seed(3)
    layer = TransformerLayer(
        48, 40, num_heads=6, num_kv_heads=2, head_dim=16, max_seq_len=64, backend="reference",
        **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return layer


def _gradients(layer, x, extra):
    x = x.clone().requires_grad_()
    out = layer(x, **extra)
    up = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * up).sum(), [x, *layer.parameters()])]


CU = torch.tensor([0, 1, 38, 38, 50], dtype=torch.int32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("options", [{}, {"window_size": 7}, {"causal": False}], ids=str)
def test_product_and_views_agree(product, monkeypatch, packed, policy, options):
    x = torch.randn(*((50,) if packed else (2, 25)), 48)
    extra = {"cu_seqlens": CU, "max_seqlen": 37} if packed else {}
    by_product = _gradients(_layer(activation_checkpointing=policy, **options), x, extra)
    assert product
    monkeypatch.setattr(FlashAttention, "serves_product", lambda *_: False)
    by_views = _gradients(_layer(**options), x, extra)
    monkeypatch.setattr(FlashAttention, "serves_product", lambda *_: False)
    truth = _gradients(_layer(**options).double(), x.double(), extra)
    for got, other, exact in zip(by_product, by_views, truth, strict=True):
        assert_as_good(got, exact, other, "accum")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_fp8_product_and_views_agree(product, monkeypatch, packed, policy):
    """Same codes, so the same forward up to the order of sums; gradients at the 16-bit inputs."""

    def build(policy):
        torch.manual_seed(3)
        layer = TransformerLayer(
            48, 40, num_heads=4, num_kv_heads=2, head_dim=64, max_seq_len=64,
            backend="reference", precision="fp8", activation_checkpointing=policy,
        )  # fmt: skip
        return layer

    x = torch.randn(*((50,) if packed else (2, 25)), 48)
    extra = {"cu_seqlens": CU, "max_seqlen": 37} if packed else {}
    by_product = _gradients(build(policy), x, extra)
    assert product
    monkeypatch.setattr(FlashAttention, "serves_product", lambda *_: False)
    by_views = _gradients(build("none"), x, extra)
    for got, other in zip(by_product, by_views, strict=True):
        assert torch.allclose(got, other, rtol=1e-3, atol=1e-5)


def test_no_gradient_no_graph(product):
    layer = _layer()
    with torch.no_grad():
        assert not layer(torch.randn(1, 5, 48)).requires_grad
    assert product == [(1, 5, 10, 16)]


def test_qk_norm_keeps_the_views(product):
    _layer(qk_norm=True)(torch.randn(1, 5, 48))
    assert not product


def test_what_is_refused(_on_cpu):
    qkv = torch.randn(1, 5, 10, 16)
    with pytest.raises(ValueError, match="qkv: must hold 6 \\+ 2 x 4 heads"):
        packed_qkv.packed_attention(qkv, 6, 4)
    with pytest.raises(ValueError, match="softcap: must be 0 with fp8"):
        packed_qkv.packed_attention(qkv, 6, 2, fp8=True, softcap=2.0)
    with pytest.raises(ValueError, match="kv_heads must be given"):
        FlashAttention(16)(qkv)


def test_second_derivative_is_refused(_on_cpu):
    qkv = torch.randn(1, 5, 10, 16, requires_grad=True)
    out = packed_qkv.packed_attention(qkv * 1.0, 6, 2)
    (grad,) = torch.autograd.grad((out**2).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_on_the_cpu_nothing_is_consumed():
    core = FlashAttention(16, backend="auto")
    assert not core.serves_product(torch.randn(1, 5, 10, 16, dtype=torch.bfloat16), 2)
