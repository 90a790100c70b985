"""The FP8 forward against fp64 on the dequantized tensors.

The yardstick of numerics.py is, here, the emulation in reference_fp8.py: the same blocks, the same
rounding of P to e4m3 and the 14-bit accumulator of the FP8 tensor core. Long contexts are judged
differently: what the kernel adds to the error must be small beside that of the quantized inputs.
Packed tensors are full of NaN codes and NaN descales wherever no sequence is.
"""

from __future__ import annotations

import itertools
import math
import zlib

import pytest
import torch

import fa3_train
from fa3_train import checks, numerics, reference, reference_fp8
from fa3_train.ops import fp8

pytestmark = pytest.mark.gpu

BF16, FP16, F8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
HEAD_DIMS = (64, 96, 128, 192, 256)
WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "window": (100, 37), "left": (64, 0)}


def inputs(batch, sq, sk, heads, groups, dim, kind=0, seed=0):
    """fp32 q, k, v on the GPU. kind 1: V with a mean; 2: magnitude varies along the sequence;
    3: peaked rows; 4: all scores negative."""
    g = torch.Generator("cuda").manual_seed(seed)
    q = torch.randn(batch, sq, heads, dim, device="cuda", generator=g)
    k = torch.randn(batch, sk, groups, dim, device="cuda", generator=g)
    v = torch.randn(batch, sk, groups, dim, device="cuda", generator=g)
    if kind == 1:
        v = v + 0.5
    if kind == 2:

        def wave(length, octaves, step):
            phase = torch.arange(length, device="cuda") * step
            return torch.exp2(octaves * torch.sin(phase))[None, :, None, None]

        q, k = q * wave(sq, 1.0, 0.011), k * wave(sk, 1.0, 0.013)
        v = v * wave(sk, 3.0, 0.007) * 0.03
    if kind == 3:
        q = q * 6
    if kind == 4:
        unit = torch.nn.functional.normalize(torch.ones(dim, device="cuda"), dim=0)
        q, k = q + 6 * unit, k - 6 * unit
    return q, k, v


def quantize(*tensors, cu=None):
    """(codes, descale) of each."""
    return [reference_fp8.quantize_blocks(x, cu_seqlens=cu) for x in tensors]


def run(q8, k8, v8, window=(-1, -1), two_level=True, dtype=BF16, cu=(None, None), lengths=None):
    """The op on [(codes, descale)] triples."""
    lengths = lengths or (q8[0].shape[-3], k8[0].shape[-3])
    scale = 1 / math.sqrt(q8[0].shape[-1])
    return torch.ops.fa3_train.attn_fp8_fwd(
        q8[0], k8[0], v8[0], q8[1], k8[1], v8[1], *cu, *lengths, scale, window[1] == 0, *window,
        two_level, dtype,
    )  # fmt: skip


def truth(q8, k8, v8, window=(-1, -1)):
    wide = [reference_fp8.dequantize_blocks(*x, dtype=torch.float64) for x in (q8, k8, v8)]
    return reference.attention(*wide, window_size=window)


def emulated(q8, k8, v8, window, two_level, dtype):
    out, lse = reference_fp8.attention_fp8(
        q8[0], k8[0], v8[0], q8[1], k8[1], v8[1], window_size=window, two_level=two_level,
        accumulator="hopper", dtype=torch.float64,
    )  # fmt: skip
    return out.to(dtype), lse.float()


SHAPES = [  # batch, Sq, Sk, heads, groups
    (2, 1, 1, 4, 2),
    (2, 200, 333, 2, 1),
    (1, 333, 200, 2, 2),
    (1, 130, 1000, 1, 1),
    (2, 577, 129, 4, 2),
    (1, 64, 128, 3, 3),
]


@pytest.mark.parametrize("two_level", [True, False])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_as_good_as_the_emulation(dim: int, two_level: bool) -> None:
    for i, (shape, name) in enumerate(itertools.product(SHAPES, WINDOWS)):
        if (
            i + dim // 32
        ) % 4:  # a quarter of the product for each head dim, all of it over the five
            continue
        window, dtype = WINDOWS[name], (BF16, FP16)[i % 2]
        case = f"{shape} d{dim} {name} {dtype}"
        data = quantize(*inputs(*shape, dim, kind=i % 5, seed=zlib.crc32(case.encode())))
        out, lse = run(*data, window, two_level, dtype)
        true_out, true_lse = truth(*data, window)
        base_out, base_lse = emulated(*data, window, two_level, dtype)
        numerics.assert_as_good(out, true_out, base_out, "out", f"out {case}")
        # The emulation cuts as the hardware does; what is left is ex2 and lg2.
        numerics.assert_as_good(lse, true_lse, base_lse, "lse_fp8", f"lse {case}")
        again = run(*data, window, two_level, dtype)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), f"not repeatable: {case}"


@pytest.mark.parametrize("dim", [16, 80, 112, 224])
def test_other_head_dims_run_in_the_next_tile(dim: int) -> None:
    data = quantize(*inputs(2, 150, 260, 4, 2, dim, kind=1))
    out, lse = run(*data, (-1, 0))
    true_out, true_lse = truth(*data, (-1, 0))
    base_out, base_lse = emulated(*data, (-1, 0), True, BF16)
    numerics.assert_as_good(out, true_out, base_out, "out")
    numerics.assert_as_good(lse, true_lse, base_lse, "lse_fp8")


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", WINDOWS)
def test_packed_sequences_among_nan(dim: int, name: str) -> None:
    """Each sequence gives bit for bit what it gives alone, whatever lies around it."""
    window, heads, groups = WINDOWS[name], 4, 2
    lengths_q, lengths_k = [0, 130, 1, 257, 64, 0, 500], [50, 130, 300, 0, 511, 0, 499]
    tail = 5  # rows that no sequence owns
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device="cuda")
        for x in (lengths_q, lengths_k)
    )
    batch = len(lengths_q)

    def packed(cu, heads):
        total = int(cu[-1]) + tail
        codes = torch.full((total, heads, dim), 0x7F, dtype=torch.uint8, device="cuda")
        return codes, torch.full((heads, total // 128 + batch), math.nan, device="cuda")

    q, k, v = packed(cu_q, heads), packed(cu_k, groups), packed(cu_k, groups)
    alone = []
    for b in range(batch):
        data = quantize(*inputs(1, lengths_q[b], lengths_k[b], heads, groups, dim, b % 3, seed=b))
        for whole, part, cu in ((q, data[0], cu_q), (k, data[1], cu_k), (v, data[2], cu_k)):
            start, length = int(cu[b]), part[0].shape[1]
            whole[0][start : start + length] = part[0][0].view(torch.uint8)
            slot = start // 128 + b
            whole[1][:, slot : slot + part[1].shape[-1]] = part[1][0]
        alone.append(run(*data, window) if lengths_q[b] else None)
    whole = [(codes.view(F8), descale) for codes, descale in (q, k, v)]
    out, lse = run(*whole, window, cu=(cu_q, cu_k), lengths=(max(lengths_q), max(lengths_k)))
    for b, single in enumerate(alone):
        if single is None:
            continue
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        assert torch.equal(out[rows], single[0][0]), f"out of sequence {b}"
        assert torch.equal(lse[:, rows], single[1][0]), f"lse of sequence {b}"


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_without_keys(dim: int) -> None:
    data = quantize(*inputs(2, 40, 0, 2, 2, dim))
    out, lse = run(*data)
    assert (out == 0).all() and (lse == -math.inf).all()
    data = quantize(*inputs(1, 300, 100, 2, 2, dim))  # bottom right: the first 200 rows see nothing
    out, lse = run(*data, (-1, 0))
    assert (out[:, :200] == 0).all() and (lse[..., :200] == -math.inf).all()
    assert lse[..., 200:].isfinite().all() and (out[:, 200:] != 0).any(-1).all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_unrounded_row_sum_is_an_option(dim: int) -> None:
    """The ablation: promotion alone. Its lse is exact up to the 14-bit scores."""
    data = quantize(*inputs(2, 200, 333, 2, 1, dim, kind=1))
    scale = 1 / math.sqrt(dim)
    flat = [x for x, _ in data] + [s for _, s in data]
    out, lse = torch.ops.fa3_train.attn_fp8_fwd(
        *flat, None, None, 200, 333, scale, True, -1, 0, True, BF16, 1
    )
    true_out, true_lse = truth(*data, (-1, 0))
    base_out, _ = emulated(*data, (-1, 0), True, BF16)
    _, base_lse = emulated(*data, (-1, 0), False, BF16)
    numerics.assert_as_good(out, true_out, base_out, "out")
    numerics.assert_as_good(lse, true_lse, base_lse, "lse_fp8")


@pytest.mark.parametrize("two_level", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bad_values_surface_as_nan(dim: int, two_level: bool) -> None:
    data = quantize(*inputs(1, 200, 300, 2, 2, dim))
    clean, _ = run(*data, two_level=two_level)
    assert clean.isfinite().all()
    for which, code in itertools.product(range(3), (0x7F, 0xFF)):
        bad = [(codes.clone(), scale) for codes, scale in data]
        bad[which][0].view(torch.uint8)[0, 70, 1, 3] = code
        hit = run(*bad, two_level=two_level)[0].isnan()
        expected = torch.zeros_like(hit)
        where = [(0, 70, 1), (0, slice(None), 1), (0, slice(None), 1, 3)][which]
        expected[where] = True  # q: its row; k: every row of the head; v: its column
        assert torch.equal(hit, expected), f"NaN code {code:#x} in {'qkv'[which]}"
    for which, value in itertools.product(range(3), (math.nan, math.inf, -1.0)):
        bad = [(codes, scale.clone()) for codes, scale in data]
        bad[which][1][0, 1, 0] = value
        hit = run(*bad, two_level=two_level)[0].isnan()
        expected = torch.zeros_like(hit)
        expected[0, : 128 if which == 0 else None, 1] = True
        assert torch.equal(hit, expected), f"descale {value} of {'qkv'[which]}"


def test_debug_check_names_the_tensor(monkeypatch) -> None:
    monkeypatch.setenv(fp8.CHECK_VARIABLE, "1")
    data = quantize(*inputs(1, 200, 300, 2, 2, 64))
    run(*data)
    data[1][0].view(torch.uint8)[0, 7, 1, 3] = 0x7F
    with pytest.raises(
        checks.ArgumentError, match=r"^k: must hold no NaN, got NaN at \(0, 7, 1, 3\)"
    ):
        run(*data)
    data[2][1][0, 1, 2] = math.inf
    data[1][0].view(torch.uint8)[0, 7, 1, 3] = 0
    with pytest.raises(checks.ArgumentError, match=r"^v_descale: must be finite .* \(0, 1, 2\)"):
        run(*data)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_views_into_one_projection(dim: int) -> None:
    """q, k, v as slices of one (B, S, H + 2 G, D) tensor."""
    q, k, v = (x[0] for x in quantize(*inputs(2, 150, 150, 4, 2, dim)))
    both = torch.cat([x.view(torch.uint8) for x in (q, k, v)], 2).view(F8)
    scales = [torch.rand(2, h, 2, device="cuda") + 0.5 for h in (4, 2, 2)]
    parts = [both[:, :, :4], both[:, :, 4:6], both[:, :, 6:]]
    one = run(*zip(parts, scales, strict=True))
    other = run(*zip((q, k, v), scales, strict=True))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("spread", ["zero mean", "mean", "positive"])
def test_two_levels_stay_exact_over_long_contexts(dim: int, spread: str) -> None:
    """On 32k keys the whole error is at most 1.2 times that of e4m3 inputs alone, both with a bf16
    result. One level is far off where V has a mean: the test can tell them apart."""
    q, k, v = (x.bfloat16() for x in inputs(1, 192, 32768, 2, 2, dim, seed=3))
    v = {"zero mean": v, "mean": v + 0.5, "positive": v.abs()}[spread].bfloat16()
    data = quantize(*(x.float() for x in (q, k, v)))
    true_out, _ = reference.attention(q.double(), k.double(), v.double())
    rounded = truth(*data)[0].bfloat16()
    limit = numerics.TOLERANCES["fp8_inputs"].factor * numerics.relative_rms_error(
        rounded, true_out
    )
    assert numerics.relative_rms_error(run(*data)[0], true_out) <= limit
    if spread != "zero mean":
        one_level = run(*data, two_level=False)[0]
        assert numerics.relative_rms_error(one_level, true_out) > 10 * limit


def test_small_values_do_not_vanish_from_the_row_sum() -> None:
    """Half of the keys have a V 2^-20 of the others': no part of O, but half of the row sum. Their
    rounded probabilities (times V's descale) are zero."""
    q, k, v = inputs(1, 100, 512, 2, 2, 128)
    v[:, 128:384] *= 2.0**-20
    data = quantize(q, k, v)
    out, lse = run(*data)
    true_out, true_lse = truth(*data)
    base_out, base_lse = emulated(*data, (-1, -1), True, BF16)
    numerics.assert_as_good(out, true_out, base_out, "out")
    numerics.assert_as_good(lse, true_lse, base_lse, "lse_fp8")


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_whole_function(dim: int, causal: bool) -> None:
    """RoPE, Hadamard, quantization, FP8 forward, 16-bit backward, beside the emulation."""
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs(2, 300, 300, 4, 2, dim, seed=5))
    angle = torch.outer(torch.arange(300.0), 1e4 ** (-torch.arange(dim // 2) / (dim // 2))).cuda()
    turn = {"cos": angle.cos(), "sin": angle.sin(), "signs": reference_fp8.random_signs(dim).cuda()}
    dout = torch.randn(2, 300, 4, dim, device="cuda").bfloat16()

    def gradients(backend):
        out = fa3_train.flash_attn_fp8_func(q, k, v, causal=causal, **turn, backend=backend)
        return torch.autograd.grad(out, (q, k, v), dout)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    cos, sin = turn["cos"].double(), turn["sin"].double()
    turned = [reference_fp8.rotate(x, cos, sin) for x in wide[:2]]
    true_out, _ = reference.attention(*turned, wide[2], causal=causal)
    expected = torch.autograd.grad(true_out, wide, dout.double())
    for name, ours, true, base in zip(
        "qkv", gradients("hopper"), expected, gradients("reference"), strict=True
    ):
        numerics.assert_as_good(ours, true, base, "grad", f"d{name}")
