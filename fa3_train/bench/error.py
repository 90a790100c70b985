"""What FP8 attention loses, and what each remedy brings back: error tables against fp64.

    python -m fa3_train.bench error
    python -m fa3_train.bench error --tables outliers --causal --device cpu --heads 1 --seqlen 512

outliers    entries N(0, 1) + N(0, 100) * Bernoulli(0.001), the data of the paper's table 3
drift       the same with rows scaled by 2^U(-4, 4) in runs of 128 tokens: magnitude that changes
            along the sequence (attention sinks, packed documents)
long        V with a mean, 8k to 128k keys, one block of queries: where Hopper's 14-bit FP8
            accumulator shows, if P V runs through it over the whole sequence (single level)
gradients   dq, dk and dv, see bench/error_gradients.py

On a Hopper GPU every FP8 row runs the kernel, so rounding, block order and accumulator are its
own; elsewhere fa3_train.reference_fp8 emulates it (exact accumulation, so no single-level rows).
The first table is the mean over several draws, with the lowest and the highest RMSE behind.
Columns: RMSE against fp64 on the original inputs, the same relative to the RMS of the truth, the
part of it that rounding the inputs costs, and what the attention adds (against fp64 on the
quantized inputs).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fa3_train import numerics, reference, reference_fp8
from fa3_train.bench import error_gradients, tables

BLOCK = 128
TABLES = ("outliers", "drift", "long", "gradients")


@dataclass(frozen=True)
class Variant:
    """How q, k and v become codes, and how P V is accumulated."""

    name: str
    scales: str  # "tensor", "head" or "block"
    hadamard: bool
    two_level: bool


VARIANTS = (
    Variant("fp8, scale per tensor", "tensor", False, True),
    Variant("fp8, scale per head", "head", False, True),
    Variant("fp8, block scales", "block", False, True),
    Variant("fp8, per tensor + Hadamard", "tensor", True, True),
    Variant("fp8, per head + Hadamard", "head", True, True),
    Variant("fp8, block + Hadamard (default)", "block", True, True),
    Variant("fp8, block + Hadamard, single level", "block", True, False),
)
LONG_VARIANTS = (VARIANTS[5], VARIANTS[6])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--causal", action="store_true", help="causal only (default: both masks)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--long", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--draws", type=int, default=8, help="of the outliers: with seeds from --seed on"
    )
    parser.add_argument("--out", help="write OUT.json")


# ---- data ------------------------------------------------------------------------------------


def outlier_data(args: argparse.Namespace, drift: bool, draw: int = 0) -> list[Tensor]:
    """q, k, v fp64 (1, S, H, D)."""
    generator = torch.Generator(args.device).manual_seed(args.seed + draw)
    shape = (1, args.seqlen, args.heads, args.head_dim)
    xs = [numerics.outlier_normal(*shape, generator=generator, device=args.device) for _ in "qkv"]
    if not drift:
        return xs
    runs = -(-args.seqlen // BLOCK)
    kw = {"generator": generator, "device": args.device, "dtype": torch.float64}
    scaled = []
    for x in xs:
        exponent = torch.rand(1, runs, args.heads, 1, **kw) * 8.0 - 4.0
        rows = torch.exp2(exponent).repeat_interleave(BLOCK, 1)[:, : args.seqlen]
        scaled.append(x * rows)
    return scaled


def long_data(args: argparse.Namespace, keys: int, kind: str) -> list[Tensor]:
    """256 queries, ``keys`` keys, one head; V with zero mean, mean 0.5 sigma, or all positive."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    kw = {"generator": generator, "device": args.device, "dtype": torch.float64}
    q = torch.randn(1, 256, 1, args.head_dim, **kw)
    k, v = (torch.randn(1, keys, 1, args.head_dim, **kw) for _ in range(2))
    if kind == "mean 0.5 sigma":
        v = v + 0.5
    elif kind == "all positive":
        v = v.abs()
    return [q, k, v]


LONG_KINDS = ("zero mean", "mean 0.5 sigma", "all positive")


# ---- one result ------------------------------------------------------------------------------


def encode(x: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """Wide x -> codes and block descales, all blocks of a tensor or head sharing one if asked."""
    if scales == "block":
        return reference_fp8.quantize_blocks(x, BLOCK)
    dims = (0, 1, 2, 3) if scales == "tensor" else (0, 1, 3)
    top = x.abs().amax(dims, keepdim=True)
    descale = reference_fp8.round_up(top / reference_fp8.E4M3_MAX)
    codes = reference_fp8.quantize_with(x, descale)
    blocks = -(-x.shape[1] // BLOCK)
    rows = descale.expand(x.shape[0], 1, x.shape[2], 1).permute(0, 2, 3, 1)[:, :, 0]
    return codes, rows.expand(-1, -1, blocks).float().contiguous()


def on_kernel(device: str) -> bool:
    """Whether the FP8 kernel runs here."""
    if not device.startswith("cuda"):
        return False
    from fa3_train import _lib
    from fa3_train.ops import fp8, hopper  # noqa: F401 - registers the op

    return hopper.device_problem(torch.cuda.current_device()) is None and _lib.available()


def attend(
    codes: list[Tensor], descales: list[Tensor], causal: bool, two_level: bool, device: str
) -> Tensor:
    """Attention on codes: the kernel, rounded to fp16, or the emulation."""
    q, k = codes[:2]
    if on_kernel(device):
        out: Tensor
        out, _ = torch.ops.fa3_train.attn_fp8_fwd(
            *codes, *descales, None, None, q.shape[1], k.shape[1], 1.0 / math.sqrt(q.shape[-1]),
            causal, -1, 0 if causal else -1, two_level, torch.float16,
        )  # fmt: skip
        return out
    return reference_fp8.attention_fp8(*codes, *descales, causal=causal)[0]


def fp8_row(
    variant: Variant, xs: list[Tensor], truth: Tensor, causal: bool, device: str
) -> dict[str, Any]:
    """Errors of one variant. q and k are taken as 16-bit tensors, as the kernels get them."""
    signs = reference_fp8.random_signs(xs[0].shape[-1]).to(device).double()
    rounded = [x.to(torch.float16).double() for x in xs]
    if variant.hadamard:
        q, k, v = rounded
        rounded = [*(reference_fp8.hadamard_transform(x * signs) for x in (q, k)), v]
    coded = [encode(x, variant.scales) for x in rounded]
    codes, descales = [c for c, _ in coded], [d for _, d in coded]
    out = attend(codes, descales, causal, variant.two_level, device)
    values = [
        reference_fp8.dequantize_blocks(c, d, BLOCK, dtype=torch.float64)
        for c, d in zip(codes, descales, strict=True)
    ]
    inputs_only, _ = reference.attention(*values, causal=causal)
    return errors(variant.name, out, truth, inputs_only)


def errors(name: str, out: Tensor, truth: Tensor, inputs_only: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "rmse": numerics.rms_error(out, truth),
        "relative": numerics.relative_rms_error(out, truth),
        "added": numerics.relative_rms_error(out, inputs_only),
        "inputs": numerics.relative_rms_error(inputs_only, truth),
    }


def sixteen_bit_row(
    dtype: torch.dtype, xs: list[Tensor], truth: Tensor, causal: bool, device: str
) -> dict[str, Any]:
    """The 16-bit kernel, or plain PyTorch at that precision where there is none."""
    q, k, v = (x.to(dtype) for x in xs)
    name = str(dtype).removeprefix("torch.")
    if on_kernel(device):
        from fa3_train.ops.attention import flash_attn_func

        out = flash_attn_func(q, k, v, causal=causal, backend="hopper")
        assert isinstance(out, Tensor)
        name += ", kernel"
    else:
        out, _ = reference.attention_emulated(q, k, v, causal=causal)
        name += ", plain PyTorch"
    inputs_only, _ = reference.attention(q, k, v, causal=causal)
    return errors(name, out, truth, inputs_only)


# ---- tables ----------------------------------------------------------------------------------


def outlier_rows(
    args: argparse.Namespace, drift: bool, causal: bool, draw: int
) -> tuple[list[dict[str, Any]], float]:
    """Errors of every variant on one draw, and the RMS of its truth."""
    xs = outlier_data(args, drift, draw)
    truth, _ = reference.attention(*xs, causal=causal)
    rows = [
        sixteen_bit_row(dtype, xs, truth, causal, args.device)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    kernel = on_kernel(args.device)
    for variant in VARIANTS:
        if variant.two_level or kernel:  # the emulation adds exactly
            rows.append(fp8_row(variant, xs, truth, causal, args.device))
    return rows, numerics.rms(truth)


def mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One variant over the draws: means, and the extremes and the standard error of the RMSE."""
    count = len(rows)
    if count == 1:
        return rows[0]
    row = {
        key: sum(r[key] for r in rows) / count if isinstance(value, float) else value
        for key, value in rows[0].items()
    }
    each = [r["rmse"] for r in rows]
    variance = sum((e - row["rmse"]) ** 2 for e in each) / (count - 1)
    return {
        **row,
        "rmse_low": min(each),
        "rmse_high": max(each),
        "rmse_standard_error": math.sqrt(variance / count),
        "rmse_draws": each,
    }


def outlier_table(args: argparse.Namespace, drift: bool, causal: bool) -> dict[str, Any]:
    """Means over --draws draws: few outliers decide the error of one draw, which varies by 5 %.

    With drift one draw: there it is factors that matter.
    """
    draws = 1 if drift else args.draws
    results = [outlier_rows(args, drift, causal, draw) for draw in range(draws)]
    by_variant = zip(*(rows for rows, _ in results), strict=True)
    what = "drift" if drift else "outliers"
    title = f"{what}, {'causal' if causal else 'full'}, B1 H{args.heads} S{args.seqlen}"
    return {
        "title": f"{title} D{args.head_dim}" + (f", {draws} draws" if draws > 1 else ""),
        "rms": sum(rms for _, rms in results) / len(results),
        "rows": [mean_row(list(rows)) for rows in by_variant],
    }


def long_tables(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    kernel = on_kernel(args.device)
    for keys in args.long:
        for kind in LONG_KINDS:
            xs = long_data(args, keys, kind)
            truth, _ = reference.attention(*xs)
            rows = [
                fp8_row(v, xs, truth, False, args.device)
                for v in LONG_VARIANTS
                if v.two_level or kernel
            ]
            title = f"long, V {kind}, {keys} keys, 256 queries, D{args.head_dim}"
            yield {"title": title, "rms": numerics.rms(truth), "rows": rows}


def text(table: dict[str, Any]) -> str:
    """One table for eyes."""
    lines = [f"{table['title']} (rms of the truth {table['rms']:.3g})"]
    lines.append(f"{'':38}{'RMSE':>10}{'relative':>10}{'inputs':>10}{'added':>10}")
    for r in table["rows"]:
        spread = ""
        if "rmse_low" in r:
            spread = f"   {r['rmse_low']:.2e} to {r['rmse_high']:.2e}"
        lines.append(
            f"  {r['name']:36}{r['rmse']:10.2e}{r['relative']:10.2e}{r['inputs']:10.2e}"
            f"{r['added']:10.2e}" + spread
        )
    return "\n".join([*lines, ""])


def main(args: argparse.Namespace) -> int:
    done: list[dict[str, Any]] = []
    masks = (True,) if args.causal else (False, True)

    def show(table: dict[str, Any], lines: str) -> None:
        print(lines, flush=True)
        done.append(table)

    print("FP8 rows:", "kernel" if on_kernel(args.device) else "emulation, exact accumulation")
    with torch.no_grad():
        for name in args.tables:
            if name == "long":
                for table in long_tables(args):
                    show(table, text(table))
            elif name == "gradients":
                with torch.enable_grad():
                    for table in error_gradients.gradient_tables(args, masks):
                        show(table, error_gradients.text(table))
            else:
                for causal in masks:
                    table = outlier_table(args, name == "drift", causal)
                    show(table, text(table))
    if args.out:
        path = Path(args.out).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "what": "error", "command": getattr(args, "command", ""), "machine": tables.machine(),
            "tables": done,
        }  # fmt: skip
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    return 0
