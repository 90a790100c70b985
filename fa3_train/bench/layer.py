"""One transformer layer, forward and forward + backward, beside te.TransformerLayer.

    python -m fa3_train.bench layer --suite te --out docs/results/layer_te
    python -m fa3_train.bench layer --suite backends --out docs/results/layer_backends

``te``: our TransformerLayer and TransformerEngine's at the same sizes and precision, in one run:
bf16, FP8 linears, FP8 linears with FP8 attention on both sides.

``backends``: what a faster attention is worth end to end: the same layer of ours with FA2, cuDNN,
our bf16 and our FP8 attention at 8k to 128k tokens, forward (the table that FlashAttention-3's
authors gave their reviewers) and training step. All four share weights, linears, norms and the RoPE
kernel; only the attention core is exchanged.

Sizes are one rank's share: ``8b`` is Llama-3-8B whole; ``70b-tp8`` and ``405b-tp8`` have an eighth
of heads and FFN columns over the full hidden size, without the tensor-parallel all-reduce, which
both sides would pay alike. FLOPs: 2 per multiply-add of every linear, attention counted causal
(half), backward twice the forward. Every round runs each competitor once, on fresh events.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fa3_train.bench import e2e
from fa3_train.bench.tables import machine


@dataclass(frozen=True)
class Size:
    """One rank's share of a layer."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    def flops(self, tokens: int, seqlen: int) -> float:
        """Of one forward over ``tokens`` in sequences of ``seqlen``, causal."""
        qkv_out = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        linears = self.hidden * (qkv_out + 3 * self.ffn)
        return 2.0 * tokens * linears + 2.0 * tokens * seqlen * self.heads * self.head_dim


SIZES = {
    "8b": Size(4096, 14336, 32, 8),
    "70b-tp8": Size(8192, 3584, 8, 1),
    "405b-tp8": Size(16384, 6656, 16, 1),
}
ROPE_THETA = 500_000.0
LONG_SEQLEN = 65_536  # beyond it, three rounds at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=("te", "backends"), default="te")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=None)
    parser.add_argument("--seqlens", nargs="+", type=int, default=None)
    parser.add_argument("--layers", type=int, default=2, help="stacked; times are per layer")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=None, help="rows of the table; all")
    parser.add_argument("--te-recipe", choices=("current", "delayed", "block"), default="delayed")
    parser.add_argument("--out", help="path without suffix: writes .json and .md")


class _Stack(nn.Module):
    """Layers one after the other, in the surroundings that their precision needs."""

    def __init__(self, layers: list[nn.Module], around: Callable[[], Any], extra: dict[str, Any]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.around, self.extra = around, extra

    def forward(self, x: Tensor) -> Tensor:
        with self.around():
            for layer in self.layers:
                x = layer(x, **self.extra)
        return x


def _ours(size: Size, args: argparse.Namespace, seqlen: int, **options: Any) -> nn.Module:
    from fa3_train.modules import TransformerLayer

    compiled = options.pop("compile", False)
    layers = [
        TransformerLayer(
            size.hidden, size.ffn, size.heads, size.kv_heads, size.head_dim, max_seq_len=seqlen,
            rope_theta=ROPE_THETA, te_recipe=args.te_recipe, **{"backend": "hopper", **options},
        )
        for _ in range(args.layers)
    ]  # fmt: skip
    if compiled:
        for layer in layers:
            layer.compile()
    return _Stack(layers, contextlib.nullcontext, {})


def _te(size: Size, args: argparse.Namespace, seqlen: int, fp8: bool, dpa: bool) -> nn.Module:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    layers = [
        te.TransformerLayer(
            size.hidden, size.ffn, size.heads, num_gqa_groups=size.kv_heads,
            kv_channels=size.head_dim, layernorm_epsilon=1e-5, hidden_dropout=0.0,
            attention_dropout=0.0, bias=False, self_attn_mask_type="causal",
            normalization="RMSNorm", activation="swiglu", attn_input_format="bshd",
            params_dtype=torch.bfloat16, layer_number=i + 1, fuse_qkv_params=True,
        )
        for i in range(args.layers)
    ]  # fmt: skip
    angles = te.RotaryPositionEmbedding(size.head_dim, rotary_base=ROPE_THETA)(seqlen).cuda()
    delayed = recipe.DelayedScaling(fp8_format=recipe.Format.HYBRID, fp8_dpa=dpa)
    current = recipe.Float8CurrentScaling(fp8_dpa=dpa)
    chosen = delayed if args.te_recipe == "delayed" or dpa else current
    region = getattr(te, "autocast", None) or te.fp8_autocast

    def around() -> Any:
        if region is getattr(te, "autocast", None):
            return region(enabled=fp8, recipe=chosen)
        return region(enabled=fp8, fp8_recipe=chosen)

    return _Stack(layers, around, {"rotary_pos_emb": angles})


def _variants(suite: str) -> dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]]:
    """{name: (builder, options)}, in the order of the table; the first is the yardstick."""
    if suite == "te":
        return {
            "te bf16": (_te, {"fp8": False, "dpa": False}),
            "ours bf16": (_ours, {"linear": "torch"}),
            "ours bf16 compiled": (_ours, {"linear": "torch", "compile": True}),
            "ours bf16 (te linears)": (_ours, {"linear": "te"}),
            "te fp8": (_te, {"fp8": True, "dpa": False}),
            "ours fp8": (_ours, {"linear": "te_fp8"}),
            "te fp8 + fp8 attention": (_te, {"fp8": True, "dpa": True}),
            "ours fp8 + fp8 attention": (_ours, {"linear": "te_fp8", "precision": "fp8"}),
        }
    return {name: (_ours, {}) for name in e2e.VARIANTS}


# Which TransformerEngine row each of ours is compared with.
_YARDSTICKS = {
    "ours bf16": "te bf16",
    "ours bf16 compiled": "te bf16",
    "ours bf16 (te linears)": "te bf16",
    "ours fp8": "te fp8",
    "ours fp8 + fp8 attention": "te fp8 + fp8 attention",
}


def _calls(
    stack: nn.Module, x: Tensor, upstream: Tensor, core: str | None
) -> dict[str, Callable[[], None]]:
    """Forward and forward + backward; ``core`` names the attention that the layers get first."""

    def prepare() -> None:
        if core is not None:
            e2e.exchange(stack, core, x.device)

    def forward() -> None:
        with torch.no_grad():
            stack(x)

    def step() -> None:
        stack(x).backward(upstream)
        for parameter in stack.parameters():
            parameter.grad = None
        x.grad = None

    return {"prepare": prepare, "fwd": forward, "fwdbwd": step}


def _once(call: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(8_000_000)  # the host gets ahead, so that no launch gap is timed
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure_cell(args: argparse.Namespace, name: str, seqlen: int) -> dict[str, Any]:
    """All variants of one size and length."""
    size = SIZES[name]
    shape = (args.micro_batch, seqlen, size.hidden)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, dict[str, Callable[[], None]]] = {}
    variants: dict[str, Any] = {}
    stack: nn.Module | None = None
    shared = args.suite == "backends"
    torch.set_default_dtype(torch.bfloat16)
    try:
        for variant, (build, options) in _variants(args.suite).items():
            if args.variants and variant not in args.variants:
                continue
            try:
                if stack is None or not shared:
                    with torch.device("cuda"):
                        stack = build(size, args, seqlen, **options)
                    _initialise(stack)
                ready = _calls(stack, x, upstream, variant if shared else None)
                ready["prepare"]()
                for which in ("fwd", "fwdbwd"):
                    # Long calls need no second warm-up: the first one has found the memory.
                    for _ in range(1 if seqlen > LONG_SEQLEN else 3):
                        ready[which]()
                torch.cuda.synchronize()
            except Exception as error:  # a row that cannot run is a row that says so
                variants[variant] = {"skipped": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            calls[variant] = ready
    finally:
        torch.set_default_dtype(torch.float32)
    flops = size.flops(args.micro_batch * seqlen, seqlen)
    for which, factor in (("fwd", 1), ("fwdbwd", 3)):
        samples: dict[str, list[float]] = {v: [] for v in calls}
        for _ in range(min(args.rounds, 3) if seqlen > LONG_SEQLEN else args.rounds):
            for variant, ready in calls.items():
                ready["prepare"]()
                samples[variant].append(_once(ready[which]) / args.layers)
        for variant, times in samples.items():
            ms = statistics.median(times)
            variants.setdefault(variant, {})[which] = {
                "ms": ms, "tflops": factor * flops / ms / 1e9, "samples_ms": times
            }  # fmt: skip
    return {"size": name, "seqlen": seqlen, "micro_batch": args.micro_batch, "variants": variants}


@torch.no_grad()
def _initialise(stack: nn.Module) -> None:
    """Random weights of the usual scale; norms stay at one."""
    g = torch.Generator("cuda").manual_seed(0)
    for parameter in stack.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=g)


def _cells(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    sizes = args.sizes or (["8b"] if args.suite == "te" else ["405b-tp8"])
    default = [8192, 32768] if args.suite == "te" else [8192, 16384, 32768, 131072]
    for name in sizes:
        for seqlen in args.seqlens or default:
            yield name, seqlen


def table(result: dict[str, Any]) -> str:
    """Rows are variants; ratios of speed to the TE row of the same precision, or time saved
    against FA2."""
    backends = result["suite"] == "backends"
    last = "saved fwd / step" if backends else "x TE fwd / step"
    lines = [f"| layer | S | variant | fwd ms | step ms | step TFLOP/s | {last} |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for cell in result["cells"]:
        for variant, row in cell["variants"].items():
            head = f"| {cell['size']} | {cell['seqlen']} | {variant} | "
            if "skipped" in row:
                lines.append(head + f"skipped: {row['skipped'][:80]} | | | |")
                continue
            yardstick = "fa2" if backends else _YARDSTICKS.get(variant)
            other = cell["variants"].get(yardstick or "", {})
            shown = ""
            if yardstick and yardstick != variant and "fwd" in other:
                pair = [other[w]["ms"] / row[w]["ms"] for w in ("fwd", "fwdbwd")]
                shown = (
                    " / ".join(f"{1 - 1 / p:.1%}" for p in pair)
                    if backends
                    else " / ".join(f"{p:.3f}" for p in pair)
                )
            f, b = row["fwd"], row["fwdbwd"]
            lines.append(head + f"{f['ms']:.2f} | {b['ms']:.2f} | {b['tflops']:.0f} | {shown} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    result: dict[str, Any] = {
        "what": "layer", "suite": args.suite, "command": args.command, "machine": machine(),
        "te_recipe": args.te_recipe, "layers": args.layers, "cells": [],
    }  # fmt: skip
    known = _variants(args.suite)
    if args.variants and not set(args.variants) <= set(known):
        raise SystemExit(f"--variants must be from {list(known)}, got {args.variants}")
    for name, seqlen in _cells(args):
        result["cells"].append(measure_cell(args, name, seqlen))
        gc.collect()
        torch.cuda.empty_cache()
    print(table(result))
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        facts = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
        out.with_suffix(".md").write_text(f"`{args.command}`\n{facts}\n\n{table(result)}\n")
        print(f"wrote {out}.json, {out}.md")
    return 0
