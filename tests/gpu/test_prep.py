"""The preprocessing kernels against fp64, on strided inputs between NaN, dense and packed.

What "exact to one e4m3 step" means here: with the kernel's own descale (at least the block maximum
over 448, at most 1.125 of it, 4 significant bits), every code is the fp64 result's or its
neighbour, and the neighbour only where that is as near to within fp32 rounding.
"""

from __future__ import annotations

import math
import zlib

import pytest
import torch

import fa3_train
from fa3_train import numerics
from fa3_train import reference_fp8 as fp8
from fa3_train.checks import ArgumentError
from fa3_train.ops import preprocess
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE
from fa3_train.rotary import rope_tables

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
HEAD_DIMS = (64, 96, 128, 192, 256)
PACKED = (5, 0, 128, 1, 300, 127, 0, 129)
POSITIONS = 1500
# fp32 rounding of a sum, 1e-6 of the block's largest magnitude, in units of the descale; the
# smallest step of e4m3 is 2e-3 of them.
SLACK = 448 * 1e-6


def seeded(*key: object) -> None:
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def poisoned(lead: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Outlier data in a view whose surroundings are NaN; one block is loud, one is zero."""
    buffer = torch.full(
        (*lead[:-1], lead[-1] + 3, heads + 1, dim + 8), math.nan, dtype=dtype, device="cuda"
    )
    x = buffer[..., 1 : lead[-1] + 1, :heads, :dim]
    values = numerics.outlier_normal(*lead, heads, dim, device="cuda")
    values[..., :128, :, :] *= 20.0
    values[..., 128:256, :1, :] = 0.0
    x.copy_(values)
    return x


def layout(kind: str) -> tuple[tuple[int, ...], torch.Tensor | None, int]:
    """Leading shape, cu_seqlens, rows that belong to a sequence."""
    if kind != "packed":
        return (2, int(kind)), None, int(kind)
    cu = torch.tensor([0, *torch.tensor(PACKED).cumsum(0).tolist()], dtype=torch.int32)
    return (sum(PACKED) + 7,), cu.cuda(), sum(PACKED)


def ordinal(codes: torch.Tensor) -> torch.Tensor:
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def check_codes(codes, descale, truth, block, cu, rows) -> None:
    """``truth``: fp64 values before quantization."""
    slot, slots = fp8.scale_slots(truth, block, cu)
    assert descale.shape[-1] == slots
    significand = torch.frexp(descale)[0] * 16
    assert torch.equal(significand, significand.round())
    for n in range(slots):
        members = truth[..., slot == n, :, :]
        top = members.abs().amax((-3, -1)) / 448.0 if members.numel() else 0.0 * descale[..., n]
        found = descale[..., n].double()
        wanted = (found >= top * (1 - 1e-6)) & (found <= top * 1.125 * (1 + 1e-6))
        assert torch.where(top == 0, found == 1, wanted).all()
    scale = fp8.descale_of_rows(descale.double(), truth, block, cu)
    wanted = fp8.quantize_with(truth, scale)[..., :rows, :, :]
    got = codes[..., :rows, :, :]
    assert not got.float().isnan().any()
    assert int((ordinal(got) - ordinal(wanted)).abs().max()) <= 1
    # A neighbour only where it is as near: 16-bit inputs over 4-bit scales often lie halfway.
    scale, exact = scale[..., :rows, :, :], truth[..., :rows, :, :]
    found, best = ((c.double() * scale - exact).abs() for c in (got, wanted))
    assert (found <= best + SLACK * scale).all()


def run(xs, stages, where, **kw):
    return torch.ops.fa3_train.prep(list(xs), stages, *where, **kw)


STAGES = {
    "rope+hadamard+quantize": ROPE | HADAMARD | QUANTIZE,
    "rope+quantize": ROPE | QUANTIZE,
    "hadamard+quantize": HADAMARD | QUANTIZE,
    "quantize": QUANTIZE,
    "rope+hadamard": ROPE | HADAMARD,
    "hadamard": HADAMARD,
    "rope": ROPE,
}


def rotations(dim: int) -> list[tuple[int, bool]]:
    """(rotary dim, interleaved)"""
    part = 32 if dim == 96 else dim // 2
    return [(dim, False), (dim, True), (part, False), (part, True)]


def variants(dim: int, stage: int) -> list[tuple[int, bool, bool, int]]:
    """(rotary dim, interleaved, position ids, block size): every value of each, not every mix."""
    blocks = (128, 64) if stage & QUANTIZE else (128, 128)
    if not stage & ROPE:
        return [(dim, False, False, block) for block in dict.fromkeys(blocks)]
    mixes = zip(rotations(dim), (False, True, True, False), (0, 1, 0, 1), strict=True)
    return [(*rotation, ids, blocks[block]) for rotation, ids, block in mixes]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("kind", ["1", "700", "packed"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_forward(dim, dtype, kind, name):
    seeded(dim, dtype, kind, name)
    lead, cu, rows = layout(kind)
    stage = STAGES[name]
    signs = fp8.random_signs(dim, 3).cuda()
    xs = [poisoned(lead, h, dim, dtype) for h in (5, 2, 1)]
    stages = [stage, stage, QUANTIZE if stage & QUANTIZE else stage]
    for rotary_dim, interleaved, with_ids, block in variants(dim, stage):
        tables = rope_tables(rotary_dim, POSITIONS, device="cuda")
        ids = None
        if with_ids:
            ids = torch.randint(0, POSITIONS, lead, device="cuda", dtype=torch.int32)
        where = (*tables, signs, ids, cu, interleaved, False, block)
        outs, again = run(xs, stages, where), run(xs, stages, where)
        for i, (x, s) in enumerate(zip(xs, stages, strict=True)):
            truth = fp8.rope_hadamard(
                x, *(tables if s & ROPE else (None, None)), signs if s & HADAMARD else None,
                interleaved=interleaved, position_ids=ids, cu_seqlens=cu, dtype=torch.float64,
            )  # fmt: skip
            bits = torch.uint8 if s & QUANTIZE else torch.int16
            a, b = (y[i][..., :rows, :, :].view(bits) for y in (outs, again))
            assert torch.equal(a, b)
            if s & QUANTIZE:
                check_codes(outs[i], outs[3 + i], truth, block, cu, rows)
            else:
                t = truth[..., :rows, :, :]
                numerics.assert_as_good(
                    outs[i][..., :rows, :, :], t, t.to(dtype), name=f"{name} {i}"
                )


@pytest.mark.parametrize("name", ["rope+hadamard", "hadamard", "rope"])
@pytest.mark.parametrize("kind", ["129", "packed"])
@pytest.mark.parametrize("source", ["bf16", "fp16", "fp32 to bf16", "fp32 to fp16"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_gradient(dim, source, kind, name):
    seeded(dim, source, kind, name)
    lead, cu, rows = layout(kind)
    out_dtype = FP16 if source.endswith("fp16") else BF16
    in_dtype = torch.float32 if source.startswith("fp32") else out_dtype
    signs = fp8.random_signs(dim, 4).cuda() if STAGES[name] & HADAMARD else None
    xs = [poisoned(lead, h, dim, in_dtype) for h in (33, 3)]
    for rotary_dim, interleaved in rotations(dim) if STAGES[name] & ROPE else [(dim, False)]:
        tables = rope_tables(rotary_dim, POSITIONS, device="cuda")
        tables = tables if STAGES[name] & ROPE else (None, None)
        kw = {"interleaved": interleaved, "cu_seqlens": cu}
        outs = preprocess.gradient(xs, *tables, signs, out_dtype=out_dtype, **kw)
        for x, out in zip(xs, outs, strict=True):
            truth = fp8.rope_hadamard_gradient(x, *tables, signs, dtype=torch.float64, **kw)
            truth = truth[..., :rows, :, :]
            numerics.assert_as_good(
                out[..., :rows, :, :], truth, truth.to(out_dtype), "grad", f"{name} {source}"
            )


@pytest.mark.parametrize("heads", [(1,), (8, 1), (33, 8, 8), (40, 24), (64, 64), (5, 9, 16)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_any_number_of_heads(dim, heads):
    seeded(dim, heads)
    xs = [poisoned((2, 70), h, dim, BF16) for h in heads]
    signs = fp8.random_signs(dim).cuda()
    tables = rope_tables(dim, 70, device="cuda")
    stages = [ROPE | HADAMARD] * len(xs)
    for out, x in zip(run(xs, stages, (*tables, signs, None, None, False, False)), xs, strict=True):
        truth = fp8.rope_hadamard(x, *tables, signs, dtype=torch.float64)
        numerics.assert_as_good(out, truth, truth.to(BF16))


@pytest.mark.parametrize(
    "dim,rotary_dim,interleaved",
    [(8, 8, False), (40, 20, False), (40, 20, True), (72, 72, False), (80, 32, False),
     (120, 90, False), (136, 136, True), (248, 240, False)],
)  # fmt: skip
def test_rotation_of_any_head_dim(dim, rotary_dim, interleaved):
    seeded(dim, rotary_dim, interleaved)
    for kind in ("130", "packed"):
        lead, cu, rows = layout(kind)
        q, k = (poisoned(lead, h, dim, BF16) for h in (7, 2))
        tables = rope_tables(rotary_dim, POSITIONS, device="cuda")
        kw = {"cu_seqlens": cu, "interleaved": interleaved}
        for out, x in zip(
            preprocess.rope(q, k, *tables, backend="hopper", **kw), (q, k), strict=True
        ):
            truth = fp8.rotate(x.double(), *tables, **kw)[..., :rows, :, :]
            numerics.assert_as_good(out[..., :rows, :, :], truth, truth.to(BF16))


def test_rope_trains_on_views_of_one_product():
    seeded("views")
    qkv = torch.randn(2, 300, 12, 128, device="cuda", dtype=BF16, requires_grad=True)
    q, k, _ = qkv.split([8, 2, 2], dim=-2)
    tables = rope_tables(128, 300, device="cuda")
    q1, k1 = preprocess.rope(q, k, *tables)
    gq, gk = torch.randn_like(q1), torch.randn_like(k1)
    (grad,) = torch.autograd.grad((q1, k1), qkv, (gq, gk))
    truth = torch.cat([fp8.rotate(g.double(), *tables, inverse=True) for g in (gq, gk)], -2)
    numerics.assert_as_good(grad[..., :10, :], truth, truth.to(BF16), "grad")
    assert not grad[..., 10:, :].any()


def test_rope_compiles_without_a_break():
    seeded("compile")
    q, k = (torch.randn(2, 64, h, 128, device="cuda", dtype=BF16) for h in (4, 2))
    tables = rope_tables(128, 64, device="cuda")
    q.requires_grad_()

    def loss(a, b):
        x, y = preprocess.rope(a, b, *tables)
        return (x.float() * y.float().repeat_interleave(2, -2)).sum()

    expected = torch.autograd.grad(loss(q, k), q)[0]
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k), q)[0]
    numerics.assert_as_good(found, expected.double(), expected, "grad")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["300", "packed"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_dequantization_is_exact(dim, kind, dtype):
    seeded(dim, kind, dtype)
    lead, cu, rows = layout(kind)
    xs = [poisoned(lead, h, dim, BF16) for h in (33, 2)]
    for block in (64, 128):
        where = (None, None, None, None, cu, False, False, block)
        c0, c1, d0, d1 = run(xs, [QUANTIZE] * 2, where)
        outs = preprocess.dequantize(
            [c0, c1], [d0, d1], cu_seqlens=cu, block_size=block, dtype=dtype
        )
        for out, c, d in zip(outs, (c0, c1), (d0, d1), strict=True):
            truth = fp8.dequantize_blocks(c, d, block, cu, torch.float64)[..., :rows, :, :]
            assert torch.equal(out[..., :rows, :, :], truth.to(dtype))
            if dtype == BF16:
                assert torch.equal(out[..., :rows, :, :].double(), truth)


@pytest.mark.parametrize("stage", [QUANTIZE, HADAMARD | QUANTIZE, ROPE | HADAMARD | QUANTIZE])
def test_broken_values_surface(stage):
    x = torch.randn(1, 384, 2, 128, device="cuda").to(BF16)
    x[0, 5, 0, 3] = math.nan
    x[0, 200, 1, 7] = -math.inf
    x[0, 256:, 0] = 0.0
    x[0, 256:, 1] = 1e-38
    tables = rope_tables(128, 384, device="cuda")
    codes, d = run([x], [stage], (*tables, fp8.random_signs(128).cuda(), None, None, False, False))
    bad = codes.float().isnan()
    assert d[0, 0, 0].isnan() and bad[0, :128, 0].all()
    assert d[0, 1, 1].isnan() and bad[0, 128:256, 1].all()
    assert d[0, 0, 2].item() == 1.0 and not codes[0, 256:, 0].float().any()
    assert d.isnan().sum() == 2 and bad.sum() == 2 * 128 * 128
    assert 0 < d[0, 1, 2].item() < 1e-37


def test_positions_outside_of_the_tables_surface():
    x = torch.randn(1, 256, 1, 128, device="cuda").to(BF16)
    tables = rope_tables(128, 200, device="cuda")
    ids = torch.arange(256, device="cuda", dtype=torch.int32)[None]
    _, d = fa3_train.rope_hadamard_quantize(x, *tables, position_ids=ids)
    assert d[0, 0, 0].isfinite() and d[0, 0, 1].isnan()
    q, k = preprocess.rope(x, x, *tables, position_ids=ids - 1)
    assert q[0, 0].isnan().all() and q[0, 1:201].isfinite().all() and q[0, 201:].isnan().all()


def test_unused_slots_of_a_packed_batch_hold_one():
    cu = torch.tensor([0, 0, 3, 3, 131, 131], dtype=torch.int32, device="cuda")
    x = torch.randn(131, 2, 64, device="cuda").to(BF16)
    _, d = run([x], [QUANTIZE], (None, None, None, None, cu, False, False))
    slot, slots = fp8.scale_slots(x, 128, cu)
    unused = sorted(set(range(slots)) - set(slot.tolist()))
    assert unused and (d[:, unused] == 1.0).all()


def test_captured_in_a_graph():
    x = torch.randn(1, 300, 4, 128, device="cuda").to(BF16)
    tables = rope_tables(128, 300, device="cuda")
    signs = fp8.random_signs(128).cuda()
    call = lambda: fa3_train.rope_hadamard_quantize(x, *tables, signs)  # noqa: E731
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, descale = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected, scale = call()
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(descale, scale)


def test_ops_keep_their_promises():
    x = torch.randn(2, 130, 2, 64, device="cuda").to(BF16)
    tables = rope_tables(64, 130, device="cuda")
    signs = fp8.random_signs(64).cuda()
    where = (*tables, signs, None, None, False, False)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fa3_train.prep, ([x], [3], *where), test_utils=tests)
    # The schema test compares tensors by allclose, which e4m3 does not have.
    torch.library.opcheck(
        torch.ops.fa3_train.prep, ([x], [7], *where), test_utils=("test_faketensor",)
    )
    codes, d = torch.ops.fa3_train.prep([x], [7], *where)
    torch.library.opcheck(
        torch.ops.fa3_train.dequantize,
        ([codes], [d], None, 128, BF16),
        test_utils=("test_faketensor",),
    )


def test_what_no_kernel_serves_is_refused_with_values():
    x = torch.randn(1, 8, 1, 128, device="cuda").to(BF16)
    odd = rope_tables(36, 8, device="cuda")
    with pytest.raises(RuntimeError, match="rotary_dim must be a multiple of 16 .* got 36"):
        fa3_train.rope_hadamard_quantize(x, *odd)
    with pytest.raises(ArgumentError, match="head_dim must be one of .* got 120"):
        fa3_train.rope_hadamard_quantize(x[..., :120].contiguous())


def test_empty_tensors():
    x = torch.empty(0, 5, 2, 64, device="cuda", dtype=BF16)
    codes, descale = fa3_train.rope_hadamard_quantize(x)
    assert codes.shape == x.shape and descale.shape == (0, 2, 1)
    cu = torch.zeros(3, dtype=torch.int32, device="cuda")
    codes, descale = fa3_train.rope_hadamard_quantize(x[:, 0], cu_seqlens=cu)
    assert codes.shape == (0, 2, 64) and (descale == 1).all()
