"""The FP8 reference against naive formulas: Hadamard, rotation, block layout, scales, attention."""

from __future__ import annotations

import math

import pytest
import torch

from fa3_train import reference_fp8 as fp8
from fa3_train.numerics import outlier_normal, relative_rms_error
from fa3_train.reference import attention
from fa3_train.rotary import rope_tables

HEAD_DIMS = (64, 96, 128, 192, 256)


def lengths_to_cu(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


# ---- Hadamard


@pytest.mark.parametrize("order", [1, 2, 32, 64, 128, 256])
def test_hadamard_matrix_is_orthogonal_and_of_the_natural_order(order):
    h = fp8.hadamard_matrix(order, torch.float64)
    assert torch.allclose(h @ h.T, torch.eye(order, dtype=torch.float64), atol=1e-14)
    i, j = order // 3, order - 1
    assert h[i, j].item() == pytest.approx((-1) ** (i & j).bit_count() / math.sqrt(order))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_transform_is_the_block_diagonal_matrix(head_dim):
    order = {96: 32, 192: 64}.get(head_dim, head_dim)
    x = torch.randn(3, 2, head_dim, dtype=torch.float64)
    blocks = [fp8.hadamard_matrix(order, torch.float64)] * (head_dim // order)
    expected = x @ torch.block_diag(*blocks)
    assert torch.allclose(fp8.hadamard_transform(x), expected, atol=1e-13)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_signs_and_transform_leave_scores_alone(head_dim):
    q, k = torch.randn(2, 1, 40, 1, head_dim, dtype=torch.float64)
    signs = fp8.random_signs(head_dim, seed=3)
    mixed = [fp8.rope_hadamard(x, signs=signs, dtype=torch.float64)[0, :, 0] for x in (q, k)]
    assert torch.allclose(mixed[0] @ mixed[1].T, q[0, :, 0] @ k[0, :, 0].T, atol=1e-12)


def test_an_outlier_is_spread_over_the_row():
    x = torch.zeros(1, 1, 1, 128)
    x[..., 17] = 100.0
    y = fp8.rope_hadamard(x, signs=fp8.random_signs(128))
    assert torch.allclose(y.abs(), torch.full_like(y, 100.0 / math.sqrt(128)), rtol=1e-5)


def test_orders_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="head_dim: must be a power of two, 96 or 192, got 80"):
        fp8.hadamard_transform(torch.randn(80))


def test_signs_depend_on_the_seed_only():
    assert torch.equal(fp8.random_signs(128, 5), fp8.random_signs(128, 5))
    assert not torch.equal(fp8.random_signs(128, 5), fp8.random_signs(128, 6))
    assert set(fp8.random_signs(128).tolist()) == {1.0, -1.0}


# ---- rotation


def naive_rotation(x, cos, sin, positions, interleaved):
    """Pair by pair, as the definition reads. x (T, H, D)."""
    y = x.clone()
    half = cos.shape[1]
    for t, position in enumerate(positions):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            c, s = cos[position, i].item(), sin[position, i].item()
            y[t, :, a] = x[t, :, a] * c - x[t, :, b] * s
            y[t, :, b] = x[t, :, b] * c + x[t, :, a] * s
    return y


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 32, 2])
def test_rotation_pair_by_pair(interleaved, rotary_dim):
    x = torch.randn(9, 2, 64, dtype=torch.float64)
    cos, sin = rope_tables(rotary_dim, 50)
    positions = [3, 0, 49, 7, 7, 12, 1, 30, 2]
    ids = torch.tensor(positions, dtype=torch.int32)
    ours = fp8.rotate(x, cos, sin, position_ids=ids, interleaved=interleaved)
    expected = naive_rotation(x, cos.double(), sin.double(), positions, interleaved)
    assert torch.allclose(ours, expected, atol=1e-14)
    back = fp8.rotate(ours, cos, sin, position_ids=ids, interleaved=interleaved, inverse=True)
    assert torch.allclose(back, x, atol=1e-6)  # the fp32 tables are orthogonal to fp32 only


def test_positions_start_anew_in_each_packed_sequence():
    cu = lengths_to_cu(3, 0, 4, 1)
    assert fp8.packed_positions(cu, 10).tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]
    x = torch.randn(10, 1, 8, dtype=torch.float64)
    cos, sin = rope_tables(8, 4)
    packed = fp8.rotate(x, cos, sin, cu_seqlens=cu)
    assert torch.equal(packed[3:7], fp8.rotate(x[None, 3:7], cos, sin)[0])


def test_a_position_outside_of_the_tables_shows():
    x = torch.randn(3, 1, 8)
    cos, sin = rope_tables(8, 4)
    y = fp8.rotate(x, cos, sin, position_ids=torch.tensor([0, 4, -1]))
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isnan().all()


# ---- gradients


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_gradient_is_that_of_the_forward(interleaved, head_dim):
    cos, sin = rope_tables(head_dim // 2, 9)
    signs = fp8.random_signs(head_dim, 1)
    kw = {"interleaved": interleaved, "dtype": torch.float64}
    x = torch.randn(2, 3, 1, head_dim, dtype=torch.float64, requires_grad=True)

    def forward(t):
        return fp8.rope_hadamard(t, cos, sin, signs, **kw)

    assert torch.autograd.gradcheck(forward, x, fast_mode=True)
    grad = torch.randn(2, 3, 1, head_dim, dtype=torch.float64)
    (expected,) = torch.autograd.grad(forward(x), x, grad)
    assert torch.allclose(fp8.rope_hadamard_gradient(grad, cos, sin, signs, **kw), expected)


# ---- blocks and scales


def test_block_of_every_packed_token():
    cu = lengths_to_cu(130, 0, 128, 1)
    slot, slots = fp8.scale_slots(torch.empty(262, 1, 8), 128, cu)
    assert slots == 262 // 128 + 4
    for b, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        for t in range(start, end):
            assert slot[t].item() == start // 128 + b + (t - start) // 128
    assert slot[259:].tolist() == [-1] * 3
    # no two sequences share a slot
    owners = {s: set() for s in range(slots)}
    for b, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        for t in range(start, end):
            owners[slot[t].item()].add(b)
    assert all(len(o) <= 1 for o in owners.values())


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_scale_is_the_block_maximum_over_448_rounded_up_to_four_bits(block, length):
    x = outlier_normal(2, length, 3, 64)
    codes, descale = fp8.quantize_blocks(x, block)
    assert codes.dtype == torch.float8_e4m3fn and descale.dtype == torch.float32
    assert descale.shape == (2, 3, -(-length // block))
    for n in range(descale.shape[-1]):
        top = x[:, n * block : (n + 1) * block].abs().amax((1, 3)) / 448.0
        assert (descale[..., n].double() >= top * (1 - 1e-6)).all()
        assert (descale[..., n].double() < top * 1.125 * (1 + 1e-6)).all()
    significand = torch.frexp(descale)[0] * 16
    assert torch.equal(significand, significand.round())


def test_codes_times_scale_are_exact_in_bf16():
    x = (
        outlier_normal(1, 400, 2, 128)
        * torch.logspace(-3, 3, 400, dtype=torch.float64)[:, None, None]
    )
    codes, descale = fp8.quantize_blocks(x)
    wide = fp8.dequantize_blocks(codes, descale, dtype=torch.float64)
    assert torch.equal(wide, wide.bfloat16().double())
    assert relative_rms_error(wide, x) < 0.03  # half a step of 4 bits is 3 % of a value at most


def test_packed_quantization_is_that_of_each_sequence_alone():
    lengths = (130, 0, 5, 256)
    cu = lengths_to_cu(*lengths)
    x = torch.randn(sum(lengths) + 3, 2, 64, dtype=torch.float64)
    x[sum(lengths) :] = math.nan  # rows of no sequence must not leak into a scale
    codes, descale = fp8.quantize_blocks(x, 128, cu)
    for b, n in enumerate(lengths):
        start = int(cu[b])
        if n == 0:
            continue
        alone, scale = fp8.quantize_blocks(x[None, start : start + n])
        assert torch.equal(codes[start : start + n].float(), alone[0].float())
        first = start // 128 + b
        assert torch.equal(descale[:, first : first + scale.shape[-1]], scale[0])
    wide = fp8.dequantize_blocks(codes, descale, 128, cu)
    assert wide.isfinite().all()


def test_zeros_and_values_that_are_not_finite():
    x = torch.randn(1, 384, 2, 64)
    x[0, 128:256, 0] = 0.0
    x[0, 5, 0, 3] = math.nan
    x[0, 300, 1, 7] = math.inf
    codes, descale = fp8.quantize_blocks(x)
    assert descale[0, 0, 1].item() == 1.0 and not codes[0, 128:256, 0].float().any()
    assert descale[0, 0, 0].isnan() and codes[0, :128, 0].float().isnan().all()
    assert descale[0, 1, 2].isnan() and codes[0, 256:, 1].float().isnan().all()
    assert descale.isnan().sum() == 2 and codes.float().isnan().sum() == 2 * 128 * 64


def test_tiny_blocks_stay_finite():
    codes, descale = fp8.quantize_blocks(torch.full((1, 3, 1, 64), 1e-40))
    assert descale.item() == torch.finfo(torch.float32).tiny
    assert codes.float().isfinite().all()


# ---- attention on codes


# The row sum of two-level attention takes P as rounded to e4m3: half a step is 2^-4 of it.
ROUNDED_LSE = math.log1p(2.0**-4)


def quantized(x, **kw):
    codes, descale = fp8.quantize_blocks(x.double(), **kw)
    return codes, descale, fp8.dequantize_blocks(codes, descale, dtype=torch.float64, **kw)


@pytest.mark.parametrize("causal,window", [(False, (-1, -1)), (True, (-1, -1)), (False, (40, 9))])
def test_attention_on_codes_is_attention_on_their_values(causal, window):
    """The only further rounding is that of the probabilities: 3 bits behind the leading one."""
    torch.manual_seed(0)
    shapes = ((2, 150, 4, 64), (2, 290, 2, 64), (2, 290, 2, 64))
    (q8, sq, q), (k8, sk, k), (v8, sv, v) = (quantized(outlier_normal(*s)) for s in shapes)
    out, lse = fp8.attention_fp8(
        q8, k8, v8, sq, sk, sv, causal=causal, window_size=window, dtype=torch.float64
    )
    truth, truth_lse = attention(q, k, v, causal=causal, window_size=window)
    assert (lse - truth_lse).abs().max() < ROUNDED_LSE
    assert relative_rms_error(out, truth) < 0.04
    out, lse = fp8.attention_fp8(
        q8, k8, v8, sq, sk, sv, causal=causal, window_size=window, two_level=False,
        dtype=torch.float64,
    )  # fmt: skip
    assert torch.allclose(lse, truth_lse, atol=1e-9)
    assert relative_rms_error(out, truth) < 0.04


def test_probabilities_keep_their_range_under_very_different_value_scales():
    """V's scale is a bias of the scores: a small block of V must not lose its probabilities."""
    torch.manual_seed(1)
    v = torch.randn(1, 256, 1, 64)
    v[:, :128] *= 2.0**-20
    (q8, sq, q), (k8, sk, k), (v8, sv, v) = (
        quantized(x) for x in (torch.randn(1, 8, 1, 64), torch.randn(1, 256, 1, 64), v)
    )
    out, lse = fp8.attention_fp8(q8, k8, v8, sq, sk, sv, dtype=torch.float64)
    truth, truth_lse = attention(q, k, v)
    assert (lse - truth_lse).abs().max() < ROUNDED_LSE
    assert relative_rms_error(out, truth) < 0.04


def test_packed_attention_and_rows_without_keys():
    cu_q, cu_k = lengths_to_cu(5, 0, 130), lengths_to_cu(0, 7, 130)
    (q8, sq, q) = quantized(torch.randn(137, 2, 64), cu_seqlens=cu_q)
    (k8, sk, k) = quantized(torch.randn(137, 1, 64), cu_seqlens=cu_k)
    kw = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": True}
    out, lse = fp8.attention_fp8(q8, k8, k8, sq, sk, sk, dtype=torch.float64, **kw)
    truth, truth_lse = attention(q, k, k, **kw)
    assert not out[:5].any() and lse[:, :5].isneginf().all()
    assert not out[135:].any() and lse[:, 135:].isneginf().all()
    some = truth_lse.isfinite()
    assert (lse - truth_lse)[some].abs().max() < ROUNDED_LSE
    assert relative_rms_error(out, truth) < 0.04


def test_a_broken_block_surfaces_in_every_row_that_sees_it():
    x = torch.randn(1, 256, 1, 64)
    broken = x.clone()
    broken[0, 200, 0, 0] = math.inf
    (q8, sq, _), (k8, sk, _) = quantized(x), quantized(broken)
    out, lse = fp8.attention_fp8(q8, k8, q8, sq, sk, sq, causal=True)
    assert out[0, :128].isfinite().all() and out[0, 128:].isnan().all()
    assert lse[0, 0, 128:].isnan().all()


# ---- the 14-bit accumulator


def test_hopper_matmul_cuts_towards_zero():
    big, small = 256.0, 2.0**-6
    a = torch.tensor([[big, small, small, -small]])
    assert fp8.hopper_matmul(a, torch.ones(4, 1)).item() == big  # all small ones are cut
    a = torch.tensor([[big, 2.0**-5, -(2.0**-5) - 2.0**-6]])
    assert fp8.hopper_matmul(a, torch.ones(3, 1)).item() == big  # -0.046 is cut to -0.031
    assert fp8.hopper_matmul(torch.ones(1, 32), torch.ones(32, 1)).item() == 32.0


def test_single_level_accumulation_is_biased_and_two_levels_are_not():
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 2048, 1, 64)
    v = torch.rand(1, 2048, 1, 64)  # all positive: every cut loses in the same direction
    (q8, sq, _), (k8, sk, _), (v8, sv, _) = (quantized(x) for x in (q[:, :4], k, v))
    exact, _ = fp8.attention_fp8(q8, k8, v8, sq, sk, sv)
    kw = {"accumulator": "hopper"}
    one, _ = fp8.attention_fp8(q8, k8, v8, sq, sk, sv, two_level=False, **kw)
    two, _ = fp8.attention_fp8(q8, k8, v8, sq, sk, sv, two_level=True, **kw)
    assert relative_rms_error(one, exact) > 0.02 and (one - exact).mean() < 0
    assert relative_rms_error(two, exact) < 0.003


def test_unknown_accumulator_is_refused():
    x, s, _ = quantized(torch.randn(1, 4, 1, 64))
    with pytest.raises(ValueError, match="accumulator: must be 'exact' or 'hopper', got 'fp16'"):
        fp8.attention_fp8(x, x, x, s, s, s, accumulator="fp16")
