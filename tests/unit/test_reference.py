"""The truth itself, against brute force in Python floats, torch's math attention, and finite
differences. Nothing here shares code with reference.py but the definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fa3_train import numerics, reference

MASKS = [
    {},
    {"causal": True},
    {"window_size": (2, 0)},
    {"window_size": (1, 2)},
    {"window_size": (-1, 1)},
    {"window_size": (2, -1)},
    {"window_size": (0, 0)},
]


def _rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def brute_force(q, k, v, scale, left, right, softcap, sink):
    """One head in Python floats: q (Sq, D), k (Sk, D), v (Sk, E) as nested lists."""
    outs, lses = [], []
    shift = len(k) - len(q)
    for i, query in enumerate(q):
        scores = {}
        for j, key in enumerate(k):
            low = -math.inf if left < 0 else i + shift - left
            high = math.inf if right < 0 else i + shift + right
            if low <= j <= high:
                s = scale * sum(a * b for a, b in zip(query, key, strict=True))
                scores[j] = softcap * math.tanh(s / softcap) if softcap else s
        total = sum(math.exp(s) for s in scores.values())
        total += 0.0 if sink is None else math.exp(sink)
        width = len(v[0]) if v else 0
        if total == 0.0:
            outs.append([0.0] * width)
            lses.append(-math.inf)
            continue
        outs.append(
            [sum(math.exp(s) * v[j][e] for j, s in scores.items()) / total for e in range(width)]
        )
        lses.append(math.log(total))
    return outs, lses


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(1, 1), (3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sink"])
def test_forward_is_the_definition(mask, lengths, extra):
    torch.manual_seed(2)
    sq, sk = lengths
    heads, groups = 4, 2
    q, k, v = _rand(2, sq, heads, 3), _rand(2, sk, groups, 3), _rand(2, sk, groups, 2)
    softcap = 0.7 if extra == "softcap" else 0.0
    sink = _rand(heads) if extra == "sink" else None
    out, lse = reference.attention(q, k, v, softmax_scale=0.6, softcap=softcap, sink=sink, **mask)
    left, right = mask.get("window_size", (-1, -1))
    right = 0 if mask.get("causal") else right
    for b in range(2):
        for h in range(heads):
            g = h // (heads // groups)
            expected_out, expected_lse = brute_force(
                q[b, :, h].tolist(), k[b, :, g].tolist(), v[b, :, g].tolist(), 0.6, left, right,
                softcap, None if sink is None else sink[h].item(),
            )  # fmt: skip
            torch.testing.assert_close(out[b, :, h], torch.tensor(expected_out).double())
            torch.testing.assert_close(lse[b, h], torch.tensor(expected_lse).double())


@pytest.mark.parametrize("causal", [False, True])
def test_forward_against_torch_math(causal):
    q, k, v = _rand(2, 33, 6, 16), _rand(2, 33, 2, 16), _rand(2, 33, 2, 16)
    out, _ = reference.attention(q, k, v, causal=causal)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)
    numerics.assert_as_good(out, expected, what="same")


def test_packed_is_each_sequence_alone():
    lengths_q, lengths_k = [3, 0, 5, 2], [4, 3, 5, 0]
    tail = 2  # rows that belong to no sequence, poisoned
    cu_q = torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)
    cu_k = torch.tensor([0, 4, 7, 12, 12], dtype=torch.int32)
    q, k, v = _rand(10 + tail, 4, 8), _rand(12 + tail, 2, 8), _rand(12 + tail, 2, 8)
    for x, end in ((q, 10), (k, 12), (v, 12)):
        x[end:] = math.nan
    out, lse = reference.attention(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for i in range(4):
        a, b = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        assert a.stop - a.start == lengths_q[i] and b.stop - b.start == lengths_k[i]
        alone, lse_alone = reference.attention(q[None, a], k[None, b], v[None, b], causal=True)
        assert torch.equal(out[a], alone[0])
        assert torch.equal(lse[:, a], lse_alone[0])
    assert torch.equal(out[10:], torch.zeros(tail, 4, 8, dtype=torch.float64))
    assert lse[:, 10:].isneginf().all()


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (2, 1)}])
@pytest.mark.parametrize("softcap", [0.0, 0.9])
@pytest.mark.parametrize("with_sink", [False, True])
def test_gradients_by_finite_differences(mask, softcap, with_sink):
    torch.manual_seed(3)
    q, k, v = _rand(1, 5, 4, 3), _rand(1, 4, 2, 3), _rand(1, 4, 2, 2)
    inputs = [q, k, v] + ([_rand(4)] if with_sink else [])

    def function(q, k, v, sink=None):
        out, lse = reference.attention(q, k, v, sink=sink, softcap=softcap, **mask)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs], atol=1e-7)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(5, 7), (7, 4), (3, 0)])
def test_explicit_backward_is_autograd(mask, lengths):
    torch.manual_seed(4)
    sq, sk = lengths
    q, k, v = _rand(2, sq, 4, 8), _rand(2, sk, 2, 8), _rand(2, sk, 2, 6)
    sink, dout, dlse = _rand(4), _rand(2, sq, 4, 6), _rand(2, 4, sq)
    options = {"sink": sink, "softcap": 1.5, **mask}
    out, lse, expected = reference.attention_gradients(dout, q, k, v, dlse=dlse, **options)
    explicit = reference.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    for name, a, b in zip(("dq", "dk", "dv", "dsink"), explicit, expected, strict=True):
        numerics.assert_as_good(a, b, what="same", name=name)


def test_explicit_backward_packed_and_in_a_ring():
    """Two blocks of keys, each with the lse and out of both: the shares add up."""
    torch.manual_seed(5)
    q, k, v = _rand(6, 4, 8), _rand(8, 2, 8), _rand(8, 2, 8)
    dout = _rand(6, 4, 8)
    cu_q = torch.tensor([0, 2, 6], dtype=torch.int32)
    cu_k = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out, lse, expected = reference.attention_gradients(dout, q, k, v, **packed)
    first = torch.tensor([0, 1, 2])
    rest = torch.tensor([3, 4, 5, 6, 7])
    blocks = [  # the first key block holds keys 0-1 and 3-4, the second the others
        (torch.cat([first[:2], rest[:2]]), torch.tensor([0, 2, 4], dtype=torch.int32)),
        (torch.cat([first[2:], rest[2:]]), torch.tensor([0, 1, 4], dtype=torch.int32)),
    ]
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows, cu in blocks:
        share = reference.attention_backward(
            dout, q, k[rows], v[rows], out, lse, cu_seqlens_q=cu_q, cu_seqlens_k=cu
        )
        dq += share.dq
        dk[rows] += share.dk
        dv[rows] += share.dv
    for name, a, b in zip(("dq", "dk", "dv"), (dq, dk, dv), expected[:3], strict=True):
        numerics.assert_as_good(a, b, what="same", name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulation_is_near_but_not_equal(dtype):
    """The yardstick must have the error of its precision: no more, and not none."""
    torch.manual_seed(6)
    q, k, v = _rand(1, 64, 4, 32), _rand(1, 64, 2, 32), _rand(1, 64, 2, 32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    truth, lse_truth = reference.attention(q, k, v, causal=True)
    out, lse = reference.attention_emulated(q, k, v, causal=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    u = numerics.unit_roundoff(dtype)
    assert 0.1 * u < numerics.relative_rms_error(out, truth) < 4 * u
    assert 0 < numerics.max_error(lse, lse_truth) < 16 * u


def test_emulation_rows_without_keys_are_zero():
    q, k = torch.randn(1, 5, 2, 8).bfloat16(), torch.randn(1, 3, 2, 8).bfloat16()
    out, lse = reference.attention_emulated(q, k, k, causal=True)
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert lse[..., :2].isneginf().all() and lse[..., 2:].isfinite().all()


class TestNumerics:
    def test_a_wrong_result_fails(self):
        truth = _rand(100)
        near = truth.bfloat16()
        assert numerics.compare(near, truth, near).ok
        worse = truth + 10 * (near.double() - truth)
        assert not numerics.compare(worse.float(), truth, near).ok

    def test_one_bad_element_fails_by_the_maximum(self):
        truth = torch.ones(10000, dtype=torch.float64)
        actual = truth.float()
        actual[1234] += 1e-3
        assert not numerics.compare(actual, truth, what="lse").ok

    def test_nan_and_displaced_infinity_fail(self):
        truth = torch.tensor([1.0, -math.inf], dtype=torch.float64)
        assert numerics.compare(truth.float(), truth).ok
        for wrong in ([math.nan, -math.inf], [-math.inf, 1.0], [1.0, math.inf], [1.0, -1e30]):
            result = numerics.compare(torch.tensor(wrong), truth)
            assert not result.ok and result.fault, wrong

    def test_shape_mismatch_fails(self):
        assert not numerics.compare(torch.zeros(2), torch.zeros(3).double()).ok

    def test_message_carries_numbers(self):
        with pytest.raises(AssertionError, match=r"dq: FAILED; max error 1\.000e\+00"):
            numerics.assert_as_good(torch.ones(3), torch.zeros(3).double(), name="dq")

    def test_sqnr(self):
        truth = torch.ones(4, dtype=torch.float64)
        assert numerics.sqnr_db(truth + 0.1, truth) == pytest.approx(20.0)

    def test_outlier_data(self):
        x = numerics.outlier_normal(200_000, generator=torch.Generator().manual_seed(0))
        # variance 1 + 100 * 0.001
        assert x.var().item() == pytest.approx(1.1, rel=0.05)
        assert x.abs().max() > 15
