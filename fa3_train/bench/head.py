"""The output head with its loss, forward and backward: chunked beside whole logits.

    python -m fa3_train.bench head --out docs/results/head.json

Rows are our head at several chunk lengths and two PyTorch forms that hold all logits. Besides the
time: the useful rate, 6 * tokens * vocab * hidden FLOPs (three products), and the peak of memory
above what the weights and the input take.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fa3_train.bench import tables
from fa3_train.bench.timing import Timer
from fa3_train.modules.loss import LMHead

_IGNORED_EVERY = 50  # as where documents end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--chunks", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--out", help="path of the JSON result")


def calls_of(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name -> loss and both gradients once."""
    generator = torch.Generator(device).manual_seed(0)
    head = LMHead(args.hidden, args.vocab).to(device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.02, generator=generator)
    x = torch.randn(args.tokens, args.hidden, device=device, generator=generator).bfloat16()
    x.requires_grad_()
    labels = torch.randint(args.vocab, (args.tokens,), device=device, generator=generator)
    labels[::_IGNORED_EVERY] = -100

    def gradients(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, [x, head.weight])

    def chunked(tokens: int) -> None:
        head.chunk_tokens = tokens
        gradients(head(x, labels))

    def whole(wide: bool) -> None:
        logits = head(x)
        gradients(functional.cross_entropy(logits.float() if wide else logits, labels))

    calls: dict[str, Callable[[], Any]] = {
        f"chunks of {n}": (lambda n=n: chunked(n)) for n in args.chunks
    }
    calls["whole logits, fp32 soft-max"] = lambda: whole(True)
    calls["whole logits, bf16 soft-max"] = lambda: whole(False)
    return calls


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory that the call holds at once, beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def text(result: dict[str, Any]) -> str:
    """One row per form of the head."""
    lines = ["| | ms | TFLOP/s | peak GiB |", "|---|---|---|---|"]
    lines += [
        f"| {r['name']} | {r['ms']:.1f} | {r['tflops']:.0f} | {r['peak_gib']:.1f} |"
        for r in result["rows"]
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("bench head needs a CUDA device", file=sys.stderr)
        return 2
    timer = Timer()
    calls = calls_of(args, timer.device)
    times = timer.measure(calls, args.reps)
    flops = 6 * args.tokens * args.vocab * args.hidden
    rows = [
        {
            "name": name,
            "ms": times[name].median_ms,
            "spread": times[name].spread,
            "tflops": flops / times[name].median_ms * 1e-9,
            "peak_gib": peak_bytes(call) / 2**30,
        }
        for name, call in calls.items()
    ]
    result = {
        "what": "head", "command": getattr(args, "command", ""), "tokens": args.tokens,
        "hidden": args.hidden, "vocab": args.vocab, "machine": tables.machine(), "rows": rows,
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(f"{args.tokens} tokens x {args.hidden} -> {args.vocab}, bf16, loss and both gradients")
    for row in rows:
        print(
            f"  {row['name']:30}{row['ms']:8.2f} ms {row['tflops']:5.0f} TFLOP/s "
            f"{row['peak_gib']:6.2f} GiB  spread {row['spread']:.1%}"
        )
    if args.out:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    return 0
