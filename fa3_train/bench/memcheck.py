"""compute-sanitizer memcheck over every kernel of the library, on shapes with ragged edges.

    python -m fa3_train.bench memcheck --out docs/results/memcheck

Starts itself under `compute-sanitizer --tool memcheck` twice: once with every case below, where no
error may be found, and once with a launch that is told to write its log-sum-exp into a buffer of
four bytes, where errors must be found (else the tool looks at nothing: a wrong kernel filter, say).
torch's caching allocator is off, so that every tensor is an allocation of its own and the first
byte behind it is out of bounds; `--padding` keeps neighbours apart.

Only this library's kernels are watched: torch's take most of the time otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Case = tuple[str, Callable[[], object]]
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_OPTIONS = (
    "--tool", "memcheck", "--kernel-name", "kns=fa3", "--padding", "64", "--error-exitcode", "0",
    "--print-limit", "20", "--target-processes", "application-only",
)  # fmt: skip


def _forward_backward(
    call: Callable[..., Any], q: tuple[int, ...], k: tuple[int, ...], dim_v: int, *rest: Any,
    **options: Any,
) -> None:  # fmt: skip
    """`call` on fresh tensors of the shapes of q and k (v as k, `dim_v` wide), and its gradient."""
    import torch

    shapes = (q, k, (*k[:-1], dim_v))
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    inputs = [torch.randn(shape, **make) for shape in shapes]
    out = call(*inputs, *rest, backend="hopper", **options)
    torch.autograd.grad(out, inputs, torch.randn_like(out))
    torch.cuda.synchronize()


def _preprocess(shape: tuple[int, ...], *rest: Any, **options: Any) -> None:
    import torch

    import fa3_train

    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    fa3_train.rope_hadamard_quantize(x, *rest, backend="hopper", **options)
    torch.cuda.synchronize()


def _cases() -> Iterator[Case]:
    import torch

    import fa3_train
    from fa3_train.reference_fp8 import random_signs
    from fa3_train.rotary import rope_tables

    lengths = [0, 1, 0, 203, 128, 77]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    total, longest = sum(lengths), max(lengths)
    packing = (cu, cu, longest, longest)
    shapes: tuple[Any, ...]
    dense: Callable[..., Any] = fa3_train.flash_attn_func
    varlen: Callable[..., Any] = fa3_train.flash_attn_varlen_func
    masks: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True, "deterministic": True},
        "window, softcap": {"window_size": (50, 20), "softcap": 15.0},
    }
    for dim, dim_v in ((64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)):
        name = f"attention d{dim}" + (f"/{dim_v}" if dim != dim_v else "")
        shapes = ((2, 203, 4, dim), (2, 331, 2, dim), dim_v)
        for text, options in masks.items():
            yield f"{name} 203x331 {text}", partial(_forward_backward, dense, *shapes, **options)
        shapes = ((total, 4, dim), (total, 2, dim), dim_v)
        sink = torch.randn(4, device="cuda")
        packed = partial(_forward_backward, varlen, *shapes, *packing, causal=True, sink=sink)
        yield f"{name} packed causal, sink", packed
    dense, varlen = fa3_train.flash_attn_fp8_func, fa3_train.flash_attn_fp8_varlen_func
    for dim in (64, 128, 256):
        turn: dict[str, Any] = {"signs": random_signs(dim).cuda(), "causal": True}
        turn["cos"], turn["sin"] = rope_tables(dim, 256, device="cuda")
        shapes = ((2, 203, 4, dim), (2, 203, 2, dim), dim)
        for two_level, gradient in ((True, "inputs"), (False, "codes")):
            options = {**turn, "two_level": two_level, "gradient": gradient}
            one = partial(_forward_backward, dense, *shapes, **options)
            yield f"fp8 d{dim} 203 causal, two_level {two_level}, gradient at {gradient}", one
        shapes = ((total, 4, dim), (total, 2, dim), dim)
        packed = partial(_forward_backward, varlen, *shapes, *packing, **turn)
        yield f"fp8 d{dim} packed causal", packed
    for dim, quantize in itertools.product((64, 96, 128, 192, 256), (False, True)):
        rest = (*rope_tables(dim, 256, device="cuda"), random_signs(dim).cuda())
        for shape, starts in (((2, 203, 3, dim), None), ((total, 3, dim), cu)):
            one = partial(_preprocess, shape, *rest, cu_seqlens=starts, quantize=quantize)
            yield f"preprocessing {shape}, quantize {quantize}", one


def _canary() -> None:
    """A forward whose log-sum-exp has 4 bytes to go to."""
    import torch

    from fa3_train.ops import hopper

    q, k, v = (torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    out, lse = torch.ops.fa3_train.attn_fwd(
        q, k, v, None, None, None, 256, 256, 0.125, False, -1, -1, 0.0
    )
    (known,) = hopper._forwards.values()
    assert known.plan is not None
    small = torch.empty(1, device="cuda")
    addresses = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), 0, 0, 0]
    addresses[hopper._FORWARD_POINTERS.index("lse")] = small.data_ptr()
    known.plan.launch(*addresses)
    torch.cuda.synchronize()


def _inside(what: str) -> int:
    """The watched process."""
    import torch

    torch.manual_seed(0)
    if what == "canary":
        _canary()
        return 0
    count = 0
    for name, case in _cases():
        print(f"case {name}", flush=True)
        case()
        count += 1
    print(f"ran {count} cases", flush=True)
    return 0


def _watch(sanitizer: str, what: str, limit: float) -> dict[str, Any]:
    command = [sanitizer, *_OPTIONS, sys.executable, "-m", "fa3_train.bench", "memcheck"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--inside", what], capture_output=True, text=True, timeout=limit, check=False,
        env=os.environ | _ENVIRONMENT,
    )  # fmt: skip
    lines = (done.stdout + done.stderr).splitlines()
    errors = [int(m[1]) for line in lines if (m := _SUMMARY.search(line))]
    return {
        "exit_code": done.returncode,
        "errors": errors[-1] if errors else None,
        "cases": [line.removeprefix("case ") for line in lines if line.startswith("case ")],
        "finished": any(line.startswith("ran ") for line in lines),
        "seconds": round(time.monotonic() - began, 1),
        "report": [line for line in lines if line.startswith("=========")][:60],
        "tail": lines[-15:],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of each of the two")
    parser.add_argument("--inside", choices=("cases", "canary"), help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    if args.inside:
        return _inside(args.inside)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        print(f"memcheck: compute-sanitizer is neither on PATH nor at {sanitizer}", file=sys.stderr)
        return 2
    from fa3_train.bench.tables import machine, write_page

    canary, cases = (_watch(sanitizer, what, args.limit) for what in ("canary", "cases"))
    clean = cases["finished"] and cases["errors"] == 0 and cases["exit_code"] == 0
    sees = bool(canary["errors"])
    kept = ("errors", "seconds", "cases")
    result = {
        "what": "memcheck", "command": args.command, "machine": machine(),
        "options": " ".join(_OPTIONS), "clean": clean, "sees_a_planted_error": sees,
        "cases": {key: cases[key] for key in kept}, "canary": {"errors": canary["errors"]},
    }  # fmt: skip
    text = (
        f"memcheck: {len(cases['cases'])} cases, {cases['errors']} errors, {cases['seconds']} s; "
        f"a planted write out of bounds gave {canary['errors']} errors: "
        f"{'clean' if clean and sees else 'NOT CLEAN'}"
    )
    print(text)
    if not (clean and sees):
        print("\n".join([*canary["tail"], "---", *cases["report"], *cases["tail"]]))
    if args.out:
        write_page(result, args.out, "\n".join(f"- {name}" for name in cases["cases"]), text)
    return 0 if clean and sees else 1
