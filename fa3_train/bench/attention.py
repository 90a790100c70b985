"""Attention beside its peers, in one process on one GPU.

    python -m fa3_train.bench attention --suite paper --pass fwd --peers ours fa3 cudnn
    python -m fa3_train.bench attention --suite training --pass fwdbwd --out docs/results/training

Every cell: inputs once, the peers' results compared with each other (one that differs from most is
reported and not timed), then --reps interleaved rounds of single calls with the L2 flushed, median
and interquartile range. TFLOP/s are counted as
FlashAttention does (fa3_train/bench/cells.py). A peer that is not installed or cannot serve a cell
is listed with the reason.

--fa3-library PATH[:NAMESPACE] loads FlashAttention-3's operators from a library instead of its
package; the namespace of its torch.ops defaults to flash_attn_3.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from fa3_train import numerics
from fa3_train.bench import tables
from fa3_train.bench.cells import PASS_FACTOR, SUITES, Cell
from fa3_train.bench.peers import NAMES, Call, Inputs, Peer, make_inputs, make_peers
from fa3_train.bench.timing import Timer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=sorted(SUITES), default="paper")
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=sorted(PASS_FACTOR), default=["fwd"]
    )
    parser.add_argument("--dtype", choices=[*DTYPES, "fp8"], default="bf16")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME",
        help=f"from {', '.join(NAMES)} (default: ours fa3 cudnn); "
        "fp8: ours ours-full ours-single fa3 (all)",
    )  # fmt: skip
    parser.add_argument(
        "--cells", nargs="+", metavar="WORDS",
        help="only cells whose name holds all words of one of these, e.g. 'd128 causal' S8192",
    )  # fmt: skip
    parser.add_argument("--reps", type=int, default=20, help="timed rounds per cell")
    parser.add_argument("--fa3-library", metavar="PATH[:NAMESPACE]")
    parser.add_argument("--no-ceilings", action="store_true", help="skip cuBLAS and memcpy")
    parser.add_argument("--out", help="write OUT.json, OUT.md and OUT.png")


def select(suite: str, patterns: list[str] | None) -> list[Cell]:
    """Cells of ``suite`` whose name contains all words of at least one pattern."""
    cells = SUITES[suite]()
    if patterns is None:
        return cells

    def wanted(cell: Cell) -> bool:
        words = cell.name.split()
        return any(
            all(w in words or w in cell.name.split(", ") for w in p.split()) or p == cell.name
            for p in patterns
        )

    return [cell for cell in cells if wanted(cell)]


def odd_ones(results: dict[str, tuple[torch.Tensor, ...]], agreement: float) -> dict[str, str]:
    """Peers whose results differ from what most computed, with the difference in words.

    Nobody is right by position, not even the first: the yardstick is the peer that most others
    agree with (relative RMS at most ``agreement``). Where no two agree, all are odd.
    """
    names = list(results)

    def difference(a: str, b: str) -> float:
        pairs = zip(results[a], results[b], strict=False)
        errors = [numerics.relative_rms_error(x.detach(), y.detach()) for x, y in pairs]
        return math.inf if any(e != e for e in errors) else max(errors)

    apart = {(a, b): difference(a, b) for a in names for b in names if a != b}
    votes = {a: sum(apart[a, b] <= agreement for b in names if b != a) for a in names}
    if len(names) < 2:
        return {}
    best = max(names, key=lambda a: votes[a])
    odd = [a for a in names if a != best and not apart[a, best] <= agreement]
    found = {a: f"relative RMS difference {apart[a, best]:.2e} to {best}" for a in odd}
    if not votes[best]:
        found[best] = f"relative RMS difference {min(apart[best, a] for a in odd):.2e} to any other"
    return found


def build_calls(
    peers: list[Peer], cell: Cell, x: Inputs, which: str, agreement: float = numerics.AGREEMENT
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """What runs, and what does not with the reason: missing, refused, failed, or odd."""
    calls: dict[str, Call] = {}
    results: dict[str, tuple[torch.Tensor, ...]] = {}
    report: dict[str, dict[str, Any]] = {}
    for peer in peers:
        reason = peer.missing() or peer.problem(cell, which)
        if reason is None:
            try:
                call = peer.build(cell, x, which)
                result = call()
                torch.cuda.synchronize()
            except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason is not None:
            report[peer.name] = {"skipped": reason}
            continue
        calls[peer.name], results[peer.name] = call, result
    for name, why in odd_ones(results, agreement).items():
        report[name] = {"disagrees": why}
        del calls[name]
    return calls, report


def measure_cell(
    timer: Timer, peers: list[Peer], cell: Cell, dtype: str, which: str, reps: int
) -> dict[str, Any]:
    """One row of the result."""
    x = make_inputs(cell, DTYPES.get(dtype, torch.bfloat16), timer.device)
    agreement = numerics.AGREEMENT_FP8 if dtype == "fp8" else numerics.AGREEMENT
    calls, report = build_calls(peers, cell, x, which, agreement)
    flops = cell.flops(which)
    for name, timing in timer.measure(calls, reps).items():
        report[name] = {
            **asdict(timing),
            "spread": timing.spread,
            "tflops": flops / timing.median_ms * 1e-9,
        }
    return {
        "name": cell.name, "group": cell.group, "pass": which, "causal": cell.causal,
        "flops": flops, "shape": asdict(cell), "peers": report,
    }  # fmt: skip


def ceilings(timer: Timer, dtype: torch.dtype) -> dict[str, str]:
    """What the machine gives: an 8192^3 product and a device copy, same conditions."""
    n = 8192
    a, b = (torch.randn(n, n, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 29, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    a16, b16 = a.to(dtype), b.to(dtype)
    calls: dict[str, Any] = {
        "matmul": lambda: torch.matmul(a16, b16),
        "copy": lambda: target.copy_(source),
    }
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=timer.device)
    calls["fp8"] = lambda: torch._scaled_mm(
        a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    times = timer.measure(calls, 10)
    work = 2.0 * n**3 * 1e-9
    name = str(dtype).removeprefix("torch.")
    return {
        f"cuBLAS {name} 8192^3": f"{work / times['matmul'].median_ms:.0f} TFLOP/s",
        "cuBLAS e4m3 8192^3": f"{work / times['fp8'].median_ms:.0f} TFLOP/s",
        "device copy": f"{2 * source.numel() / times['copy'].median_ms * 1e-9:.2f} TB/s",
    }


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("bench attention needs a CUDA device", file=sys.stderr)
        return 2
    begin = time.monotonic()
    cells = select(args.suite, args.cells)
    if not cells:
        names = "\n  ".join(c.name for c in SUITES[args.suite]())
        print(f"--cells {args.cells} matches none of:\n  {names}", file=sys.stderr)
        return 2
    if args.dtype == "fp8":
        from fa3_train.bench import peers_fp8

        peers = peers_fp8.make_peers_fp8(args.peers or list(peers_fp8.NAMES), args.fa3_library)
        if args.passes != ["fwd"]:
            print("--dtype fp8 measures the forward: --pass fwd", file=sys.stderr)
            return 2
    else:
        peers = make_peers(args.peers or ["ours", "fa3", "cudnn"], args.fa3_library)
    timer = Timer()
    limits = {} if args.no_ceilings else ceilings(timer, DTYPES.get(args.dtype, torch.bfloat16))
    result: dict[str, Any] = {
        "what": "attention", "command": args.command, "suite": args.suite, "dtype": args.dtype,
        "reps": args.reps, "peers": [p.name for p in peers], "machine": tables.machine(),
        "ceilings": limits,
        "cells": [
            measure_cell(timer, peers, cell, args.dtype, which, args.reps)
            for which in args.passes
            for cell in cells
        ],
    }  # fmt: skip
    print(tables.text_table(result))
    print(tables.skipped(result))
    print(f"{time.monotonic() - begin:.1f} s")
    if args.out:
        for path in tables.write(result, args.out):
            print(f"wrote {path}")
    return 0
