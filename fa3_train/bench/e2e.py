"""Training steps of Llama-3-8B layers end to end: what a faster attention is worth.

    python -m fa3_train.bench e2e --engines torch deepspeed --linears torch te_fp8 \\
        --seqlens 8192 32768 --out docs/results/e2e

A cell is one loop (engine x linears x length): the `Trainer` that `python -m fa3_train` runs, with
loader, clipping, optimizer and logging, on random tokens, one document per sequence. Within a cell
only the attention changes: the layers' cores are exchanged between blocks of steps, so that all
variants see one set of weights and one state of the allocator, and clocks drift for all alike. The
first step after an exchange is not counted. RoPE is the library's kernel for every variant.

Variants: torch's FlashAttention-2, cuDNN (both through scaled_dot_product_attention), our bf16 and
our FP8 attention. "saved" is the step time saved against FlashAttention-2.

TFLOP/s and mfu_causal count 6 N FLOPs per token (N: weights of the layers' and the head's products)
and 6 H D l^2 per layer and document of length l for attention, which is Megatron-LM's convention:
causal half, no recomputation, whatever precision a product ran in. mfu divides by the bf16 peak.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fa3_train.bench.tables import machine, write_page
from fa3_train.bench.timing import release_memory
from fa3_train.bench.trainer import ENGINES, SIZES
from fa3_train.modules import FlashAttention
from fa3_train.ops.attention import flash_attn_func
from fa3_train.train.compose import load
from fa3_train.train.config_rules import check_combination
from fa3_train.train.engines import start_world, stop_world
from fa3_train.train.loop import Trainer
from fa3_train.train.signals import StopSignal

VARIANTS = ("fa2", "cudnn", "ours bf16", "ours fp8")
_SDPA = {"fa2": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
_FIXED = (
    "data=random", "checkpoint=none", "run.eval_batches=0", "logging=quiet",
    "logging.attention_every=0", "schedule.warmup_steps=2",
)  # fmt: skip
_PHASES = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")


class _PinnedSdpa(FlashAttention):
    """The core of torch's attention with one kernel pinned; sequences of one length only."""

    def __init__(self, head_dim: int, kernel: str) -> None:
        super().__init__(head_dim, backend="sdpa")
        self.kernel = kernel

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, max_seqlen_q: int | None = None, **_: Any
    ) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        length = max_seqlen_q or q.shape[1]
        q, k, v = (x.reshape(-1, length, *x.shape[-2:]) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, self.kernel)):
            out = flash_attn_func(q, k, v, causal=True, backend="sdpa")
        assert isinstance(out, Tensor)
        return out.flatten(0, 1) if max_seqlen_q else out


def core_of(variant: str, head_dim: int, device: torch.device) -> nn.Module:
    """The attention core of a variant."""
    if variant in _SDPA:
        return _PinnedSdpa(head_dim, _SDPA[variant])
    precision = "fp8" if variant == "ours fp8" else "bf16"
    return FlashAttention(head_dim, backend="hopper", precision=precision).to(device)


def exchange(model: Any, variant: str, device: torch.device) -> None:
    """Give every layer of a `TransformerLM` (or list of layers) the variant's core."""
    for layer in model.layers:
        layer.attention.core = core_of(variant, layer.attention.head_dim, device)
        layer.attention.rope_backend = "auto"


def measure(words: list[str], variants: list[str], rounds: int, counted: int) -> dict[str, Any]:
    """All variants in one loop; milliseconds are medians over the counted steps."""
    steps = rounds * len(variants) * (counted + 1) + 1
    fixed = [*_FIXED, "attention=hopper", f"run.steps={steps}", f"logging.every={steps}"]
    last = {word.split("=", 1)[0]: word for word in [*fixed, *words]}
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        config = load([*last.values(), f"run.dir={folder}"])
        world = start_world(config)
        check_combination(config, world.size)
        trainer = Trainer(config, world, stop)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        failed: dict[str, str] = {}
        for _, variant in itertools.product(range(rounds), variants):
            if variant in failed:
                continue
            exchange(trainer.engine.model, variant, world.device)
            try:
                for _ in range(counted + 1):
                    trainer.advance()
                rows[variant] += trainer.meter.flush()[1:]
            except (RuntimeError, ValueError) as error:
                failed[variant] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                break  # a step broken off leaves gradients behind
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        model = config.model_config()
        for part in (trainer.logger, trainer.data, trainer.checkpointer, trainer.engine):
            part.close()
    table: dict[str, Any] = {}
    for variant in variants:
        if not rows[variant]:
            table[variant] = {"skipped": failed.get(variant, "an earlier variant failed")}
            continue
        entry = {key: statistics.median(r[key] for r in rows[variant]) for key in _PHASES}
        share = [r["step_ms"] / entry["step_ms"] for r in rows[variant]]
        entry["spread"] = max(share) - min(share)
        typical = rows[variant][0]
        scale = typical["step_ms"] / entry["step_ms"]
        for key in ("tokens_per_s", "tflops_per_gpu", "mfu_causal"):
            entry[key] = typical[key] * scale if typical[key] is not None else None
        entry["losses"] = [r["loss"] for r in rows[variant]]
        table[variant] = entry
    return {
        "words": list(last.values()), "layers": model.num_layers, "peak_gib": peak,
        "recompute": model.activation_checkpointing,
        "parameters": model.num_parameters(), "accumulation": config.grad_accum(world.size),
        "micro_batch": config.data.micro_batch, "variants": table,
    }  # fmt: skip


def text(result: dict[str, Any]) -> str:
    """One row per loop and variant."""
    lines = [
        "| loop | linears | S | layers | recompute | seqs a step | attention | step ms | fwd | "
        "bwd | opt | tokens/s | TFLOP/s | mfu_causal | saved | peak GiB |",
        "|---" * 16 + "|",
    ]
    for cell in result["cells"]:
        if "error" in cell:
            name = f"| {cell['engine']} | {cell['linear']} | {cell['seqlen']} | | | | | "
            lines.append(name + cell["error"][:90] + " |" * 9)
            continue
        base = cell["variants"].get("fa2", {}).get("step_ms")
        sequences = cell["accumulation"] * cell["micro_batch"]
        for variant, row in cell["variants"].items():
            head = (
                f"| {cell['engine']} | {cell['linear']} | {cell['seqlen']} | {cell['layers']} | "
                f"{cell['recompute']} | {sequences} | "
            )
            if "skipped" in row:
                lines.append(f"{head}{variant} | {row['skipped'][:80]}" + " |" * 9)
                continue
            saved = "" if not base or variant == "fa2" else f"{1 - row['step_ms'] / base:.1%}"
            mfu = "n/a" if row["mfu_causal"] is None else f"{row['mfu_causal']:.1%}"
            lines.append(
                f"{head}{variant} | {row['step_ms']:.1f} | {row['forward_ms']:.1f} | "
                f"{row['backward_ms']:.1f} | {row['optimizer_ms']:.1f} | "
                f"{row['tokens_per_s']:,.0f} | {row['tflops_per_gpu']:.0f} | {mfu} | {saved} | "
                f"{cell['peak_gib']:.1f} |"
            )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["torch", "deepspeed"])
    parser.add_argument("--linears", nargs="+", default=["torch", "te_fp8"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a variant and round")
    parser.add_argument("--out", help="path without suffix: adds to .json, writes .md")
    parser.add_argument("words", nargs="*", help="key=value, as on the command line of a run")


def main(args: argparse.Namespace) -> int:
    out = Path(args.out) if args.out else None
    kept: list[dict[str, Any]] = []
    if out and out.with_suffix(".json").exists():
        kept = json.loads(out.with_suffix(".json").read_text())["cells"]
    result: dict[str, Any] = {"what": "e2e", "command": args.command, "machine": machine()}
    cells: list[dict[str, Any]] = []
    for seqlen, engine, linear in itertools.product(args.seqlens, args.engines, args.linears):
        words = [
            *SIZES["llama3_8b_layers"], *ENGINES[engine], f"linear={linear}",
            f"model.num_layers={args.layers}", f"data.seq_len={seqlen}",
            f"data.global_batch={args.accumulation}", *args.words,
        ]  # fmt: skip
        name = {"engine": engine, "linear": linear, "seqlen": seqlen, "command": args.command}
        try:
            cell = measure(words, args.variants, args.rounds, args.steps)
        except Exception as error:  # the other cells are worth having
            traceback.print_exc()
            cell = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        cells.append(name | cell)
        print(text({"cells": cells[-1:]}), flush=True)
        result["cells"] = kept + cells
        if out:  # now: a cell that hangs must not take the others with it
            write_page(result, out, text(result))
        release_memory()
    stop_world()
    return int(any("error" in cell for cell in cells))
