"""The tensor-core kernel of the preprocessing (``options=1``) against fp64.

It is not the default and young, so it runs in a process of its own: a fault there, which would
poison every later test of this process, or a hang, is a failure of this test only.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

CHECK = """
import itertools
import torch
from fa3_train import numerics
from fa3_train import reference_fp8 as fp8
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE
from fa3_train.rotary import rope_tables

torch.manual_seed(0)
packed = (5, 0, 128, 1, 300, 127, 0, 129)
cu = torch.tensor([0, *torch.tensor(packed).cumsum(0).tolist()], dtype=torch.int32).cuda()


def ordinal(codes):
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


masks = (7, 6, 5, 4, 3, 2)
layouts = (((2, 129), None), ((1, 700), None), ((sum(packed),), cu))
count = 0
for dim, dtype, (lead, starts), mask, inter in itertools.product(
    (64, 128), (torch.bfloat16, torch.float16), layouts, masks, (False, True)
):
    if inter and not mask & ROPE:
        continue
    for inverse in (False, True):
        if inverse and (mask & QUANTIZE or not mask & HADAMARD):
            continue
        signs = fp8.random_signs(dim, 7).cuda()
        tables = rope_tables(dim, 800, device="cuda")
        xs = [numerics.outlier_normal(*lead, h, dim, device="cuda").to(dtype) for h in (5, 3, 2)]
        stages = [mask, mask, QUANTIZE if mask & QUANTIZE else mask]
        ids = torch.randint(0, 800, lead, device="cuda", dtype=torch.int32) if count % 2 else None
        request = (xs, stages, *tables, signs, ids, starts, inter, inverse, 128, dtype, 1)
        outs = torch.ops.fa3_train.prep(*request)
        again = torch.ops.fa3_train.prep(*request)
        torch.cuda.synchronize()
        for i, (x, stage) in enumerate(zip(xs, stages)):
            function = fp8.rope_hadamard_gradient if inverse else fp8.rope_hadamard
            truth = function(
                x, *(tables if stage & ROPE else (None, None)), signs if stage & HADAMARD else None,
                interleaved=inter, position_ids=ids, cu_seqlens=starts, dtype=torch.float64,
            )
            name = f"d{dim} {dtype} {lead} stage {stage} interleaved {inter} inverse {inverse}"
            same = torch.uint8 if stage & QUANTIZE else torch.int16
            assert torch.equal(outs[i].view(same), again[i].view(same)), name
            if not stage & QUANTIZE:
                numerics.assert_as_good(outs[i], truth, truth.to(dtype), name=name)
                continue
            descale = outs[3 + i]
            expected = fp8.quantize_blocks(truth, 128, starts)[1]
            ratio = descale.double() / expected.double()
            assert ((ratio > 0.88) & (ratio < 1.126)).all(), name
            scale = fp8.descale_of_rows(descale.double(), truth, 128, starts)
            wanted = fp8.quantize_with(truth, scale)
            step = (ordinal(outs[i]) - ordinal(wanted)).abs()
            assert int(step.max()) <= 1, (name, int(step.max()))
            # bf16 high and low parts: 2^-17 of each rotated element
            found, best = ((c.double() * scale - truth).abs() for c in (outs[i], wanted))
            assert (found <= best + 448 * 8e-6 * scale).all(), name
        count += 1
print("cases", count)
"""


def test_tensor_core_kernel():
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("cases "), done.stdout
