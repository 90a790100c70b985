"""The backward kernels against fp64, by the rule of numerics.py, on inputs meant to break them.

Every case calls ``torch.ops.fa3_train.attn_bwd`` with ``out`` and ``lse`` rounded from the fp64
forward, so that a fault here is the backward's own; the last tests go through autograd. Inputs are
views into buffers full of NaN (gaps between heads and rows, rows past the last sequence), outputs
start as NaN where the test owns them, and every call is repeated: dK and dV must be bitwise equal,
dQ too in deterministic mode.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import pytest
import torch

import fa3_train
import fa3_train.ops.attention  # registers torch.ops.fa3_train.*
from fa3_train import numerics, reference

pytestmark = pytest.mark.gpu

WHOLE_GROUP, HEAD_BY_HEAD = 1, 2


@dataclass(frozen=True)
class Case:
    """One call. ``lengths``: (Sq, Sk) of each packed sequence, or None for dense."""

    batch: int = 1
    heads: int = 2
    groups: int = 2
    seqlen_q: int = 64
    seqlen_k: int = 128
    dim: int = 128
    dim_v: int | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    dlse: bool = False
    deterministic: bool = False
    options: int = 0
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[tuple[int, int], ...] | None = None
    tail_rows: int = 0  # packed rows beyond the last sequence

    def __str__(self) -> str:
        shape = (
            "+".join(f"{a}x{b}" for a, b in self.lengths)
            if self.lengths is not None
            else f"b{self.batch}-{self.seqlen_q}x{self.seqlen_k}"
        )
        words = [f"d{self.dim}" + (f"v{self.dim_v}" if self.dim_v else ""), shape]
        words.append(f"h{self.heads}.{self.groups}")
        words += ["causal"] * self.causal + [f"w{self.window[0]}.{self.window[1]}"] * (
            self.window != (-1, -1)
        )
        words += [f"cap{self.softcap:g}"] * bool(self.softcap) + ["sink"] * self.sink
        words += ["dlse"] * self.dlse + ["det"] * self.deterministic
        words += [f"opt{self.options}"] * bool(self.options)
        words += ["fp16"] * (self.dtype == torch.float16)
        return "-".join(words)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Random values in a view whose surroundings (other columns, heads, rows) are NaN."""
    *outer, tokens, heads, dim = shape
    buffer = torch.full(
        (*outer, tokens + 3, heads + 1, dim + 8), math.nan, dtype=dtype, device="cuda"
    )
    view = buffer[..., 1 : tokens + 1, :heads, :dim]
    view.copy_(torch.randn(shape, device="cuda") * scale)
    return view


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    max_q: int
    max_k: int
    sink: torch.Tensor | None
    dlse: torch.Tensor | None


def make_inputs(case: Case) -> Inputs:
    torch.manual_seed(zlib.crc32(str(case).encode()))
    dim_v = case.dim_v or case.dim
    if case.lengths is None:
        lead_q, lead_k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
        cu_q = cu_k = None
        max_q, max_k = case.seqlen_q, case.seqlen_k
        lse_shape = (case.batch, case.heads, case.seqlen_q)
    else:
        ends_q = [0, *torch.tensor([a for a, _ in case.lengths]).cumsum(0).tolist()]
        ends_k = [0, *torch.tensor([b for _, b in case.lengths]).cumsum(0).tolist()]
        cu_q = torch.tensor(ends_q, dtype=torch.int32, device="cuda")
        cu_k = torch.tensor(ends_k, dtype=torch.int32, device="cuda")
        lead_q, lead_k = (ends_q[-1] + case.tail_rows,), (ends_k[-1] + case.tail_rows,)
        max_q = max(a for a, _ in case.lengths)
        max_k = max(b for _, b in case.lengths)
        lse_shape = (case.heads, lead_q[0])
    q = poisoned((*lead_q, case.heads, case.dim), case.dtype)
    k = poisoned((*lead_k, case.groups, case.dim), case.dtype)
    v = poisoned((*lead_k, case.groups, dim_v), case.dtype)
    dout = poisoned((*lead_q, case.heads, dim_v), case.dtype)
    if case.tail_rows:  # nobody may read these, nor let them into a neighbour's sums
        for x in (q, k, v, dout):
            x[-case.tail_rows :] = math.nan
    sink = torch.randn(case.heads, device="cuda") if case.sink else None
    dlse = torch.randn(lse_shape, device="cuda") if case.dlse else None
    return Inputs(q, k, v, dout, cu_q, cu_k, max_q, max_k, sink, dlse)


def used_rows(case: Case, x: torch.Tensor) -> torch.Tensor:
    """Without the rows beyond the last packed sequence."""
    return x[: x.shape[0] - case.tail_rows] if case.tail_rows else x


def truth_and_baseline(case: Case, x: Inputs):
    """fp64 out, lse and gradients; the gradients of plain PyTorch in the case's dtype."""
    options = {
        "causal": case.causal, "window_size": case.window, "softcap": case.softcap,
        "cu_seqlens_q": x.cu_q, "cu_seqlens_k": x.cu_k,
    }  # fmt: skip
    q, k, v, dout = (used_rows(case, y) for y in (x.q, x.k, x.v, x.dout))
    dlse = x.dlse
    if dlse is not None and case.tail_rows:
        dlse = dlse[:, : -case.tail_rows]
    out, lse, truth = reference.attention_gradients(
        dout, q, k, v, dlse=dlse, sink=x.sink, **options
    )
    *_, baseline = reference.attention_gradients(
        dout, q, k, v, dlse=dlse, sink=x.sink, emulated=True, **options
    )
    return out, lse, truth, baseline


def call(case: Case, x: Inputs, out: torch.Tensor, lse: torch.Tensor):
    return torch.ops.fa3_train.attn_bwd(
        x.dout, x.q, x.k, x.v, out, lse, x.dlse, x.cu_q, x.cu_k, x.sink, x.max_q, x.max_k,
        case.dim**-0.5, case.causal, *case.window, case.softcap, case.deterministic, case.options,
    )  # fmt: skip


def rounded_forward(case: Case, x: Inputs, out: torch.Tensor, lse: torch.Tensor):
    """What a forward kernel would have saved, with NaN around it."""
    full = poisoned((*x.q.shape[:-1], out.shape[-1]), case.dtype)
    full.fill_(math.nan)
    full[: out.shape[0]] = out.to(case.dtype)
    saved_lse = lse.float()
    if case.tail_rows:
        saved_lse = torch.cat(
            [saved_lse, saved_lse.new_full((case.heads, case.tail_rows), math.nan)], 1
        )
    return full, saved_lse.contiguous()


def check(case: Case) -> list[str]:
    """Faults of one case, in words. Empty: none."""
    x = make_inputs(case)
    out, lse, truth, baseline = truth_and_baseline(case, x)
    saved_out, saved_lse = rounded_forward(case, x, out, lse)
    first = call(case, x, saved_out, saved_lse)
    again = call(case, x, saved_out, saved_lse)
    faults = []
    for i, name in enumerate(("dq", "dk", "dv")):
        got, twin = (used_rows(case, y[i]) for y in (first, again))
        result = numerics.compare(got, truth[i], baseline[i], "grad", name)
        if not result.ok:
            faults.append(str(result))
        if (i > 0 or case.deterministic) and not torch.equal(got, twin):
            faults.append(f"{name} differs between two calls")
    if case.sink:
        result = numerics.compare(first[3], truth.dsink, baseline.dsink, "grad", "dsink")
        if not result.ok:
            faults.append(str(result))
        if not torch.equal(first[3], again[3]):
            faults.append("dsink differs between two calls")
    return faults


D64 = {"dim": 64}
SHAPES = [
    {"seqlen_q": 1, "seqlen_k": 3},
    {"seqlen_q": 63, "seqlen_k": 129},
    {"seqlen_q": 200, "seqlen_k": 333, "batch": 2},
    {"seqlen_q": 333, "seqlen_k": 200, "batch": 2, "heads": 4},
    {"seqlen_q": 257, "seqlen_k": 513},
    {"seqlen_q": 130, "seqlen_k": 64, "batch": 3},
    {"seqlen_q": 512, "seqlen_k": 512, "heads": 8, "batch": 8},
    {"seqlen_q": 1000, "seqlen_k": 2048, "heads": 8},
]
DIMS = [
    {"dim": 64}, {"dim": 96}, {"dim": 128}, {"dim": 192}, {"dim": 256},
    {"dim": 192, "dim_v": 128}, {"dim": 40}, {"dim": 80}, {"dim": 104}, {"dim": 160}, {"dim": 200},
]  # fmt: skip
PACKED = ((100, 100), (0, 5), (257, 300), (1, 1), (64, 0), (128, 128), (333, 200))


def cases() -> list[Case]:
    found = []
    for dims in DIMS:
        own_bucket = dims["dim"] in (64, 96, 128, 192, 256)
        shapes = (
            SHAPES if dims["dim"] in (64, 128, 256) else SHAPES[2:5] if own_bucket else SHAPES[3:4]
        )
        for shape in shapes:
            for causal in (False, True):
                groups = shape.get("heads", 2)
                found.append(Case(**{"groups": groups, "causal": causal, **shape, **dims}))
    for dims in DIMS[:6]:
        base = Case(batch=2, heads=4, groups=2, seqlen_q=300, seqlen_k=450, causal=True, **dims)
        found += [
            replace(base, options=WHOLE_GROUP),
            replace(base, options=HEAD_BY_HEAD),
            replace(base, groups=1, options=HEAD_BY_HEAD, deterministic=True),
            replace(base, groups=1, options=WHOLE_GROUP, deterministic=True, causal=False),
            replace(base, dtype=torch.float16),
            replace(base, dtype=torch.float16, causal=False, groups=4),
            replace(base, causal=False, window=(70, 40)),
            replace(base, causal=False, window=(-1, 130)),
            replace(base, causal=False, window=(33, -1), deterministic=True),
            replace(base, window=(128, -1), deterministic=True),
            replace(base, seqlen_q=450, seqlen_k=200, window=(100, 0), deterministic=True),
            replace(base, softcap=15.0),
            replace(base, softcap=15.0, causal=False, window=(64, 64), dtype=torch.float16),
            replace(base, sink=True, dlse=True),
            replace(base, sink=True, seqlen_q=450, seqlen_k=200),
            replace(base, dlse=True, causal=False, groups=1),
            replace(base, deterministic=True, causal=False),
            replace(
                base, deterministic=True, batch=1, heads=6, groups=3, seqlen_q=900, seqlen_k=900
            ),
        ]
        # One block walks over 16 heads: long enough for dQ to be rounded by a kernel of its own.
        long = replace(base, heads=32, seqlen_q=700, seqlen_k=900, options=WHOLE_GROUP)
        long_packed = replace(long, lengths=((700, 900), (500, 300)), tail_rows=5)
        if dims["dim"] <= 128:
            found += [
                long,
                replace(long, deterministic=True),
                replace(long, deterministic=True, causal=False),
                replace(long, causal=False, window=(100, 40)),
                replace(long, seqlen_q=900, seqlen_k=700, sink=True, dlse=True),
                replace(long, softcap=15.0),
                replace(long, dtype=torch.float16, causal=False),
                long_packed,
                replace(long_packed, deterministic=True),
            ]
        packed = replace(base, lengths=PACKED, tail_rows=5)
        found += [
            packed,
            replace(packed, causal=False),
            replace(packed, causal=False, groups=1, options=HEAD_BY_HEAD),
            replace(packed, window=(50, 0), deterministic=True, sink=True, dlse=True),
            replace(packed, softcap=20.0, dtype=torch.float16),
            replace(packed, deterministic=True, causal=False, heads=2, groups=1),
        ]
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_gradients(case: Case) -> None:
    assert not check(case)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_neighbours_nan_stays_there(dim: int) -> None:
    """NaN in one packed sequence: the others' gradients do not change by a bit."""
    case = Case(heads=2, groups=2, dim=dim, causal=True, lengths=((70, 70), (50, 50), (150, 150)))
    x = make_inputs(case)
    out, lse, *_ = truth_and_baseline(case, x)
    saved = rounded_forward(case, x, out, lse)
    clean = call(replace(case, deterministic=True), x, *saved)
    for y in (x.q, x.k, x.v, x.dout):
        y[70:120] = math.nan
    dirty = call(replace(case, deterministic=True), x, *saved)
    for a, b in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(a[:70], b[:70])
        assert torch.equal(a[120:], b[120:])


@pytest.mark.parametrize("heads,options", [(4, 0), (4, HEAD_BY_HEAD), (64, WHOLE_GROUP)])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_accumulate_adds_to_what_is_there(dim: int, heads: int, options: int) -> None:
    """The fp32 form equals the start values plus the gradient, more exactly than 16 bits could."""
    case = Case(heads=heads, groups=2, seqlen_q=300, seqlen_k=400, dim=dim, causal=True)
    x = make_inputs(case)
    out, lse, truth, baseline = truth_and_baseline(case, x)
    saved = rounded_forward(case, x, out, lse)
    starts = [torch.randn(y.shape, device="cuda") for y in (x.q, x.k, x.v)]
    sums = [y.clone() for y in starts]
    torch.ops.fa3_train.attn_bwd_accumulate(
        x.dout, x.q, x.k, x.v, *saved, None, None, None, None, *sums, None, x.max_q, x.max_k,
        dim**-0.5, True, -1, -1, 0.0, False, options,
    )  # fmt: skip
    for name, got, start, t, b in zip(
        ("dq", "dk", "dv"), sums, starts, truth, baseline, strict=False
    ):
        numerics.assert_as_good(got - start, t, b, "accum", name)


# Heads a group: the gain that must never be lost. The goal of 2 has a test of its own below.
SUM_GAIN = {8: 1.5, 16: 1.9}


def group_gradients(dim: int, heads: int, groups: int):
    """For dk and dv: (rounded, its FP32 sums, error, error of adding 16-bit heads)."""
    case = Case(
        heads=heads, groups=groups, seqlen_q=256, seqlen_k=256, dim=dim, causal=True,
        options=WHOLE_GROUP,
    )  # fmt: skip
    x = make_inputs(case)
    out, lse, truth, _ = truth_and_baseline(case, x)
    saved_out, saved_lse = rounded_forward(case, x, out, lse)
    grouped = call(case, x, saved_out, saved_lse)
    sums = [torch.zeros(y.shape, device="cuda") for y in (x.q, x.k, x.v)]
    torch.ops.fa3_train.attn_bwd_accumulate(
        x.dout, x.q, x.k, x.v, saved_out, saved_lse, None, None, None, None, *sums, None,
        x.max_q, x.max_k, dim**-0.5, True, -1, -1, 0.0, False, WHOLE_GROUP,
    )  # fmt: skip
    size = heads // groups
    single = replace(case, groups=heads)
    wide = replace_inputs(x, k=x.k.repeat_interleave(size, 2), v=x.v.repeat_interleave(size, 2))
    per_head = call(single, wide, saved_out, saved_lse)
    for i in (1, 2):
        naive = torch.zeros_like(grouped[i])
        for member in per_head[i].unflatten(2, (groups, size)).unbind(3):
            naive += member
        errors = (numerics.rms_error(g, truth[i]) for g in (grouped[i], naive))
        yield grouped[i], sums[i].to(case.dtype), *errors


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads,groups", [(32, 4), (16, 1)])
def test_group_sums_are_fp32(dim: int, heads: int, groups: int) -> None:
    """dK and dV are the FP32 sums over the group, rounded once; adding 16-bit heads is worse."""
    for rounded, sums, ours, naive in group_gradients(dim, heads, groups):
        assert torch.equal(rounded, sums)
        assert ours * SUM_GAIN[heads // groups] <= naive


# What is left of the error is mostly the rounding of P and dS to 16 bits, which both ways share
# (docs/backward.md, GQA). Measured gain where it is under the goal:
UNDER_THE_GOAL = {(64, 32, 4): 1.77, (128, 32, 4): 1.77, (256, 32, 4): 1.59, (256, 16, 1): 1.99}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("heads,groups", [(32, 4), (16, 1)])
def test_group_sums_halve_the_error(request, dim: int, heads: int, groups: int) -> None:
    """The goal: at most half the error of adding 16-bit heads."""
    gain = UNDER_THE_GOAL.get((dim, heads, groups))
    if gain is not None:
        request.applymarker(pytest.mark.xfail(reason=f"measured {gain} on an H200"))
    for _, _, ours, naive in group_gradients(dim, heads, groups):
        assert ours * 2 <= naive


def replace_inputs(x: Inputs, **changes) -> Inputs:
    return Inputs(**{**x.__dict__, **changes})


@pytest.mark.parametrize("heads,options", [(4, HEAD_BY_HEAD), (32, WHOLE_GROUP)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_thousand_repeats(dim: int, heads: int, options: int) -> None:
    """dK, dV, and dQ in deterministic mode: the same bits every time, under varied co-load."""
    case = Case(batch=2, heads=heads, groups=2, seqlen_q=540, seqlen_k=700, dim=dim, causal=True,
                deterministic=True, options=options)  # fmt: skip
    x = make_inputs(case)
    out, lse, *_ = truth_and_baseline(case, x)
    saved = rounded_forward(case, x, out, lse)
    first = call(case, x, *saved)
    side = torch.cuda.Stream()
    load = torch.randn(2048, 2048, device="cuda")
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for i in range(1000):
        if i % 7 == 0:
            with torch.cuda.stream(side):
                load @ load
        again = call(case, x, *saved)
        for a, b in zip(first[:3], again[:3], strict=True):
            differs |= (a.view(torch.int16) != b.view(torch.int16)).any()
    assert not differs.item()


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_through_autograd(dim: int, causal: bool) -> None:
    """flash_attn_func end to end; dout is a transposed view, as upstream code makes it."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 300, h, dim, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2)
    )
    dout = torch.randn(2, 4, 300, dim, device="cuda").bfloat16().transpose(1, 2)
    out = fa3_train.flash_attn_func(q, k, v, causal=causal, backend="hopper")
    out.backward(dout)
    *_, truth = reference.attention_gradients(dout, q, k, v, causal=causal)
    *_, baseline = reference.attention_gradients(dout, q, k, v, causal=causal, emulated=True)
    for name, leaf, t, b in zip(("dq", "dk", "dv"), (q, k, v), truth, baseline, strict=False):
        numerics.assert_as_good(leaf.grad, t, b, "grad", name)
