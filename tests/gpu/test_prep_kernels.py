"""Head dims 64 and 128 have two families of kernels: tensor cores, and FP32 alone (``options=1``).

Both against fp64, on outlier data, packed and dense, with tails of every kind; both to the same
tolerance. (test_prep.py holds the default of each request to more, among NaN.)
"""

from __future__ import annotations

import pytest
import torch

from fa3_train import numerics
from fa3_train import reference_fp8 as fp8
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE
from fa3_train.rotary import rope_tables

pytestmark = pytest.mark.gpu

PACKED = (5, 0, 128, 1, 300, 127, 0, 129)
LAYOUTS = {"two of 129": (2, 129), "one of 700": (1, 700), "packed": (sum(PACKED),)}
STAGES = [
    (mask, inverse)
    for mask in range(1, 8)
    for inverse in (False, True)
    if not (inverse and mask & QUANTIZE)
]
# FP32 against fp64, in units of the largest code: what may move a code to a neighbour as near.
ROUNDING = 448 * 8e-6


def ordinal(codes):
    """e4m3 codes as integers in the order of their values."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


@pytest.mark.parametrize("options", [0, 1])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_families(options, dim, dtype, layout):
    lead = LAYOUTS[layout]
    cu = None
    if layout == "packed":
        ends = torch.tensor([0, *PACKED]).cumsum(0)
        cu = ends.to(torch.int32).cuda()
    signs = fp8.random_signs(dim, 7).cuda()
    tables = rope_tables(dim, 800, device="cuda")
    g = torch.Generator("cuda").manual_seed(dim)
    xs = [
        numerics.outlier_normal(*lead, h, dim, generator=g, device="cuda").to(dtype)
        for h in (5, 3, 2)
    ]
    ids = torch.randint(0, 800, lead, generator=g, device="cuda", dtype=torch.int32)
    for mask, inverse in STAGES:
        for interleaved in (False, True) if mask & ROPE else (False,):
            stages = [mask, mask, QUANTIZE if mask & QUANTIZE else mask]
            positions = ids if (mask + interleaved + inverse) % 2 else None
            request = (
                xs, stages, *tables, signs, positions, cu, interleaved, inverse, 128, dtype,
                options,
            )  # fmt: skip
            outs = torch.ops.fa3_train.prep(*request)
            again = torch.ops.fa3_train.prep(*request)
            for i, (x, stage) in enumerate(zip(xs, stages, strict=True)):
                function = fp8.rope_hadamard_gradient if inverse else fp8.rope_hadamard
                truth = function(
                    x, *(tables if stage & ROPE else (None, None)),
                    signs if stage & HADAMARD else None, interleaved=interleaved,
                    position_ids=positions, cu_seqlens=cu, dtype=torch.float64,
                )  # fmt: skip
                name = f"stage {stage} interleaved {interleaved} inverse {inverse} tensor {i}"
                same = torch.uint8 if stage & QUANTIZE else torch.int16
                assert torch.equal(outs[i].view(same), again[i].view(same)), name
                if not stage & QUANTIZE:
                    numerics.assert_as_good(outs[i], truth, truth.to(dtype), name=name)
                    continue
                descale = outs[3 + i]
                expected = fp8.quantize_blocks(truth, 128, cu)[1]
                ratio = descale.double() / expected.double()
                assert ((ratio > 0.88) & (ratio < 1.126)).all(), name  # a step of 4 bits
                scale = fp8.descale_of_rows(descale.double(), truth, 128, cu)
                wanted = fp8.quantize_with(truth, scale)
                step = (ordinal(outs[i]) - ordinal(wanted)).abs()
                assert int(step.max()) <= 1, (name, int(step.max()))
                found, best = ((c.double() * scale - truth).abs() for c in (outs[i], wanted))
                assert (found <= best + ROUNDING * scale).all(), name


def test_families_differ():
    """``options`` reaches the kernels: the last bits of a gradient are those of another order."""
    x = torch.randn(2, 300, 4, 128, device="cuda").bfloat16()
    signs = fp8.random_signs(128, 7).cuda()
    a, b = (
        torch.ops.fa3_train.prep(
            [x],
            [HADAMARD],
            None,
            None,
            signs,
            None,
            None,
            False,
            False,
            128,
            None,
            options,
        )[0]
        for options in (0, 1)
    )
    assert not torch.equal(a, b)
    assert numerics.relative_rms_error(a, b) < 2e-3


def test_unknown_options_are_refused():
    x = torch.randn(1, 8, 2, 64, device="cuda").bfloat16()
    with pytest.raises(NotImplementedError, match="options must be 0 or 1, got 2"):
        torch.ops.fa3_train.prep(
            [x], [QUANTIZE], None, None, None, None, None, False, False, 128, None, 2
        )
