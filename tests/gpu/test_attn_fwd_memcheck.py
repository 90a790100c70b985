"""The forward kernels under compute-sanitizer's memcheck.

The test starts this file as a program below the sanitizer. Every tensor is an allocation of its
own there (no caching allocator), so that one element too far is outside of any. The program calls
every bucket of head dims with every kind of mask, dense and packed, and lengths that end inside a
tile; it compares nothing, the other tests do. By hand, with the sanitizer's words into a file:

    python tests/gpu/test_attn_fwd_memcheck.py --out docs/results/memcheck_fwd.txt
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
DIMS = ((64, 64), (72, 72), (96, 96), (128, 128), (192, 128), (192, 192), (248, 248), (256, 256))
MASKS = (
    {},
    {"causal": True},
    {"window_size": (70, 20)},
    {"causal": True, "softcap": 20.0},
)


def calls() -> int:
    """Runs them all; returns how many."""
    from fa3_train import flash_attn_func, flash_attn_varlen_func

    def normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    count = 0
    heads, groups, seqlen_q, seqlen_k = 4, 2, 203, 331
    ends_q, ends_k = [0, 130, 130, 203], [0, 7, 140, 331]
    for (dim, dim_v), dtype in itertools.product(DIMS, (torch.bfloat16, torch.float16)):
        q = normal(dtype, 1, seqlen_q, heads, dim)
        k = normal(dtype, 1, seqlen_k, groups, dim)
        v = normal(dtype, 1, seqlen_k, groups, dim_v)
        sink = torch.randn(heads, device="cuda")
        cu = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (ends_q, ends_k)]
        for mask in MASKS:
            options = {**mask, "sink": sink, "backend": "hopper"}
            flash_attn_func(q, k, v, **options)
            flash_attn_varlen_func(q[0], k[0], v[0], *cu, 130, 191, **options)
            count += 2
    torch.cuda.synchronize()
    return count


def sanitize() -> subprocess.CompletedProcess[str]:
    """This file as a program under memcheck; its exit status is 99 where an access was wrong."""
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    return subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99",
         sys.executable, str(Path(__file__).resolve()), "--child"],
        capture_output=True, text=True, env=environment, timeout=280, check=False,
    )  # fmt: skip


def test_memcheck() -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    done = sanitize()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-2000:]
    assert f"{2 * 2 * len(DIMS) * len(MASKS)} calls" in done.stdout, done.stdout[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", action="store_true", help="what runs below the sanitizer")
    parser.add_argument("--out", type=Path, help="write what it said")
    args = parser.parse_args()
    if args.child:
        print(f"{calls()} calls")
        return 0
    done = sanitize()
    name = torch.cuda.get_device_name()
    text = f"forward kernels, bf16 and fp16, {name}, CUDA {torch.version.cuda}\n\n{done.stdout}"
    print(text)
    if args.out:
        args.out.write_text(text)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
