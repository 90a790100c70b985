"""F.scaled_dot_product_attention through sdpa_replacement(): same results, loud refusals."""

import types

import pytest
import torch
import torch.nn.functional as F

from fa3_train.integrations import policy
from fa3_train.integrations.sdpa import sdpa_replacement, supports


def _qkv(sq=11, sk=11, h=4, hkv=4, d=16, dv=16):
    torch.manual_seed(0)
    return (
        torch.randn(2, h, sq, d, requires_grad=True),
        torch.randn(2, hkv, sk, d, requires_grad=True),
        torch.randn(2, hkv, sk, dv, requires_grad=True),
    )


CASES = [
    ({}, {}),
    ({}, {"is_causal": True}),
    ({"sk": 17}, {}),
    ({"sk": 17}, {"is_causal": True}),  # torch's mask is top-left
    ({"sq": 17}, {"is_causal": True}),
    ({"sq": 17, "hkv": 1}, {"is_causal": True, "enable_gqa": True}),
    ({"sq": 1, "sk": 1}, {"is_causal": True}),
    ({"hkv": 2}, {"enable_gqa": True, "is_causal": True}),
    ({"d": 24, "dv": 8}, {"scale": 0.3}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_values_and_gradients_are_torchs(sizes, options, backend):
    q, k, v = _qkv(**sizes)
    want = F.scaled_dot_product_attention(q, k, v, **options)
    want_grads = torch.autograd.grad(want.square().sum(), (q, k, v))
    original = F.scaled_dot_product_attention
    with sdpa_replacement(backend=backend):
        assert F.scaled_dot_product_attention is not original
        got = F.scaled_dot_product_attention(q, k, v, **options)
    assert F.scaled_dot_product_attention is original
    grads = torch.autograd.grad(got.square().sum(), (q, k, v))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SHAPES = {
    "no heads": ((3, 7, 16), (3, 9, 16)),
    "matrices": ((7, 16), (9, 16)),
    "more batch dimensions": ((2, 3, 4, 7, 16), (2, 3, 4, 9, 16)),
    "batch broadcast": ((4, 7, 16), (3, 4, 9, 16)),
    "heads broadcast": ((2, 1, 7, 16), (1, 4, 9, 16)),
    "empty batch": ((0, 4, 7, 16), (0, 4, 9, 16)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_leading_dimensions(name, is_causal):
    torch.manual_seed(0)
    shape_q, shape_k = SHAPES[name]
    q, k, v = (torch.randn(s, requires_grad=True) for s in (shape_q, shape_k, shape_k))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    with sdpa_replacement(backend="reference"):
        got = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(want)
    grads = (torch.autograd.grad(x, (q, k, v), dout) for x in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_real_module_runs_on_it():
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    want, _ = layer(x, x, x, need_weights=False, is_causal=True, attn_mask=mask)
    with sdpa_replacement():
        got, _ = layer(x, x, x, need_weights=False, is_causal=True, attn_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {"attn_mask": torch.ones(11, 11, dtype=torch.bool)}, r"attn_mask.*\(11, 11\)"),
        ({}, {"dropout_p": 0.2}, "dropout_p.*0.2"),
        ({"hkv": 2}, {}, r"key: leading.*\(2, 4, 11, 16\), \(2, 2, 11, 16\)"),
        ({"hkv": 3}, {"enable_gqa": True}, "enable_gqa: the key heads must divide"),
    ],
)
def test_refusals(sizes, options, message):
    q, k, v = _qkv(**sizes)
    with sdpa_replacement(), pytest.raises(policy.UnsupportedRequest, match=message):
        F.scaled_dot_product_attention(q, k, v, **options)


def test_warn_runs_the_original_and_counts():
    q, k, v = _qkv()
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(q, k, v, mask)
    policy.reset_fallback_counts()
    with sdpa_replacement("warn"):
        got = [F.scaled_dot_product_attention(q, k, v, mask) for _ in range(3)]
        F.scaled_dot_product_attention(q, k, v)  # served: not counted
    assert all(torch.equal(x, want) for x in got)
    assert list(policy.fallback_counts().values()) == [3]


def test_other_modules_and_nesting_are_restored_after_an_exception():
    holder = types.SimpleNamespace(scaled_dot_product_attention=F.scaled_dot_product_attention)
    original = F.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="inside"), sdpa_replacement(modules=(holder,)):
        assert holder.scaled_dot_product_attention is not original
        raise RuntimeError("inside")
    assert holder.scaled_dot_product_attention is original
    assert F.scaled_dot_product_attention is original


def test_bad_arguments():
    with pytest.raises(ValueError, match="policy: must be one of"), sdpa_replacement("silent"):
        pass
    with pytest.raises(ValueError, match="backend: must not be 'sdpa'"):
        sdpa_replacement(backend="sdpa").__enter__()
    q, k, v = _qkv()
    assert supports(q, k, v) is None
    assert "strided tensor" in supports(q[0, 0, 0], k, v)
