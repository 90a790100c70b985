"""The forward kernels against fp64, by the rule of numerics.py, on inputs meant to break them.

Inputs are views into buffers full of NaN: between heads, between rows, around the tensor, and in
packed tensors before, after and (as rows that belong to no sequence) behind the sequences. Every
call of the matrix is made twice and must be bitwise equal.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass, replace

import pytest
import torch

import fa3_train
import fa3_train.ops.attention  # registers torch.ops.fa3_train.*
from fa3_train import _lib, numerics, reference

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One call. ``lengths``: (Sq, Sk) of each packed sequence, or None for dense."""

    seqlen_q: int = 128
    seqlen_k: int = 128
    dim: int = 128
    dim_v: int | None = None
    batch: int = 2
    heads: int = 4
    groups: int = 2
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    dtype: torch.dtype = BF16
    lengths: tuple[tuple[int, int], ...] | None = None
    tail: int = 0  # packed rows behind the last sequence
    scale: float | None = None
    spread: float = 1.0  # standard deviation of q: large values make peaked rows

    def __str__(self) -> str:
        packed = self.lengths is not None
        shape = f"{len(self.lengths)}seqs" if packed else f"{self.seqlen_q}x{self.seqlen_k}"
        words = [shape, f"d{self.dim}" + (f"v{self.dim_v}" if self.dim_v else "")]
        words += [f"h{self.heads}.{self.groups}"] + ["causal"] * self.causal
        words += [f"w{self.window[0]}.{self.window[1]}"] * (self.window != (-1, -1))
        words += [f"cap{self.softcap:g}"] * bool(self.softcap) + ["sink"] * self.sink
        words += ["fp16"] * (self.dtype == FP16) + [f"spread{self.spread:g}"] * (self.spread != 1)
        return "-".join(words)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """Random values in a view whose surroundings (other columns, heads, rows) are NaN."""
    *outer, tokens, heads, dim = shape
    buffer = torch.full((*outer, tokens + 3, heads + 1, dim + 8), math.nan, dtype=dtype)
    buffer = buffer.cuda()
    view = buffer[..., 1 : tokens + 1, :heads, :dim]
    view.copy_(torch.randn(shape, device="cuda") * spread)
    return view


def run(case: Case):
    """out, lse of the kernel, the truth, and PyTorch at the same precision."""
    torch.manual_seed(zlib.crc32(str(case).encode()))
    dim_v = case.dim_v or case.dim
    options = {
        "softmax_scale": case.scale,
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "sink": torch.randn(case.heads, device="cuda") if case.sink else None,
    }
    if case.lengths is None:
        q = poisoned((case.batch, case.seqlen_q, case.heads, case.dim), case.dtype, case.spread)
        k = poisoned((case.batch, case.seqlen_k, case.groups, case.dim), case.dtype)
        v = poisoned((case.batch, case.seqlen_k, case.groups, dim_v), case.dtype)
        cu = {}

        def call():
            return fa3_train.flash_attn_func(q, k, v, **options, return_lse=True, backend="hopper")
    else:
        ends_q = [0, *itertools.accumulate(a for a, _ in case.lengths)]
        ends_k = [0, *itertools.accumulate(b for _, b in case.lengths)]
        q = poisoned((ends_q[-1] + case.tail, case.heads, case.dim), case.dtype, case.spread)
        k = poisoned((ends_k[-1] + case.tail, case.groups, case.dim), case.dtype)
        v = poisoned((ends_k[-1] + case.tail, case.groups, dim_v), case.dtype)
        if case.tail:  # rows that belong to no sequence
            q[ends_q[-1] :], k[ends_k[-1] :], v[ends_k[-1] :] = math.nan, math.nan, math.nan
        cu = {
            "cu_seqlens_q": torch.tensor(ends_q, dtype=torch.int32, device="cuda"),
            "cu_seqlens_k": torch.tensor(ends_k, dtype=torch.int32, device="cuda"),
        }
        longest = [max((x[i] for x in case.lengths), default=0) for i in (0, 1)]

        def call():
            return fa3_train.flash_attn_varlen_func(
                q, k, v, *cu.values(), *longest, **options, return_lse=True, backend="hopper"
            )

    rows = slice(0, None if case.lengths is None else ends_q[-1])  # others are undefined
    first = call()
    # Fresh allocations are likely to reuse this memory: what is not written would show as NaN.
    scratch = [torch.full_like(x, math.nan) for x in first for _ in range(2)]
    del scratch
    second = call()
    if case.lengths is not None:
        first, second = [(out[rows], lse[:, rows].contiguous()) for out, lse in (first, second)]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "not repeatable"
    if case.lengths is not None:
        q = q[rows]
    truth = reference.attention(q, k, v, **options, **cu)
    naive = reference.attention_emulated(q, k, v, **options, **cu)
    return first, truth, naive


def judge(case: Case) -> None:
    (out, lse), truth, naive = run(case)
    numerics.assert_as_good(out, truth[0], naive[0], "out")
    numerics.assert_as_good(lse, truth[1], naive[1], "lse")


def test_ids_are_unique() -> None:
    for cases in (DENSE, PACKED):
        names = [str(case) for case in cases]
        assert len(names) == len(set(names))


SHAPES = [
    (113, 203),
    (799, 3),
    (1023, 1024),
    (1024, 1023),
    (128, 128),
    (1, 1),
    (64, 300),
    (300, 64),
]
DIMS = [64, 96, 128, 192, 256]
BASE = Case()
DENSE = (
    [
        replace(BASE, seqlen_q=a, seqlen_k=b, dim=d, causal=c)
        for (a, b), d, c in itertools.product(SHAPES, DIMS, (False, True))
    ]
    # fp16, all buckets, and head dims inside a bucket (the columns beyond are another head, or NaN)
    + [replace(BASE, seqlen_q=257, seqlen_k=515, dim=d, dtype=FP16, causal=True) for d in DIMS]
    + [
        replace(BASE, seqlen_q=200, seqlen_k=333, dim=d, causal=c)
        for d, c in itertools.product((8, 40, 72, 80, 104, 120, 136, 160, 200, 248), (False, True))
    ]
    + [
        replace(BASE, seqlen_q=200, seqlen_k=333, dim=192, dim_v=128, causal=c, dtype=t)
        for c, t in itertools.product((False, True), (BF16, FP16))
    ]
    # windows: with and without rows that see nothing, narrower and wider than a block
    + [
        replace(BASE, seqlen_q=a, seqlen_k=b, dim=d, window=w)
        for (a, b), d, w in itertools.product(
            [(333, 333), (500, 200), (200, 500)],
            (64, 128, 256),
            [(0, 0), (17, 0), (0, 33), (128, 128), (300, -1), (-1, 40)],
        )
    ]
    + [replace(BASE, seqlen_q=700, seqlen_k=900, dim=d, window=(150, 0)) for d in (96, 192)]
    + [
        replace(BASE, seqlen_q=300, seqlen_k=410, dim=d, softcap=15.0, causal=c, window=w)
        for d in (64, 128, 192, 256)
        for c, w in [(False, (-1, -1)), (True, (-1, -1)), (False, (60, 20))]
    ]
    + [
        replace(BASE, seqlen_q=300, seqlen_k=200, dim=d, sink=True, causal=c)
        for d, c in itertools.product((64, 128, 256), (False, True))
    ]
    + [
        replace(BASE, seqlen_q=130, seqlen_k=0, dim=d, sink=s)
        for d in (64, 128)
        for s in (False, True)
    ]
    # head ratios
    + [
        replace(BASE, seqlen_q=260, seqlen_k=260, heads=h, groups=g, batch=3, causal=True)
        for h, g in [(1, 1), (6, 6), (8, 2), (5, 1), (32, 8)]
    ]
    # peaked rows, tiny and huge scales: the reference maximum has to move
    + [
        replace(BASE, seqlen_q=512, seqlen_k=1500, dim=d, spread=s, dtype=t, causal=c)
        for d, s, t, c in itertools.product((64, 128), (30.0,), (BF16, FP16), (False, True))
    ]
    + [replace(BASE, seqlen_q=512, seqlen_k=777, spread=1.0, scale=40.0, heads=2)]
)
PACKED = [
    replace(BASE, lengths=lengths, tail=tail, dim=d, causal=c)
    for (lengths, tail), d, c in itertools.product(
        [
            (((100, 100), (0, 0), (199, 199), (1, 1)), 0),
            (((130, 7), (5, 300), (0, 40), (64, 0), (129, 257)), 37),
            (tuple((1 + 37 * i % 211, 1 + 53 * i % 307) for i in range(40)), 5),
        ],
        (64, 96, 128, 256),
        (False, True),
    )
] + [
    replace(BASE, lengths=((300, 300), (77, 200), (513, 513)), tail=9, dim=d, **options)
    for d in (64, 128, 192)
    for options in (
        {"window": (100, 0)},
        {"softcap": 20.0, "causal": True},
        {"sink": True, "causal": True},
        {"dtype": FP16},
    )
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(case: Case) -> None:
    judge(case)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed(case: Case) -> None:
    judge(case)


def test_packed_by_thousands() -> None:
    """More sequences than the order kernel sorts, most of them empty or one token long."""
    lengths = tuple((i % 3, i % 2 + i % 3) for i in range(5000))
    judge(replace(BASE, lengths=lengths, dim=64, heads=2, groups=1, causal=True))


@pytest.mark.parametrize("causal,limit", [(False, 1.54e-4), (True, 1.35e-4)])
def test_error_on_the_papers_outlier_data(causal: bool, limit: float) -> None:
    """Paper, table 3: N(0, 1) + N(0, 100) Bernoulli(0.001), fp16. The paper reports 1.9e-4; the
    limits are what every flash kernel of today gives here."""
    torch.manual_seed(0)
    shape = (2, 2048, 8, 128)
    q, k, v = (numerics.outlier_normal(*shape, device="cuda").to(FP16) for _ in range(3))
    out = fa3_train.flash_attn_func(q, k, v, causal=causal, backend="hopper")
    truth, _ = reference.attention(q, k, v, causal=causal)
    error = numerics.rms_error(out, truth)
    print(f"rmse {error:.3e}")
    assert error <= limit


def exact_maximum(q, k, v, causal: bool, scale: float) -> torch.Tensor:
    """What FlashAttention-3 computes: P relative to the true maximum, rounded for P V, summed in
    FP32; everything else in fp64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    s = q @ k.transpose(2, 3) * scale
    if causal:
        s.masked_fill_(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), -math.inf)
    weights = (s - s.amax(-1, keepdim=True)).exp()
    out = weights.to(BF16).double() @ v / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(BF16)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_error_is_that_of_the_true_maximum(dim: int, causal: bool, outliers: bool) -> None:
    """No shortcut with the row maximum: one that lags is 3 to 5 % worse here."""
    torch.manual_seed(dim)
    draw = numerics.outlier_normal if outliers else torch.randn
    q, k, v = (draw(1, 4096, 4, dim, device="cuda").to(BF16) for _ in range(3))
    out = fa3_train.flash_attn_func(q, k, v, causal=causal, backend="hopper")
    truth, _ = reference.attention(q, k, v, causal=causal)
    yardstick = numerics.rms_error(exact_maximum(q, k, v, causal, dim**-0.5), truth)
    error = numerics.rms_error(out, truth)
    print(f"rmse {error:.4e}, {error / yardstick:.4f} of the yardstick")
    assert error <= 1.004 * yardstick


@pytest.mark.parametrize("step", [0.05, 3.0, 40.0, 900.0, -3.0, -900.0])
@pytest.mark.parametrize("dim", DIMS)
def test_scores_that_drift(dim: int, step: float) -> None:
    """Scores rise (or fall) along the keys by `step` a key block in log2 units, all negative or all
    positive: new maxima in every block or in none, by so much that 2^difference overflows."""
    torch.manual_seed(dim)
    q, k, v = (torch.randn(1, 1200, 2, dim, device="cuda", dtype=BF16) for _ in range(3))
    ramp = torch.arange(1200, 0, -1, device="cuda") // 64 * (step / 2)
    for sign in (1.0, -1.0):
        q[..., 0] = sign
        k[..., 0] = (sign * (ramp - (0 if sign > 0 else ramp.max())))[None, :, None].to(BF16)
        for causal in (False, True):
            options = {"causal": causal, "softmax_scale": math.log(2.0)}
            out, lse = fa3_train.flash_attn_func(
                q, k, v, **options, return_lse=True, backend="hopper"
            )
            truth = reference.attention(q, k, v, **options)
            naive = reference.attention_emulated(q, k, v, **options)
            yardstick = exact_maximum(q, k, v, causal, math.log(2.0))
            numerics.assert_as_good(out, truth[0], yardstick, "out")
            numerics.assert_as_good(lse, truth[1], naive[1], "lse")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dim,causal", [(64, True), (128, False), (128, True), (256, True)])
def test_bitwise_repeats_under_co_load(dim: int, causal: bool, packed: bool) -> None:
    """1,000 launches beside another stream that keeps the memory system and some SMs busy."""
    torch.manual_seed(dim)
    shape = (2200, 4, dim) if packed else (2, 1100, 4, dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=BF16) for _ in range(3))
    cu = torch.tensor([0, 700, 701, 2200], dtype=torch.int32, device="cuda") if packed else None
    arguments = (q, k, v, cu, cu, None, 1500, 1500, 0.1, causal, -1, -1, 0.0)
    expected = torch.ops.fa3_train.attn_fwd(*arguments)
    a = torch.randn(1024, 1024, device="cuda", dtype=BF16)
    noise = torch.empty(1 << 22, device="cuda")
    side = torch.cuda.Stream()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(1000):
        with torch.cuda.stream(side):
            noise.normal_() if i % 3 else torch.mm(a, a)
        out = torch.ops.fa3_train.attn_fwd(*arguments)
        for x, y in zip(out, expected, strict=True):
            wrong += (x != y).any()
    assert wrong.item() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graph(packed: bool) -> None:
    """Captured once, replayed on new contents (and, packed, new cu_seqlens) of the same buffers."""
    torch.manual_seed(0)
    shape = (900, 4, 128) if packed else (2, 450, 4, 128)
    q, k, v = (torch.randn(shape, device="cuda", dtype=BF16) for _ in range(3))
    cu = torch.tensor([0, 100, 900], dtype=torch.int32, device="cuda")

    def call():
        if packed:
            return fa3_train.flash_attn_varlen_func(
                q, k, v, cu, cu, 900, 900, causal=True, backend="hopper"
            )
        return fa3_train.flash_attn_func(q, k, v, causal=True, backend="hopper")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        cu[1] = int(torch.randint(0, 900, ()))
        captured.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, call())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("option", sorted(_lib.OPTIONS))
def test_ablation_kernels_agree(option: str, causal: bool) -> None:
    """A technique switched off changes the speed, not the result (beyond rounding)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 777, 4, 128, device="cuda", dtype=BF16) for _ in range(3))
    out, lse = torch.ops.fa3_train.attn_fwd(
        q, k, v, None, None, None, 777, 777, 128**-0.5, causal, -1, -1, 0.0, _lib.OPTIONS[option]
    )
    truth = reference.attention(q, k, v, causal=causal)
    naive = reference.attention_emulated(q, k, v, causal=causal)
    numerics.assert_as_good(out, truth[0], naive[0], "out")
    numerics.assert_as_good(lse, truth[1], naive[1], "lse")


def test_ablation_of_what_has_no_such_kernel_is_refused() -> None:
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=BF16)
    with pytest.raises(_lib.Unsupported, match="ablation"):
        torch.ops.fa3_train.attn_fwd(
            q, q, q, None, None, None, 64, 64, 0.1, False, -1, -1, 0.0, _lib.OPTIONS["no_overlap"]
        )


def test_bad_values_reach_an_error_message() -> None:
    """Below the Python checks the library has its own: a message with argument, rule, value."""
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=BF16)
    with pytest.raises(_lib.LibraryError, match=r"softmax_scale must be positive.*got -1"):
        torch.ops.fa3_train.attn_fwd(q, q, q, None, None, None, 64, 64, -1.0, False, -1, -1, 0.0)
