"""flash_attn_fp8_func without a GPU: the emulation behind it, its gradients and its rules."""

from __future__ import annotations

import pytest
import torch

from fa3_train import flash_attn_fp8_func, flash_attn_fp8_varlen_func, numerics, reference
from fa3_train import reference_fp8 as fp8_truth
from fa3_train.ops.backends import BackendError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def leaf(*shape):
    return torch.randn(*shape).bfloat16().requires_grad_()


def tables(positions, dim):
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    return angle.cos(), angle.sin()


def offsets(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_value_and_gradients_are_near_the_truth(rotated, mixed):
    """What quantization costs on normal data, and no more: e4m3 has 3 bits, 20 dB is generous to
    a scale that is wrong by a factor of two."""
    q, k, v = leaf(1, 150, 4, 64), leaf(1, 150, 2, 64), leaf(1, 150, 2, 64)
    extra = {}
    if rotated:
        extra["cos"], extra["sin"] = tables(150, 64)
    if mixed:
        extra["signs"] = fp8_truth.random_signs(64)
    out, lse = flash_attn_fp8_func(
        q, k, v, causal=True, return_lse=True, backend="reference", **extra
    )
    assert out.dtype == torch.bfloat16 and lse.shape == (1, 4, 150)
    dout = torch.randn_like(out)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    turned = [*wide]
    if rotated:
        turned[:2] = (
            fp8_truth.rope_hadamard(x, extra["cos"], extra["sin"], dtype=torch.float64)
            for x in wide[:2]
        )
    truth, lse_truth = reference.attention(*turned, causal=True)
    assert numerics.sqnr_db(out, truth) > 20
    assert numerics.max_error(lse, lse_truth) < 0.2
    grads = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(truth, wide, dout.double())
    for name, a, b in zip(("dq", "dk", "dv"), grads, expected, strict=True):
        assert numerics.sqnr_db(a, b) > 15, name
    # and it is the quantized computation, not the plain one by another name
    assert numerics.relative_rms_error(out, truth) > 5e-3


def test_hadamard_pays_on_outliers():
    q, k, v = (numerics.outlier_normal(1, 256, 2, 64).bfloat16() for _ in range(3))
    q[..., 7] *= 20  # one channel that would take the whole range of e4m3
    truth, _ = reference.attention(q, k, v)
    plain = flash_attn_fp8_func(q, k, v, backend="reference")
    signs = fp8_truth.random_signs(64)
    mixed = flash_attn_fp8_func(q, k, v, signs=signs, backend="reference")
    errors = [numerics.relative_rms_error(x, truth) for x in (plain, mixed)]
    assert errors[1] < errors[0]


def test_packed_is_each_document_alone():
    cu = offsets(70, 0, 130)
    q, k, v = leaf(200, 4, 64), leaf(200, 2, 64), leaf(200, 2, 64)
    cos, sin = tables(130, 64)
    out = flash_attn_fp8_varlen_func(
        q, k, v, cu, cu, 130, 130, causal=True, cos=cos, sin=sin, backend="reference"
    )
    for a, b in ((0, 70), (70, 200)):
        alone = flash_attn_fp8_func(
            q[None, a:b], k[None, a:b], v[None, a:b], causal=True, cos=cos, sin=sin,
            backend="reference",
        )  # fmt: skip
        assert numerics.relative_rms_error(out[a:b], alone[0]) < 1e-3
    out.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_lse_gradient():
    q, k, v = leaf(1, 40, 2, 64), leaf(1, 40, 2, 64), leaf(1, 40, 2, 64)
    _, lse = flash_attn_fp8_func(q, k, v, return_lse=True, backend="reference")
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    assert dq.abs().sum() > 0 and dk.abs().sum() > 0 and (dv is None or not dv.any())


BAD = {
    "head dim": (dict(d=48), r"^q: head_dim must be one of .* for FP8, got 48$"),
    "sdpa": (dict(backend="sdpa"), r"^backend='sdpa': torch's .* has no FP8; .*'reference'\]$"),
    "hopper": (dict(backend="hopper"), r"^backend='hopper': q: device must be a Hopper GPU"),
    "scale": (dict(softmax_scale=-1.0), r"^softmax_scale: must be positive for FP8, got -1\.0$"),
    "two_level": (dict(two_level=1), r"^two_level: must be True or False, got 1$"),
    "sin": (dict(cos=torch.ones(40, 32)), r"^sin: must be given iff cos is, got False$"),
    "signs": (dict(signs=torch.ones(32)), r"^signs: must be \(64,\), got \(32,\)$"),
    "positions": (
        dict(position_ids=torch.zeros(1, 40, dtype=torch.int32)),
        r"^position_ids: needs cos and sin, got a tensor$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, message = BAD[case]
    changes = dict(changes)
    d = changes.pop("d", 64)
    q = torch.randn(1, 40, 2, d).bfloat16()
    with pytest.raises((ValueError, BackendError), match=message):
        flash_attn_fp8_func(q, q, q, **{"backend": "reference", **changes})
