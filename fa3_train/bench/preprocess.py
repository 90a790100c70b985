"""RoPE, Hadamard and quantization against the speed of a copy, stage by stage and fused.

    python -m fa3_train.bench preprocess
    python -m fa3_train.bench preprocess --shapes llama8b short --peers --out results/preprocess

Every kernel here does almost nothing but move bytes, so its yardstick is a device copy in the same
run: "x copy" is its time over what its own bytes (inputs, outputs, cos and sin once) would take at
the rate of the copy. The copy is that of the shape's tensors, one after the other or as one
buffer, whichever is faster. L2 is flushed before every call; calls are interleaved.

Peers: RoPE compiled by torch.compile, the Hadamard transform as a matrix product, and both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fa3_train import reference_fp8
from fa3_train.bench import tables
from fa3_train.bench.timing import Timer
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE
from fa3_train.rotary import apply_rope, rope_tables


@dataclass(frozen=True)
class Shape:
    """q and k, and v where the fused call takes it along."""

    batch: int
    seqlen: int
    heads: tuple[int, ...]
    head_dim: int
    value: bool = False  # the last tensor is v: only quantized

    def __str__(self) -> str:
        heads = "+".join(map(str, self.heads))
        return f"{self.batch} x {self.seqlen} x {heads} x {self.head_dim}"


SHAPES = {
    "paper": Shape(2, 8192, (32, 32), 128),
    "llama8b": Shape(1, 8192, (32, 8, 8), 128, value=True),
    "short": Shape(8, 512, (16, 16), 128),
    "d64": Shape(2, 8192, (64, 64), 64),
    "d96": Shape(2, 8192, (32, 32), 96),
    "d192": Shape(2, 8192, (16, 16), 192),
    "d256": Shape(2, 8192, (16, 16), 256),
}

# name, stage mask, gradient?, input bytes per element, output bytes per element
STAGES: tuple[tuple[str, int, bool, int, int], ...] = (
    ("rope", ROPE, False, 2, 2),
    ("hadamard", HADAMARD, False, 2, 2),
    ("rope + hadamard", ROPE | HADAMARD, False, 2, 2),
    ("quantize", QUANTIZE, False, 2, 1),
    ("hadamard + quantize", HADAMARD | QUANTIZE, False, 2, 1),
    ("rope + hadamard + quantize", ROPE | HADAMARD | QUANTIZE, False, 2, 1),
    ("gradient of rope", ROPE, True, 2, 2),
    ("gradient of rope + hadamard", ROPE | HADAMARD, True, 2, 2),
    ("the same from fp32", ROPE | HADAMARD, True, 4, 2),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["paper", "llama8b"])
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--interleaved", action="store_true", help="pairs (2i, 2i + 1)")
    parser.add_argument(
        "--plain", action="store_true", help="FP32 kernels, where tensor cores would serve"
    )
    parser.add_argument("--peers", action="store_true", help="also torch.compile and matmul")
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--out", help="write OUT.json")


def stage_calls(
    shape: Shape, dtype: torch.dtype, interleaved: bool, options: int, device: torch.device
) -> dict[str, tuple[Callable[[], Any], int]]:
    """name -> (call, bytes it must move), for every stage and the dequantization."""
    xs = [
        torch.randn(shape.batch, shape.seqlen, h, shape.head_dim, device=device).to(dtype)
        for h in shape.heads
    ]
    cos, sin = rope_tables(shape.head_dim, shape.seqlen, device=device)
    signs = reference_fp8.random_signs(shape.head_dim).to(device)
    prep = torch.ops.fa3_train.prep
    elements = sum(x.numel() for x in xs)
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, mask, inverse, bytes_in, bytes_out in STAGES:
        stages = [mask] * len(xs)
        if shape.value:  # v has neither rotation nor transform
            if mask & QUANTIZE:
                stages[-1] = QUANTIZE
            else:
                stages.pop()
        inputs = xs[: len(stages)]
        if bytes_in == 4:
            inputs = [x.float() for x in inputs]
        moved = sum(x.numel() for x in inputs) * (bytes_in + bytes_out)
        moved += 2 * cos.nbytes if mask & ROPE else 0

        def call(
            inputs: list[Tensor] = inputs, stages: list[int] = stages, inverse: bool = inverse
        ) -> Any:
            return prep(
                inputs,
                stages,
                cos,
                sin,
                signs,
                None,
                None,
                interleaved,
                inverse,
                128,
                dtype,
                options,
            )

        calls[name] = (call, moved)
    coded = prep(xs, [QUANTIZE] * len(xs), None, None, None, None, None, False, False)
    codes, descales = coded[: len(xs)], coded[len(xs) :]
    calls["dequantize"] = (
        lambda: torch.ops.fa3_train.dequantize(codes, descales, None, 128, dtype),
        3 * elements,
    )
    return calls


def copy_calls(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """The shape's tensors copied one after the other, and as one buffer."""
    xs = [
        torch.empty(shape.batch * shape.seqlen * h * shape.head_dim, dtype=dtype, device=device)
        for h in shape.heads
    ]
    targets = [torch.empty_like(x) for x in xs]
    whole = torch.cat(xs)
    target = torch.empty_like(whole)

    def each() -> None:
        for x, y in zip(xs, targets, strict=True):
            y.copy_(x)

    return {"copy": each, "copy of one buffer": lambda: target.copy_(whole)}


def peer_calls(
    shape: Shape, dtype: torch.dtype, interleaved: bool, device: torch.device
) -> dict[str, tuple[Callable[[], Any], int]]:
    """What PyTorch alone offers for q and k."""
    heads = shape.heads[:2]
    xs = [
        torch.randn(shape.batch, shape.seqlen, h, shape.head_dim, device=device).to(dtype)
        for h in heads
    ]
    cos, sin = rope_tables(shape.head_dim, shape.seqlen, device=device)
    signs = reference_fp8.random_signs(shape.head_dim).to(device)
    basis = torch.eye(shape.head_dim, device=device) * signs
    matrix = reference_fp8.hadamard_transform(basis).to(dtype)

    def turn(x: Tensor) -> Tensor:
        return apply_rope(x, cos, sin, interleaved=interleaved)

    compiled = torch.compile(turn, dynamic=False)
    moved = sum(x.numel() for x in xs) * 4
    table = 2 * cos.nbytes
    return {
        "rope, torch.compile": (lambda: [compiled(x) for x in xs], moved + table),
        "hadamard, matmul": (lambda: [x @ matrix for x in xs], moved),
        "rope + hadamard, both": (lambda: [compiled(x) @ matrix for x in xs], moved + table),
    }


def measure(timer: Timer, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rows of one shape."""
    shape = SHAPES[name]
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float16
    copies = copy_calls(shape, dtype, timer.device)
    work = stage_calls(shape, dtype, args.interleaved, int(args.plain), timer.device)
    if args.peers:
        work |= peer_calls(shape, dtype, args.interleaved, timer.device)
    times = timer.measure({**copies, **{n: call for n, (call, _) in work.items()}}, args.reps)
    copied = 4 * sum(shape.batch * shape.seqlen * h * shape.head_dim for h in shape.heads)
    copy_ms = min(times[n].median_ms for n in copies)
    rows: list[dict[str, Any]] = [
        {"name": n, "us": times[n].median_ms * 1e3, "bytes": copied, "spread": times[n].spread}
        for n in copies
    ]
    for n, (_, moved) in work.items():
        t = times[n]
        rows.append({"name": n, "us": t.median_ms * 1e3, "bytes": moved, "spread": t.spread})
    for row in rows:
        row["gb_per_s"] = row["bytes"] / row["us"] * 1e-3
        row["copy_ratio"] = row["us"] * 1e-3 / (row["bytes"] / copied * copy_ms)
    return {"shape": name, "sizes": str(shape), "rows": rows}


def text(result: dict[str, Any]) -> str:
    """One table per shape."""
    lines = []
    for part in result["shapes"]:
        lines += [f"{part['shape']} ({part['sizes']}, {result['dtype']})"]
        lines += [f"{'':30}{'us':>8}{'GB/s':>8}{'x copy':>8}{'spread':>8}"]
        for r in part["rows"]:
            lines.append(
                f"  {r['name']:28}{r['us']:8.1f}{r['gb_per_s']:8.0f}{r['copy_ratio']:8.3f}"
                f"{r['spread']:8.1%}"
            )
        lines.append("")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("bench preprocess needs a CUDA device", file=sys.stderr)
        return 2
    timer = Timer()
    with torch.no_grad():
        parts = [measure(timer, name, args) for name in args.shapes]
    result = {
        "what": "preprocess", "command": getattr(args, "command", ""), "dtype": args.dtype,
        "reps": args.reps, "machine": tables.machine(), "shapes": parts,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(text(result))
    if args.out:
        path = Path(args.out).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    return 0
