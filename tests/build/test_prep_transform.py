"""The Hadamard matrices of the tile kernel, multiplied out on the CPU with the orders of wgmma.

``csrc/prep/transform.cuh`` packs eight columns at a time by bit tricks, in an order that follows
the fragments. Here the fragments are written out from the PTX ISA: thread t of a warpgroup, its A
registers (or the rows as TMA leaves them) and its accumulators.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fa3_train import reference_fp8

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.build

SOURCE = """
#include "prep/transform.cuh"
extern "C" void matrix_row(uint32_t* out, uint32_t one, const uint32_t* signs, int n, int slots) {
  for (int unit = 0; unit < 8; ++unit) {
    uint32_t w[4];
    fa3::prep::matrix_unit(w, one, signs, n, unit, slots != 0);
    for (int j = 0; j < 4; ++j) out[4 * unit + j] = w[j];
  }
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("transform")
    generator = ROOT / "csrc/ptx/gen_wgmma.py"
    subprocess.run([sys.executable, generator, folder / "wgmma_shapes.cuh"], check=True)
    (folder / "host.cu").write_text(SOURCE)
    target = folder / "host.so"
    subprocess.run(
        [
            nvcc, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler",
            "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{folder}", folder / "host.cu", "-o", target,
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(target))


def matrix(host, dtype, signs, slots):
    """(64, 64): [k][n] = B as the tensor core sees it."""
    one = {torch.bfloat16: 0x3F803F80, torch.float16: 0x3C003C00}[dtype]
    bits = None
    if signs is not None:
        words = [sum(1 << i for i in range(32) if signs[32 * w + i] < 0) for w in range(2)]
        bits = (ctypes.c_uint32 * 2)(*words)
    rows = []
    for n in range(64):
        out = (ctypes.c_uint32 * 32)()
        host.matrix_row(out, ctypes.c_uint32(one), bits, n, int(slots))
        rows.append(torch.frombuffer(bytearray(bytes(out)), dtype=dtype).double())
    return torch.stack(rows, 1)


def expected(x, signs):
    y = x if signs is None else x * signs.double()
    return reference_fp8.hadamard_transform(y) * 8.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("slots", [False, True])
def test_rows_come_out_transformed_and_in_order(host, dtype, given, slots):
    signs = reference_fp8.random_signs(64, 3) if given else None
    x = torch.randn(1, 64, dtype=torch.float64)
    a = torch.empty(64, dtype=torch.float64)  # k-slots of one row
    if slots:
        # Thread q of a quad holds elements 32 b + 8 q + i; a step of 16 takes four of a block: the
        # A fragment has k = 2 q, 2 q + 1 and, 8 further on, two more.
        for q in range(4):
            for block in range(2):
                for half in range(2):
                    step, first = 2 * block + half, 32 * block + 8 * q + 4 * half
                    for e in range(4):
                        a[16 * step + 2 * q + e % 2 + 8 * (e // 2)] = x[0, first + e]
    else:
        a[:] = x[0]
    d = a @ matrix(host, dtype, signs, slots)
    found = torch.empty(64, dtype=torch.float64)
    # Accumulator registers 4 j, 4 j + 1 of thread q: columns 8 j + 2 q and the next; the kernel
    # writes registers of blocks of 32 columns as eight neighbours from 8 q on.
    for q in range(4):
        for block in range(2):
            for e in range(8):
                column = 8 * (4 * block + e // 2) + 2 * q + e % 2
                found[32 * block + 8 * q + e] = d[column]
    assert torch.allclose(found, expected(x, signs)[0], atol=1e-12)
